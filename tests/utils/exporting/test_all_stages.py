"""Exports of every stage, opened in one fresh process that knows nothing of the runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inference.export_model import main
from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE, AudioVAEConfig
from model.image.diffusion import ImageDiffusion
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.multimodal import MegaTransformerMultimodal
from tests.helpers.runs import edit_record
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint, small_vocoder
from utils.checkpoints import load_model, without_copies

ROOT = Path(__file__).resolve().parents[3]
SMALL_STREAM = {"hidden_size": 32, "head_width": 16, "n_heads": 2, "n_layers": 1}
# Opens every folder by AutoModel alone.
PROGRAM = """
import sys
import model.auto
from safetensors.torch import save_file
from transformers import AutoModel
from tests.utils.exporting.test_all_stages import output_of
save_file({path: output_of(AutoModel.from_pretrained(path).eval()) for path in sys.argv[2:]}, sys.argv[1])
"""


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    """What a model makes of a fixed input; of those that need a prepared batch, all weights and buffers."""
    generator, config = torch.Generator().manual_seed(0), model.config
    if isinstance(model, ImageVAE | RecurrentVAE):
        return model(torch.rand(1, 3, 32, 32, generator=generator)).reconstruction.contiguous()
    if isinstance(model, ImageDiffusion):
        latents = torch.randn(1, *model.latent_shape(), generator=generator)
        return model(latents, torch.full((1,), 0.3)).prediction.contiguous()
    if isinstance(model, AudioDiffusion | MegaTransformerMultimodal):
        values = dict([*model.named_parameters(), *model.named_buffers()])
        return torch.cat([values[name].float().flatten() for name in sorted(values)])
    output = model(torch.randn(1, config.mel.n_mels, 16, generator=generator))
    return (output.reconstruction if isinstance(model, AudioVAE) else output).contiguous()


def small_models() -> dict[str, nn.Module]:
    """A model of every stage beside the language model."""
    torch.manual_seed(0)
    sizes = {"n_mels": 40, "width": 16, "latent_channels": 5, "n_encoder_blocks": 1, "n_decoder_blocks": 1}
    return {
        "image_vae": ImageVAE.from_preset("tiny", image_size=32),
        "recurrent_vae": RecurrentVAE.from_preset("tiny", image_size=32),
        "audio_vae": AudioVAE(AudioVAEConfig(**sizes)),
        "vocoder": small_vocoder(),
        "image_diffusion": ImageDiffusion.from_preset("tiny", widths=[32, 64], n_blocks=[1, 1], text_width=32),
        "audio_diffusion": AudioDiffusion.from_preset("tiny"),
        "multimodal": MegaTransformerMultimodal.from_preset("multimodal-tiny", **SMALL_STREAM),
    }


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Stage -> what the run's averaged model and the exported one compute."""
    folder, runs, exports = tmp_path_factory.mktemp("exports"), {}, {}
    latents = {"vae_fingerprint": "0" * 16, "vae_checkpoint": "gone"}
    for stage, model in small_models().items():
        state = without_copies(model, model.state_dict())
        averaged = {name: value * 1.1 + 0.01 if value.is_floating_point() else value for name, value in state.items()}
        runs[stage] = save_stage_checkpoint(model, stage, folder / "runs" / stage, averaged)
        # Models of latents name their VAE.
        settings = {"image": latents, "audio": latents} if stage == "multimodal" else latents
        if "diffusion" in stage or stage == "multimodal":
            edit_record(
                runs[stage] / "stage.json", lambda content, settings=settings: content.update(latents=settings)
            )
        exports[stage] = main(["--checkpoint", str(runs[stage]), "--output", str(folder / stage)])
    # One process opens all.
    paths = list(map(str, exports.values()))
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder / "outputs"), *paths], cwd=ROOT, check=True, timeout=200)
    outputs = load_file(folder / "outputs")
    expected = {stage: output_of(load_model(type(model), runs[stage])) for stage, model in small_models().items()}
    return {stage: (expected[stage], outputs[str(exports[stage])]) for stage in exports}


STAGES = ("image_vae", "recurrent_vae", "audio_vae", "vocoder", "image_diffusion", "audio_diffusion", "multimodal")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_fresh_process_computes_the_same(opened, stage):
    expected, output = opened[stage]
    assert expected.isfinite().all() and expected.std() > 0
    assert (expected - output).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
