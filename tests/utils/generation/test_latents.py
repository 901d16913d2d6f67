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
from utils.checkpoints import EMA, STAGE, checkpoints_in, mark_complete, write_json
from utils.generation.latents import (
    check_vae,
    find_vae,
    load_vae,
    pin_vae,
    standardized_posterior,
    vae_fingerprint,
)
from utils.saving import rotate


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


# ---- The VAE of some latents.


@pytest.fixture(params=["image", "audio"])
def media(request):
    """What the VAE encodes."""
    return request.param


@pytest.fixture
def project(media, checkpoint, tmp_path):
    """A VAE's run, a cache of its latents with a copy of it, and what the cache records of it."""
    run = tmp_path / "project" / "runs" / f"{media}_vae" / "demo"
    checkpoint = checkpoint if media == "image" else save_audio_vae(tmp_path / "audio")
    shutil.copytree(checkpoint, run / "checkpoint-4")
    cache = tmp_path / "project" / "cached_datasets" / f"{media}_diffusion"
    pin_vae(run / "checkpoint-4", cache)
    return run, cache, {"vae_fingerprint": vae_fingerprint(checkpoint), "vae_checkpoint": str(run)}


@pytest.fixture
def other_vae(media, image_cache):
    """other_vae(run, step): another VAE as a later checkpoint of the run."""

    def call(run, step):
        new = run / "new"
        other = (
            save_vae(new, image_cache, latent_mean=0.3) if media == "image" else save_audio_vae(new, latent_mean=0.3)
        )
        return other.rename(run / f"checkpoint-{step}")

    return call


def test_rotation_leaves_the_copy(project, media, other_vae):
    run, cache, latents = project
    other_vae(run, 8)
    rotate(run, 1)
    assert [folder.name for folder in checkpoints_in(run)] == ["checkpoint-8"]
    assert find_vae(latents, "the latents", folders=[cache]) == cache / "vae" / "checkpoint-4"
    assert load_vae(cache / "vae", "tiny", media=media).latent_std.std() > 0


def test_a_damaged_copy_is_passed_over_and_written_again(project, caplog):
    run, cache, latents = project
    (file,) = (cache / "vae" / "checkpoint-4").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert find_vae(latents, "the latents", folders=[cache]) == run / "checkpoint-4"
    assert f"{file} is damaged" in caplog.text
    pin_vae(run / "checkpoint-4", cache)
    assert find_vae(latents, "the latents", folders=[cache]) == cache / "vae" / "checkpoint-4"


def test_an_older_checkpoint_of_the_run_or_a_renamed_run_is_found(project, media, other_vae):
    run, cache, latents = project
    shutil.rmtree(cache / "vae")
    other_vae(run, 8)
    assert find_vae(latents, "the latents", given=run) == run / "checkpoint-4"
    renamed = run.rename(run.parent / "renamed")
    assert find_vae(latents, "the latents", folders=[cache]) == renamed / "checkpoint-4"
    (renamed / "checkpoint-4").rename(renamed / "best")
    assert load_vae(find_vae(latents, "the latents", given=renamed / "best"), media=media).latent_std.std() > 0


def test_a_project_may_move(project, tmp_path, monkeypatch):
    run, cache, latents = project
    stage = run.parent.name
    shutil.rmtree(cache / "vae")
    moved = (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for recorded in (latents["vae_checkpoint"], f"runs/{stage}/demo", f"runs/{stage}/demo/checkpoint-4"):
        vae = find_vae(
            {**latents, "vae_checkpoint": recorded}, "them", folders=[moved / "cached_datasets" / cache.name]
        )
        assert vae == moved / "runs" / stage / "demo" / "checkpoint-4"


def test_errors_name_the_checkpoint_that_fits(project, media, other_vae):
    run, cache, latents = project
    other = other_vae(run, 8)
    for given in (other, run.parent / "gone"):
        with pytest.raises(
            ValueError, match=rf"{given} has .* come from the VAE {latents['vae_fingerprint']}; it is at"
        ):
            find_vae(latents, "the latents", given=given, folders=[cache])
    shutil.rmtree(cache / "vae")
    shutil.rmtree(run / "checkpoint-4")
    fingerprint = vae_fingerprint(other)
    with pytest.raises(FileNotFoundError, match=rf"(?s)latents of another VAE with preprocess_{media}_diffusion"):
        find_vae(latents, "the latents", folders=[cache], media=media)
    with pytest.raises(FileNotFoundError, match=rf"(?s)VAE {latents['vae_fingerprint']}.*{other}: .*{fingerprint}"):
        find_vae(latents, "the latents", folders=[cache])


def test_the_copy_of_another_vae_is_kept_while_it_is_needed(project, other_vae):
    run, cache, latents = project
    other = other_vae(run, 8)
    with pytest.raises(ValueError, match=rf"trained on latents of the VAE .*{latents['vae_fingerprint']}.*--cached"):
        pin_vae(other, cache, may_replace=False)
    assert vae_fingerprint(cache / "vae") == latents["vae_fingerprint"]
    pin_vae(other, cache)
    assert vae_fingerprint(cache / "vae") == vae_fingerprint(other) and len(checkpoints_in(cache / "vae")) == 1
