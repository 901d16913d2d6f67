"""Shared fixtures: small real pictures on disk, their cache, and a stage run in this process."""

import json
import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from preprocess_image_vae_dataset import ImageVAEPreprocess
from pretrain_image_vae import ImageVAEStage

torch.set_num_threads(1)

# The seed command's rates at a size that trains in seconds; the discriminator joins at step 2.
SMALL_RUN = """
    --config tiny --override image_size=32 --learning_rate 1e-4 --logging_steps 1 --eval_steps 1000 --save_steps 1000
    --perceptual_weight 0 --discriminator_channels 8 --gan_start_step 2 --gan_warmup_steps 2 --gan_ramp_steps 4
    --r1_weight 1 --r1_every 2 --lecam_weight 0.01 --diff_augment color --use_spectral_norm
    --latent_statistics_samples 16""".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> Path:
    """72 drawings of 40 x 40 pixels: coloured discs and bars, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(72):
        red, green, blue, x, y, r = torch.randint(5, 35, (6,), generator=generator).tolist()
        picture = Image.new("RGB", (40, 40), (255, 255, 255))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=(red * 7, green * 7, blue * 7))
        draw.rectangle((x // 2, y, x, y + 4), fill=(blue * 7, red * 7, green * 7))
        picture.save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def picture_cache(picture_folder, tmp_path_factory) -> Path:
    """The pictures preprocessed at 32 px."""
    cache = tmp_path_factory.mktemp("caches") / "image_vae"
    words = ["--dataset_name", str(picture_folder), "--output_dir", str(cache), "--image_size", "32"]
    ImageVAEPreprocess.main([*words, "--validation_fraction", "0.1", "--num_workers", "0"])
    return cache


class Run:
    """A finished run's newest checkpoint, as files."""

    def __init__(self, run_dir: Path, step: int):
        self.folder = run_dir / f"checkpoint-{step}"

    @property
    def losses(self) -> list[float]:
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [line["loss"] for line in history if "loss" in line]

    def weights(self, name: str = "model") -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def adversary(self) -> dict:
        return torch.load(self.folder / "stage_state.pt", weights_only=True)["adversary"]


@pytest.fixture
def train(picture_cache, tmp_path):
    """Runs the image VAE stage in this process: train("name", steps, *flags) -> Run."""

    def run(name: str, steps: int, *flags: str) -> Run:
        words = ["--cached_dataset", str(picture_cache), "--output_dir", str(tmp_path), "--run_name", name]
        try:
            ImageVAEStage.main([*SMALL_RUN, *words, "--max_steps", str(steps), *flags])
        except SystemExit as end:
            raise end.__cause__ or end from None
        return Run(tmp_path / "image_vae" / name, steps)

    yield run
    logging.getLogger().handlers.clear()


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two state dicts with the same names."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)
