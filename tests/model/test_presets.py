import re
from pathlib import Path

import pytest
import torch

from model.image.ldm_vae import rename_diffusers_weights
from model.image.vae import ImageVAE
from model.presets import IMAGE_VAE, IMAGE_VAE_PARAMETERS

SOURCE = Path(__file__).resolve().parent.parent.parent / "model" / "presets.py"


@pytest.mark.parametrize("name", IMAGE_VAE)
def test_parameters_are_as_stated(name):
    with torch.device("meta"):
        model = ImageVAE.from_preset(name)
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == IMAGE_VAE_PARAMETERS[name]
    row = next(line for line in SOURCE.read_text().splitlines() if line.strip().startswith(f'"{name}": '))
    millions, compression = re.search(r"# +([\d.]+) M  f(\d+)", row).groups()
    assert float(millions) == pytest.approx(n_parameters / 1e6, abs=0.006)
    assert int(compression) == model.config.compression


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
