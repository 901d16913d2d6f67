import re
from pathlib import Path

import pytest
import torch

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
