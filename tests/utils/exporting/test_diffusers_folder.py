"""Exports of the layout `ldm`: diffusers opens them and computes the same, with the scheduler of the same process."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from inference.export_model import main
from model.diffusion_process import ProcessConfig
from model.image.diffusion import ImageDiffusion
from model.image.ldm_scheduler import process_of, scheduler_of
from model.image.vae import ImageVAE
from tests.helpers.runs import SMALL_LDM_UNET, SMALL_LDM_VAE, edit_record
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint
from utils.checkpoints import load_model


def save(model, stage, folder, **weights):
    """A checkpoint whose averaged weights differ from the raw ones, and are not zero; `weights` replace some."""
    torch.manual_seed(0)
    averaged = {name: value + 0.1 * torch.rand(value.shape) for name, value in model.state_dict().items()}
    checkpoint = save_stage_checkpoint(model, stage, folder / "runs" / stage, {**averaged, **weights})
    if stage == "image_diffusion":
        latents = {"vae_fingerprint": "0" * 16, "vae_checkpoint": "gone"}
        edit_record(checkpoint / "stage.json", lambda content: content.update(latents=latents))
    return checkpoint


def export(checkpoint, output, *words):
    return main(["--checkpoint", str(checkpoint), "--output", str(output), "--format", "diffusers", *words])


@pytest.mark.parametrize("is_uniform", [False, True])
@torch.no_grad()
def test_an_autoencoder_computes_the_same(tmp_path, is_uniform, capsys):
    model = ImageVAE.from_preset("ldm", **SMALL_LDM_VAE, use_quant_conv=is_uniform)
    statistics = {"latent_mean": torch.full((4,), 0.5), "latent_std": torch.full((4,), 2.0)} if is_uniform else {}
    checkpoint = save(model, "image_vae", tmp_path, **statistics)
    ours = load_model(ImageVAE, checkpoint)
    theirs = diffusers.AutoencoderKL.from_pretrained(export(checkpoint, tmp_path / "out"))
    command = f"next: python pretrain_image_vae.py --config ldm --init_from {tmp_path / 'out'}\n"
    assert capsys.readouterr().out.endswith(command)
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, _ = ours.encode(image)
    assert mean.std() > 0.01
    assert (theirs.encode(image).latent_dist.mean - mean).abs().max() < 1e-5
    assert (theirs.decode(mean).sample - ours.decode(mean)).abs().max() < 1e-5
    # Standardised latents by their statistics.
    config, normalized = theirs.config, ours.normalize_latents(mean)
    if is_uniform:
        assert torch.allclose((mean - config.shift_factor) * config.scaling_factor, normalized, atol=1e-5)
    else:
        shift, scale = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        assert torch.allclose((mean - shift) / scale, normalized, atol=1e-5) and config.scaling_factor == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": None, "head_width": 4, "use_linear_projection": True, "prediction": "v", "schedule": "cosine"},
        {"schedule": "rectified_flow", "prediction": "velocity", "time_shift": 2.0, "text_encoder": "bytes"},
    ],
)
@torch.no_grad()
def test_a_unet_and_its_scheduler_compute_the_same(tmp_path, changes):
    fields = {**SMALL_LDM_UNET, **changes}
    if fields.get("text_encoder") == "bytes":
        fields |= {"text_embedding_width": None, "text_head_width": 12, "n_text_layers": 0}
    checkpoint = save(ImageDiffusion.from_preset("ldm", **fields), "image_diffusion", tmp_path)
    ours, folder = load_model(ImageDiffusion, checkpoint), export(checkpoint, tmp_path / "out")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder)
    scheduler_class, _ = scheduler_of(ours.config)
    scheduler = getattr(diffusers, scheduler_class).from_pretrained(folder)
    # One step from pure noise, without a caption.
    noise, states = torch.randn(2, 4, 8, 8), load_file(folder / "null_condition.safetensors")["state"].expand(2, 1, -1)
    scheduler.set_timesteps(1)
    time = torch.ones(2)
    prediction = theirs(noise, scheduler.timesteps[0], states).sample
    expected = ours(noise, time).prediction
    assert expected.std() > 0.01
    assert (prediction - expected).abs().max() < 1e-5
    x0 = ours.process.to_x0(expected, noise, time)
    assert torch.allclose(scheduler.step(prediction, scheduler.timesteps[0], noise).prev_sample, x0, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_schedules_of_betas_are_the_same_both_ways(schedule):
    for rescales in (False, True):
        config = ProcessConfig(schedule=schedule, prediction="v", zero_terminal_snr=rescales)
        name, settings = scheduler_of(config)
        scheduler = getattr(diffusers, name)(**settings)
        alpha, _ = config.build_process().alpha_sigma(torch.arange(1, 1001) / 1000)
        assert (scheduler.alphas_cumprod.sqrt() - alpha).abs().max() < 1e-5
        expected = {"schedule": schedule, "prediction": "v", "zero_terminal_snr": rescales}
        assert process_of(dict(scheduler.config)) == expected


def test_what_diffusers_lacks_is_an_error(tmp_path, caplog):
    cases = [
        (ImageVAE.from_preset("tiny", image_size=32), "image_vae", ["architecture='residual'", "--config ldm"]),
        (
            ImageVAE.from_preset("ldm", **{**SMALL_LDM_VAE, "n_decoder_blocks": [1, 1]}),
            "image_vae",
            ["n_decoder_blocks=[1, 1]", "n_decoder_blocks=[2, 2]"],
        ),
        (
            ImageDiffusion.from_preset("ldm", **SMALL_LDM_UNET, schedule="edm", prediction="v"),
            "image_diffusion",
            ["schedule='edm'"],
        ),
    ]
    for number, (model, stage, words) in enumerate(cases):
        caplog.clear()
        with pytest.raises(SystemExit) as stop:
            export(save(model, stage, tmp_path / str(number)), tmp_path / "out")
        assert stop.value.code == 2 and all(word in caplog.text for word in words), caplog.text
        assert not (tmp_path / "out").exists()
