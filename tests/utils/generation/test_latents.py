import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from model.audio.vae import AudioVAE
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from tests.helpers.audio_latent_cache import save_audio_vae
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.latent_cache import save_vae
from utils.checkpoints import EMA, STAGE, mark_complete, write_json
from utils.generation.latents import check_vae, load_vae, standardized_posterior, vae_fingerprint


@pytest.fixture(scope="module")
def checkpoint(image_cache, tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "run", image_cache)


def edit_json(file, **changes):
    write_json(file, {**json.loads(file.read_text()), **changes})
    mark_complete(file.parent)


def test_averaged_weights_are_loaded_for_inference(checkpoint):
    vae, averaged = load_vae(checkpoint.parent, "tiny"), load_file(checkpoint / EMA)
    assert isinstance(vae, ImageVAE) and not vae.training
    assert all(torch.equal(value, averaged[name]) for name, value in vae.state_dict().items())


def test_the_class_follows_the_stage(checkpoint, tmp_path):
    recurrent = RecurrentVAE.from_preset("tiny", image_size=32)
    n_channels = recurrent.config.latent_channels
    recurrent.set_latent_statistics(torch.ones(n_channels), torch.ones(n_channels))
    recurrent.save_pretrained(tmp_path / "checkpoint-1")
    shutil.copy(checkpoint / STAGE, tmp_path / "checkpoint-1")
    edit_json(tmp_path / "checkpoint-1" / STAGE, stage="recurrent_vae")
    assert isinstance(load_vae(tmp_path), RecurrentVAE)
    edit_json(tmp_path / "checkpoint-1" / STAGE, stage="image_diffusion")
    with pytest.raises(
        ValueError, match=r"'image_diffusion', which trains no VAE of type image; .* image_vae, recurrent_vae"
    ):
        load_vae(tmp_path)


def test_an_audio_vae_is_loaded_as_such_alone(checkpoint, tmp_path):
    audio = save_audio_vae(tmp_path)
    assert isinstance(load_vae(audio, media="audio"), AudioVAE)
    with pytest.raises(ValueError, match="'audio_vae', which trains no VAE of type image"):
        load_vae(audio)
    with pytest.raises(ValueError, match="'image_vae', which trains no VAE of type audio; stages that do: audio_vae"):
        load_vae(checkpoint, media="audio")
    with pytest.raises(ValueError, match=r"the latents in x come from the VAE 0123.*preprocess_audio_diffusion"):
        check_vae(audio, "0123", "the latents in x", media="audio")


def test_unfit_checkpoints_are_refused(checkpoint, image_cache, tmp_path):
    with pytest.raises(ValueError, match="preset 'tiny', not 'small'"):
        load_vae(checkpoint, "small")
    with pytest.raises(ValueError, match=r"no latent statistics .*pretrain_image_vae\.py"):
        load_vae(save_checkpoint(tmp_path, image_cache))


def test_fingerprint_names_the_used_weights_and_the_configuration(checkpoint, image_cache, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved" / "checkpoint-77")
    first = vae_fingerprint(checkpoint)
    assert len(first) == 16 and vae_fingerprint(moved) == vae_fingerprint(moved.parent) == first
    edit_json(moved / "config.json", transformers_version="9.9")
    edit_json(moved / STAGE, preset="other")
    (moved / "optimizer.pt").write_bytes(b"state")
    shutil.copy(moved / EMA, moved / "model.safetensors")  # Raw weights beside averaged ones are not used.
    mark_complete(moved)
    assert vae_fingerprint(moved) == first
    edit_json(moved / "config.json", image_size=64)
    assert vae_fingerprint(moved) != first
    assert vae_fingerprint(save_vae(tmp_path / "other", image_cache, latent_mean=0.3)) != first
    raw = shutil.copytree(checkpoint, tmp_path / "raw" / "checkpoint-4")
    (raw / EMA).unlink()
    mark_complete(raw)
    assert vae_fingerprint(raw) != first


def test_latents_that_are_not_finite_are_refused(checkpoint):
    vae = load_vae(checkpoint)
    with pytest.raises(ValueError, match="standardised latent of inf does not fit"):
        standardized_posterior(vae, torch.full((1, 3, 32, 32), torch.nan))
