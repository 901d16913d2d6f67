"""Images of three sizes through the image line: preprocessing, VAEs, latents, diffusion, evaluation, inference."""

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import evaluate
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.image.pixels import ImageDataset, to_uint8
from inference.text_to_image import TextToImageArguments, generate
from preprocess_image_diffusion_dataset import ImageDiffusionPreprocess
from preprocess_image_vae_dataset import ImageVAEPreprocess
from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from pretrain_recurrent_vae import RecurrentVAEStage
from tests.helpers.latent_cache import make_latents
from tests.helpers.processes import newest_results
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_RUN, changed, equal, run_stage
from utils.command_line import parse_arguments
from utils.training.diffusion import DiffusionTrainer
from utils.training.image_vae import ImageVAEGANTrainer

BUCKETS = ["--aspect_buckets", "1:1", "3:2", "2:3", "--bucket_multiple", "16"]
SIZES = [(48, 48), (64, 32), (32, 64)]
VAE_RUN = changed(SMALL_RUN, "--override", "image_size=48")
STEP = ["--batch_size", "2", "--gradient_accumulation_steps", "3", "--save_steps", "2"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """20 drawings in three proportions, whose captions name their ground."""
    folder = tmp_path_factory.mktemp("drawings")
    lines = ["file_name,text"]
    for number in range(20):
        size = [(60, 60), (100, 60), (60, 90)][number % 3]
        color = ["red", "green", "blue", "gold"][number % 4]
        image = Image.new("RGB", size, color)
        ImageDraw.Draw(image).ellipse((number, 20, number + 25, 45), fill=(250, 9 * number, 120))
        image.save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,a disc on {color}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def prepare(raw: Path, out: Path, *flags: str) -> dict:
    words = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "48", *BUCKETS]
    return ImageVAEPreprocess.main(changed([*words, "--validation_fraction", "0.3", "--num_workers", "0"], *flags))


@pytest.fixture(scope="module")
def cache(raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "image_vae"
    prepare(raw, folder)
    return folder


class Noting:
    """Keeps the samples and the loss of every micro-batch, mixed in before a trainer."""

    noted: list[tuple[int, list[int], torch.Size, float]] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        shape = inputs["image" if "image" in inputs else "mean"].shape
        self.noted.append((self.state.global_step, inputs["index"].tolist(), shape, loss.item()))
        return loss


class NotingVAEStage(ImageVAEStage):
    trainer_class = type("NotingVAETrainer", (Noting, ImageVAEGANTrainer), {})


class NotingDiffusionStage(ImageDiffusionStage):
    trainer_class = type("NotingDiffusionTrainer", (Noting, DiffusionTrainer), {})


@pytest.fixture(scope="module")
def vae_run(cache, tmp_path_factory):
    """A run of four steps of three micro-batches, and what was noted."""
    Noting.noted.clear()
    run = run_stage(NotingVAEStage, VAE_RUN, cache, tmp_path_factory.mktemp("runs"), "vae", 4, *STEP)
    return run, list(Noting.noted)


@pytest.fixture(scope="module")
def latents(raw, vae_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "image_diffusion"
    make_latents(raw, vae_run[0].folder, folder, *BUCKETS, "--horizontal_flip", "--validation_fraction", "0.3")
    return folder


@pytest.fixture(scope="module")
def diffusion_run(latents, tmp_path_factory):
    Noting.noted.clear()
    out = tmp_path_factory.mktemp("runs")
    run = run_stage(NotingDiffusionStage, SMALL_DIFFUSION, latents, out, "diffusion", 4, *STEP, "--eval_images", "6")
    return run, list(Noting.noted)


def test_the_cache_knows_the_size_of_every_image(cache, raw, tmp_path):
    data = ImageDataset(cache, "train")
    assert data.sizes == SIZES and set(data.buckets) == {0, 1, 2}
    for index, entry in enumerate(data.entries):
        width, height = SIZES[int(entry["source"][:2]) % 3]
        assert data[index]["image"].shape == (3, height, width) and SIZES[data.buckets[index]] == (width, height)
    # Packed, and with a flipped and jittered copy in the same bucket.
    prepare(raw, tmp_path / "out", "--pack", "5", "--num_augmented_copies", "1", "--horizontal_flip", "1")
    packed = ImageDataset(tmp_path / "out", "train")
    assert packed.packs and packed.buckets == [bucket for bucket in data.buckets for _ in range(2)]
    assert torch.equal(packed[0]["image"], data[0]["image"])
    assert torch.equal(to_uint8(packed[1]["image"]), to_uint8(data[0]["image"].flip(-1)))
    # Other ratios are other settings; squares have the settings of a cache without buckets.
    assert prepare(raw, tmp_path / "other", "--aspect_buckets", "1:1", "3:2")["settings_fingerprint"] != (
        data.settings_fingerprint
    )


def test_flags_of_buckets_are_checked(raw, cache, tmp_path, capsys, caplog):
    for flags, message in (
        (["--aspect_buckets"], "--aspect_buckets is empty; name ratios"),
        (["--aspect_buckets", "3/2"], "--aspect_buckets '3/2' must be width:height"),
    ):
        with pytest.raises(SystemExit):
            prepare(raw, tmp_path / "out", *flags)
        assert message in capsys.readouterr().err
    # A model whose compression does not divide the sides: the message has the command.
    with pytest.raises(ValueError, match=r"images of 48x48.* multiples of 32, .* --bucket_multiple 32"):
        ImageDataset(cache, "train").expect_multiples(32, "for a test")


def check_micro_batches(run, noted, dataset, loss_name):
    """Micro-batches of one bucket, steps of several, and losses that are means over all images of a step."""
    assert {len(indices) for _, indices, *_ in noted} == {2} and len(noted) == 4 * 3
    assert all(len({dataset.buckets[index] for index in indices}) == 1 for _, indices, *_ in noted)
    steps = {step: [entry for entry in noted if entry[0] == step] for step in range(4)}
    assert any(len({entry[2] for entry in step}) > 1 for step in steps.values())
    for line, step in zip(run.logged(loss_name), steps.values()):
        assert line == pytest.approx(sum(loss for *_, loss in step), rel=1e-4)


def test_the_vae_trains_on_batches_of_one_size_and_resumes(vae_run, cache, tmp_path):
    run, noted = vae_run
    check_micro_batches(run, noted, ImageDataset(cache, "train"), "loss")
    assert run.weights("model")["latent_std"].isfinite().all() and run.logged("eval_psnr")
    resumed = ["--resume_from_checkpoint", str(run.folder.with_name("checkpoint-2"))]
    again = run_stage(ImageVAEStage, VAE_RUN, cache, tmp_path, "again", 4, *STEP, *resumed)
    assert equal(again.weights(), run.weights()) and equal(again.adversary, run.adversary)
    # As many images in a step, but other micro-batches.
    other = changed([*STEP, *resumed], "--batch_size", "3", "--gradient_accumulation_steps", "2")
    with pytest.raises(ValueError, match=r"--batch_size=3: .* micro-batches of 2 images of one size.* --batch_size 2"):
        run_stage(ImageVAEStage, VAE_RUN, cache, tmp_path, "other", 4, *other)


@pytest.mark.slow
def test_the_recurrent_vae_trains_on_several_sizes(cache, tmp_path):
    run = run_stage(RecurrentVAEStage, VAE_RUN, cache, tmp_path, "recurrent", 1, *STEP, "--gan_weight", "0")
    assert run.logged("eval_psnr_16_steps")


def test_diffusion_trains_on_batches_of_one_size_and_resumes(diffusion_run, latents, tmp_path):
    run, noted = diffusion_run
    check_micro_batches(run, noted, ImageLatentDataset(latents, "train"), "loss")
    assert run.logged("eval_kid")
    resumed = ["--resume_from_checkpoint", str(run.folder.with_name("checkpoint-2")), "--eval_images", "6"]
    again = run_stage(ImageDiffusionStage, SMALL_DIFFUSION, latents, tmp_path, "again", 4, *STEP, *resumed)
    assert equal(again.weights(), run.weights())


def test_what_takes_squares_alone_says_so(latents, tmp_path):
    words = ["--config", "multimodal-tiny", "--include_modes", "text", "image"]
    with pytest.raises(ValueError, match="aspect_buckets; the model takes square images"):
        run_stage(MultimodalStage, [*words, "--image_latents", str(latents)], None, tmp_path, "streams", 1)


def test_joined_shards_of_latents_are_those_of_one_process(raw, vae_run, latents, tmp_path):
    flags = [*BUCKETS, "--horizontal_flip", "--validation_fraction", "0.3", "--batch_size", "4"]
    make = partial(make_latents, raw, vae_run[0].folder)
    make(tmp_path / "whole", *flags)
    for number in (1, 2):
        make(tmp_path / "joined", *flags, "--shard", f"{number}/2")
    shards = [str(tmp_path / f"joined.shard-{number}-of-2") for number in (1, 2)]
    ImageDiffusionPreprocess.main(["--merge", *shards, "--output_dir", str(tmp_path / "joined")])
    names = {file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.pt")}
    assert len(names) == 20
    for name in names:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Another size of batches gives the same latents up to rounding; all have the shape of their bucket.
    data, other = (ImageLatentDataset(folder, "train") for folder in (tmp_path / "joined", latents))
    for index, bucket in enumerate(data.buckets):
        width, height = SIZES[bucket]
        assert data[index]["mean"].shape == (16, height // 8, width // 8)
        torch.testing.assert_close(data[index]["flipped_mean"], other[index]["flipped_mean"], atol=1e-2, rtol=1e-2)


def test_images_are_evaluated_in_their_own_sizes(vae_run, diffusion_run, tmp_path):
    for run in (vae_run[0], diffusion_run[0]):
        words = ["--checkpoint", str(run.folder), "--output_dir", str(tmp_path), "--batch_size", "3"]
        words += ["--n_steps", "2", "--training_samples", "4"] if run is diffusion_run[0] else []
        metrics = evaluate.main([*words, "--contact_sheet", "4"])
        assert all(scores["kid"] is not None for name, scores in metrics["scores"].items() if "kid" in scores)
    assert metrics["reference"] == "real"


def test_inference_has_the_sizes_of_training(diffusion_run, tmp_path, caplog):
    def sizes(*words: str) -> set[tuple[int, int]]:
        common = ["--checkpoint", str(diffusion_run[0].folder), "--prompts", "a disc on red", "a", "--n_steps", "2"]
        generate(parse_arguments(TextToImageArguments, [*common, "--output_dir", str(tmp_path / "out"), *words], ""))
        files = newest_results(tmp_path / "out").glob("*_seed0.png")
        return {Image.open(file).size for file in files}

    assert sizes() == {(48, 48)} and sizes("--aspect", "2:1") == {(64, 32)}
    assert sizes("--aspect", "9:16") == {(32, 64)} and "trained" not in caplog.text
    assert sizes("--width", "64", "--height", "48") == {(64, 48)}
    assert "64x48 pixels were not trained on" in caplog.text and "48x48, 64x32, 32x64" in caplog.text
    with pytest.raises(ValueError, match=r"--width 60 .*multiples of 16; the nearest are 64x64.* 48x48, 64x32, 32x64"):
        sizes("--width", "60")
    with pytest.raises(ValueError, match=r"--aspect 4:3: .* 48x48, 64x32, 32x64, of which 48x48 is the nearest"):
        sizes("--aspect", "4:3")
