"""Captioned images, a VAE with latent statistics, and their latents, for what reads or writes such a cache."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from preprocess_image_diffusion_dataset import ImageDiffusionPreprocess
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import changed
from utils.checkpoints import mark_complete

CAPTIONS = ("a red disc", "zwölf Bären", "", "a very long caption " * 4)


def write_captioned_images(folder: Path, count: int, side: int = 32) -> Path:
    """Different images of `side` pixels with a metadata.csv of captions in turn."""
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
        lines.append(f"{number:03}.png,{CAPTIONS[number % len(CAPTIONS)]}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save_vae(run_dir: Path, image_cache: Path, latent_mean: float = 0.2) -> Path:
    """The checkpoint of `save_checkpoint`, with measured latent statistics; another mean is another VAE."""
    checkpoint = save_checkpoint(run_dir, image_cache)
    for file in checkpoint.glob("*.safetensors"):
        weights = load_file(file)
        n_channels = len(weights["latent_mean"])
        weights["latent_mean"] = latent_mean * torch.arange(1.0, n_channels + 1)
        weights["latent_std"] = torch.linspace(0.5, 1.5, n_channels)
        save_file(weights, file, {"format": "pt"})
    mark_complete(checkpoint)
    return checkpoint


def make_latents(images: Path, vae: Path, out: Path, *flags: str) -> dict:
    """Preprocess in this process with a tenth for validation; returns the manifest."""
    words = ["--dataset_name", str(images), "--vae_checkpoint", str(vae), "--output_dir", str(out)]
    return ImageDiffusionPreprocess.main(
        changed([*words, "--num_workers", "0", "--validation_fraction", "0.1"], *flags)
    )
