import re
from pathlib import Path

import pytest
import torch

from model import presets
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.causal import MegaTransformerForCausalLM
from model.image.diffusion import ImageDiffusion
from model.image.ldm_unet import rename_diffusers_weights as rename_diffusers_unet_weights
from model.image.ldm_vae import rename_diffusers_weights
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE

SOURCE = Path(presets.__file__).read_text()
MODELS = {
    "IMAGE_VAE": ImageVAE,
    "RECURRENT_VAE": RecurrentVAE,
    "IMAGE_DIFFUSION": ImageDiffusion,
    "AUDIO_VAE": AudioVAE,
    "VOCODER": Vocoder,
    "MEGATRANSFORMER": MegaTransformerForCausalLM,
}


@pytest.mark.parametrize("table, name", [(table, name) for table in MODELS for name in getattr(presets, table)])
def test_parameters_are_as_stated(table, name):
    with torch.device("meta"):
        model = MODELS[table].from_preset(name)
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == getattr(presets, f"{table}_PARAMETERS")[name]
    rows = SOURCE[SOURCE.index(f"\n{table} = {{") :].splitlines()
    row = next(line for line in rows if line.strip().startswith(f'"{name}": '))
    millions, compression = re.search(r"# +([\d.]+) M(?:  f(\d+))?$", row).groups()
    assert float(millions) == pytest.approx(n_parameters / 1e6, abs=0.006)
    assert table in ("IMAGE_DIFFUSION", "VOCODER", "MEGATRANSFORMER") or int(compression) == model.config.compression


@pytest.mark.parametrize("table", MODELS)
def test_every_row_has_its_parameters(table):
    assert set(getattr(presets, table)) == set(getattr(presets, f"{table}_PARAMETERS"))


def test_ldm_preset_has_the_layout_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        ours = ImageVAE.from_preset("ldm")
    weights = rename_diffusers_weights(theirs.state_dict())
    own = {name: value.shape for name, value in ours.state_dict().items() if not name.startswith("latent_")}
    assert {name: value.shape for name, value in weights.items()} == own


def test_ldm_diffusion_preset_has_the_layout_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        ours = ImageDiffusion.from_preset("ldm").network
    weights = rename_diffusers_unet_weights(theirs.state_dict())
    own = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in weights.items()} == own
