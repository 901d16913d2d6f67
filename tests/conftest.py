"""Shared fixtures: small real images on disk, their cache, and a stage run in this process."""

import gc
import logging
import multiprocessing
import os
import signal
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
from PIL import Image, ImageDraw

from preprocess_image_vae_dataset import ImageVAEPreprocess
from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_image_vae import ImageVAEStage
from tests.helpers.latent_cache import make_latents, save_vae, write_captioned_images
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_RUN, run_stage

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections, which every training starts with: 0.4 s each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """End what a test that ran out of time has left, since Python waits for its child processes at its end. Loading
    processes of a dataset that is still referred to are among them, and their end is no error here: torch's handler
    of ended children would make one of it."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """72 drawings of 40 x 40 pixels: coloured discs and bars, no two alike."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(72):
        red, green, blue, x, y, r = torch.randint(5, 35, (6,), generator=generator).tolist()
        image = Image.new("RGB", (40, 40), (255, 255, 255))
        draw = ImageDraw.Draw(image)
        draw.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=(red * 7, green * 7, blue * 7))
        draw.rectangle((x // 2, y, x, y + 4), fill=(blue * 7, red * 7, green * 7))
        image.save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def image_cache(image_folder, tmp_path_factory) -> Path:
    """The images preprocessed at 32 px."""
    cache = tmp_path_factory.mktemp("caches") / "image_vae"
    words = ["--dataset_name", str(image_folder), "--output_dir", str(cache), "--image_size", "32"]
    ImageVAEPreprocess.main([*words, "--validation_fraction", "0.1", "--num_workers", "0"])
    return cache


@pytest.fixture(scope="session")
def latent_cache(image_cache, tmp_path_factory) -> Path:
    """Latents and captions of 72 coloured squares, by an untrained VAE that lies beside them."""
    folder = tmp_path_factory.mktemp("latents")
    raw = write_captioned_images(folder / "raw", 72)
    make_latents(raw, save_vae(folder / "vae", image_cache), folder / "image_diffusion", "--horizontal_flip")
    return folder / "image_diffusion"


@pytest.fixture
def fresh_logging():
    """Takes away what a stage's command line adds to the logging of this process."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def train(image_cache, tmp_path, fresh_logging):
    """Runs the image VAE stage in this process: train("name", steps, *flags) -> Run."""
    return partial(run_stage, ImageVAEStage, SMALL_RUN, image_cache, tmp_path)


@pytest.fixture
def train_diffusion(latent_cache, tmp_path, fresh_logging):
    """Runs the text-to-image stage in this process, as `train` does the image VAE."""
    return partial(run_stage, ImageDiffusionStage, SMALL_DIFFUSION, latent_cache, tmp_path)
