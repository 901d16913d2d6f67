import shlex

import pytest
import torch

from dataset_loading.image.latents import ImageLatentDataset
from tests.helpers.latent_cache import make_latents, save_vae, write_captioned_images
from tests.helpers.text_encoder_folder import save_text_encoder
from utils.command_line import parse_arguments
from utils.preprocessing.arguments import ImageDiffusionPreprocessArguments


@pytest.fixture(scope="module")
def folder(image_cache, tmp_path_factory):
    """Latents of mirrored images and states of a text encoder."""
    root = tmp_path_factory.mktemp("latents")
    raw, vae = write_captioned_images(root / "raw", 20), save_vae(root / "vae", image_cache)
    encoder = save_text_encoder(root / "encoder")
    make_latents(raw, vae, root / "cache", "--horizontal_flip", "--text_encoder", str(encoder))
    return root / "cache"


def refused(folder, **wanted):
    """The words of the command that the refusal shows; it must be one that the script accepts."""
    with pytest.raises(ValueError, match="was made with") as caught:
        ImageLatentDataset(folder, "train").expect(**wanted)
    command = str(caught.value).partition("this makes it: python ")[2]
    script, *words = shlex.split(command)
    assert script == "preprocess_image_diffusion_dataset.py"
    args = parse_arguments(ImageDiffusionPreprocessArguments, words, "")
    assert args.output_dir != str(folder)
    return args


def test_items_are_ready_for_training(folder):
    data = ImageLatentDataset(folder, "train")
    stored = torch.load(folder / "train" / f"{data.entries[2]['key']}.pt", weights_only=True)
    item = data[2]
    for name in ("mean", "std", "flipped_mean", "flipped_std"):
        assert item[name].dtype == torch.float32 and torch.equal(item[name], stored[name].float())
    assert item["tokens"].dtype == torch.int64 and item["tokens"].tolist() == stored["tokens"].tolist()
    assert item["text_states"].dtype == torch.bfloat16 and item["text_states"].shape[1] == 16
    assert item["index"].item() == 2 and item["mean"].shape == (16, 4, 4)


def test_what_fits_is_accepted(folder):
    data = ImageLatentDataset(folder, "validation")
    wanted = {name: data.manifest["settings"][name] for name in ("vae_fingerprint", "latent_shape", "max_tokens")}
    assert data.expect(**wanted, vae_checkpoint="anywhere") is data


def test_another_vae_is_refused_with_the_flag_that_names_it(folder):
    assert "with fingerprint abc" in refused(folder, vae_fingerprint="abc").vae_checkpoint
    assert (
        refused(folder, vae_fingerprint="abc", vae_checkpoint="runs/image_vae/b").vae_checkpoint == "runs/image_vae/b"
    )


def test_another_shape_is_refused_with_the_image_size_or_the_vae(folder):
    args = refused(folder, latent_shape=[16, 8, 8])
    assert args.image_size == 64 and args.vae_checkpoint.endswith("checkpoint-4")
    args = refused(folder, latent_shape=[4, 4, 4])
    assert "latent_channels=4" in args.vae_checkpoint and args.image_size == 0


def test_other_text_and_flips_are_refused_with_their_flags(folder):
    assert refused(folder, max_tokens=7).max_tokens == 7
    assert refused(folder, text_embedding_width=0).text_encoder == ""
    assert "text_embedding_width=64" in refused(folder, text_embedding_width=64).text_encoder
    assert refused(folder, horizontal_flip=False).horizontal_flip is False


def test_captions_that_are_all_empty_are_refused(folder, caplog):
    data = ImageLatentDataset(folder, "train").expect_captions()
    assert "captions are empty" in caplog.text and any(entry["caption"] for entry in data.entries)
    data.entries = [{**entry, "caption": " "} for entry in data.entries]
    with pytest.raises(ValueError, match=r"all \d+ captions of .*--caption_column"):
        data.expect_captions()
