"""Captions to images: the right VAE, the right text encoder, guidance that is what it says."""

import copy
import shutil
from pathlib import Path

import pytest
import torch

from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusionConfig
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.latent_cache import make_latents, save_vae
from tests.helpers.runs import SMALL_DIFFUSION, run_stage
from tests.helpers.text_encoder_folder import save_text_encoder
from utils.command_line import parse_arguments
from utils.generation.arguments.image import SamplingArguments
from utils.generation.text_to_image import TextToImagePipeline, fit_to_latents


@pytest.fixture(scope="module")
def pipeline(latent_cache, tmp_path_factory):
    folder = save_diffusion_checkpoint(tmp_path_factory.mktemp("runs") / "image_diffusion" / "small", latent_cache)
    return TextToImagePipeline.load(folder)


def settings(**changes) -> SamplingArguments:
    return SamplingArguments(**{"n_steps": 4, **changes})


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_an_image_depends_on_its_seed_and_prompt_alone(sampler, pipeline):
    prompts, seeds = ["a red disc", "zwölf Bären", "a red disc"], [3, 4, 5]
    together = pipeline.latents(prompts, seeds, settings(sampler=sampler))
    alone = pipeline.latents(prompts[1:2], seeds[1:2], settings(sampler=sampler))
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_guidance_of_one_is_none_and_more_is_extrapolation(pipeline):
    """One Euler step from pure noise lands on the guided estimate of the data."""
    one, three, none = (
        pipeline.latents(["a red disc"], [0], settings(sampler="euler", n_steps=1, guidance_scale=scale))
        for scale in (1.0, 3.0, 0.0)
    )
    assert (one - none).abs().max() > 1e-3
    assert torch.allclose(three, none + 3 * (one - none), atol=1e-4)


def test_guidance_outside_its_interval_is_none(pipeline):
    plain = pipeline.latents(["a red disc"], [0], settings(guidance_scale=1.0))
    late = pipeline.latents(["a red disc"], [0], settings(guidance_scale=5.0, guidance_interval=[0.0, 1e-6]))
    assert torch.allclose(plain, late, atol=1e-5)


def test_images_are_decoded_in_the_units_of_the_vae(pipeline):
    latents = pipeline.latents(["a red disc"], [0], settings())
    expected = pipeline.vae.decode(
        latents * pipeline.vae.latent_std.view(-1, 1, 1) + pipeline.vae.latent_mean.view(-1, 1, 1)
    )
    assert torch.allclose(pipeline.images(["a red disc"], [0], settings()), expected.clamp(-1, 1), atol=1e-5)


def test_another_vae_and_another_stage_are_refused(latent_cache, image_cache, tmp_path):
    folder = save_diffusion_checkpoint(tmp_path / "run", latent_cache)
    other = save_vae(tmp_path / "vae", image_cache, latent_mean=0.3)
    with pytest.raises(ValueError, match=r"fingerprint \w+, but the latents that .* come from the VAE \w+"):
        TextToImagePipeline.load(folder, str(other))
    with pytest.raises(ValueError, match="stage 'image_vae'; text to image needs image_diffusion"):
        TextToImagePipeline.load(other)


def test_a_vae_may_have_moved(latent_cache, tmp_path):
    folder = save_diffusion_checkpoint(tmp_path / "run", latent_cache)
    vae = Path(ImageLatentDataset(latent_cache, "train").manifest["settings"]["vae_checkpoint"])
    shutil.copytree(vae, tmp_path / "moved" / vae.name)
    assert TextToImagePipeline.load(folder, str(tmp_path / "moved" / vae.name)).vae.latent_std.std() > 0


def test_the_configuration_is_fitted_to_the_latents(tmp_path):
    config = ImageDiffusionConfig()
    latents = {"latent_shape": [8, 16, 16], "max_tokens": 64, "text_encoder": "t5", "text_embedding_width": 12}
    fitted = fit_to_latents(config, latents, [], folder=tmp_path)
    assert (fitted.latent_channels, fitted.latent_size, fitted.max_tokens) == (8, 16, 64)
    assert (fitted.text_encoder, fitted.text_embedding_width) == ("frozen", 12)
    with pytest.raises(ValueError, match="n_text_layers=3 has no effect"):
        fit_to_latents(config, latents, ["n_text_layers=3"], folder=tmp_path)
    with pytest.raises(ValueError, match=r"text_encoder='frozen' .* text_encoder=bytes"):
        fit_to_latents(fitted, {**latents, "text_encoder": ""}, [], folder=tmp_path)
    assert fit_to_latents(config, {**latents, "max_tokens": 77}, [], folder=tmp_path).max_tokens == 80
    with pytest.raises(ValueError, match=r"--override latent_size=4 does not fit .* latent_size=16"):
        fit_to_latents(config.replace(latent_size=4), latents, ["latent_size=4"], folder=tmp_path)


def test_a_model_on_frozen_text_trains_and_samples(latent_cache, image_cache, tmp_path, fresh_logging):
    from pretrain_image_diffusion import ImageDiffusionStage

    encoder = save_text_encoder(tmp_path / "encoder")
    cache = tmp_path / "frozen"
    vae = ImageLatentDataset(latent_cache, "train").manifest["settings"]["vae_checkpoint"]
    make_latents(latent_cache.parent / "raw", Path(vae), cache, "--text_encoder", str(encoder), "--max_tokens", "32")
    run = run_stage(ImageDiffusionStage, SMALL_DIFFUSION, cache, tmp_path / "runs", "frozen", 2, "--batch_size", "8")
    pipeline = TextToImagePipeline.load(run.folder)
    first, second = (pipeline.latents([prompt], [0], settings()) for prompt in ("a red disc", "a very long caption"))
    assert first.shape == (1, 16, 4, 4) and torch.isfinite(first).all() and torch.isfinite(second).all()
    assert pipeline.text_inputs(["a red disc"])["text_states"].shape == (1, 5, 16)
    shutil.rmtree(encoder)
    save_text_encoder(encoder, seed=1)
    with pytest.raises(ValueError, match=r"text encoder .* has fingerprint \w+, but the captions were encoded by \w+"):
        TextToImagePipeline.load(run.folder)


def test_images_that_are_not_finite_are_an_error(pipeline):
    broken = copy.deepcopy(pipeline)
    torch.nn.init.constant_(broken.vae.decoder.head.bias, torch.inf)
    with pytest.raises(ValueError, match="the image of 'a red disc' is not finite"):
        broken.images(["a red disc"], [0], settings())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--guidance_interval 0.5 0.5", "0 <= first < second <= 1"),
        ("--guidance_scale 1 --guidance_rescale 0.5", "--guidance_rescale has no effect with guidance_scale=1.0"),
        ("--guidance_scale 1 --guidance_interval 0.2 0.8", "--guidance_interval has no effect"),
    ],
)
def test_sampling_flags_that_cannot_work_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(SamplingArguments, words.split(), "test")
    assert message in capsys.readouterr().err
