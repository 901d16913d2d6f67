"""Shared fixtures: small real pictures on disk, their cache, and a stage run in this process."""

import itertools
import json
import logging
import os
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
# Each test process keeps librosa's compiled functions to itself: two processes that compile them at the same time can
# leave a cache that crashes whoever calls them (https://github.com/numba/numba/issues/10128).
os.environ["NUMBA_CACHE_DIR"] = str(
    Path(__file__).parents[1] / ".pytest_cache" / "numba" / os.environ.get("PYTEST_XDIST_WORKER", "main")
)

import pytest
import torch
from latent_cache import make_latents, save_vae, write_captioned_pictures
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from preprocess_image_vae_dataset import ImageVAEPreprocess
from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_image_vae import ImageVAEStage

torch.set_num_threads(1)

# The seed command's rates at a size that trains in seconds; the discriminator joins at step 2.
SMALL_RUN = """
    --config tiny --override image_size=32 --learning_rate 1e-4 --logging_steps 1 --eval_steps 1000 --save_steps 1000
    --perceptual_weight 0 --discriminator_channels 8 --gan_start_step 2 --gan_warmup_steps 2 --gan_ramp_steps 4
    --r1_weight 1 --r1_every 2 --lecam_weight 0.01 --diff_augment color --use_spectral_norm
    --latent_statistics_samples 16""".split()  # noqa: SIM905

# Latents of 16 x 4 x 4 and a UNet that trains in seconds.
SMALL_DIFFUSION = """
    --config tiny --override widths=[32,64] n_blocks=[1,1] conditioning_width=64 text_width=32
    --learning_rate 1e-3 --logging_steps 1 --eval_steps 1000 --save_steps 1000 --n_steps 2 --n_prompts 2
    --n_time_buckets 2 --eval_pictures 0""".split()  # noqa: SIM905


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


@pytest.fixture(scope="session")
def latent_cache(picture_cache, tmp_path_factory) -> Path:
    """Latents and captions of 72 coloured squares, by an untrained VAE that lies beside them."""
    folder = tmp_path_factory.mktemp("latents")
    raw = write_captioned_pictures(folder / "raw", 72)
    make_latents(raw, save_vae(folder / "vae", picture_cache), folder / "image_diffusion", "--horizontal_flip")
    return folder / "image_diffusion"


def run_stage(
    stage: type, common: list[str], cache: Path, output_dir: Path, name: str, steps: int, *flags: str
) -> Run:
    """Run a stage in this process; errors come as they are.

    Of the flags in `common`, those of the adversary are left out where `flags` have `--gan_weight 0`, and a run of one
    or two steps has its adversary from the beginning.
    """
    words = ["--cached_dataset", str(cache), "--output_dir", str(output_dir), "--run_name", name]
    if ("--gan_weight", "0") in itertools.pairwise(flags):
        common = without_adversary(common, stage)
    elif "--gan_start_step" in common and steps <= 2:
        common = [*common, "--gan_start_step", "0"]
    try:
        stage.main([*common, *words, "--max_steps", str(steps), *flags])
    except SystemExit as end:
        raise end.__cause__ or end from None
    return Run(output_dir / stage.name / name, steps)


def without_adversary(words: list[str], stage: type) -> list[str]:
    """The flags without those that need an adversary."""
    needs, kept, keeps = stage.arguments_class.needs, [], True
    for word in words:
        if word.startswith("--"):
            keeps = needs.get(word[2:], ("",))[0] != "gan_weight"
        kept += [word] if keeps else []
    return kept


@pytest.fixture
def fresh_logging():
    """Takes away what a stage's command line adds to the logging of this process."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def train(picture_cache, tmp_path, fresh_logging):
    """Runs the image VAE stage in this process: train("name", steps, *flags) -> Run."""
    return partial(run_stage, ImageVAEStage, SMALL_RUN, picture_cache, tmp_path)


@pytest.fixture
def train_diffusion(latent_cache, tmp_path, fresh_logging):
    """Runs the text-to-image stage in this process, as `train` does the image VAE."""
    return partial(run_stage, ImageDiffusionStage, SMALL_DIFFUSION, latent_cache, tmp_path)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two state dicts with the same names."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def relative_distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two state dicts with the same names, over the norm of the first."""
    assert first.keys() == second.keys()
    one, two = (torch.cat([each[name].double().flatten() for name in first]) for each in (first, second))
    return ((one - two).norm() / one.norm()).item()
