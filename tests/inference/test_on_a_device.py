"""What is generated and measured on a device of its own equals the CPU's: no tensor stays on the wrong side."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
from PIL import Image

import evaluate
from inference import generate_text, reconstruct_audio, reconstruct_image, text_to_image, vocode
from model.audio.vae import AudioVAE, AudioVAEConfig
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.stand_in_device import DEVICE, stand_in_device
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.vocoder_checkpoint import SMALL_MEL, save_stage_checkpoint, small_vocoder, write_sound
from utils.command_line import parse_arguments
from utils.evaluation import evaluator
from utils.generation import audio
from utils.generation import image as image_generation
from utils.generation import text_to_image as image_drawing

MODULES = (generate_text, image_generation, image_drawing, audio, evaluator)


@contextlib.contextmanager
def on_the_device():
    """Where scripts choose their device, they take the stand-in."""
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "compute_device", lambda: DEVICE))
        yield stack.enter_context(stand_in_device())


def run_both(tmp_path: Path, script: Callable, kind: type, *words: str) -> tuple[Path, Path]:
    """The output folders of a script on the CPU and on the device."""
    folders = tmp_path / "cpu", tmp_path / "device"
    for folder, place in zip(folders, (contextlib.nullcontext, on_the_device)):
        with place() as notes:
            script(parse_arguments(kind, [*words, "--output_dir", str(folder)], ""))
        assert notes is None or notes  # Something came back from the device.
    return folders


def arrays(folder: Path, pattern: str, read: Callable) -> list[np.ndarray]:
    files = sorted(folder.rglob(pattern))
    assert files
    return [np.asarray(read(file), dtype=float) for file in files]


def assert_close(folders: tuple[Path, Path], pattern: str, read: Callable, *, tolerance: float) -> None:
    """Files of one name are equal but for rounding, on average."""
    for one, other in zip(*(arrays(folder, pattern, read) for folder in folders), strict=True):
        assert one.shape == other.shape and np.abs(one - other).mean() <= tolerance


@pytest.mark.parametrize("preset", [pytest.param("tiny", marks=pytest.mark.slow), "recurrent-tiny"])
def test_generate_text(preset, tmp_path):
    save_text_checkpoint(tmp_path / "runs", make_text(tmp_path / "cache"), preset, spread=0.3)
    words = ["--checkpoint", str(tmp_path / "runs"), "--prompts", "the tensor", "a list", "--max_new_tokens", "6"]
    folders = run_both(tmp_path, generate_text.generate, generate_text.GenerateTextArguments, *words)
    one, other = ([file.read_text() for file in sorted(folder.rglob("*.txt"))] for folder in folders)
    assert one == other and one


@pytest.mark.slow
def test_images(image_cache, latent_cache, image_folder, tmp_path):
    save_checkpoint(tmp_path / "vae", image_cache)
    words = ["--checkpoint", str(tmp_path / "vae"), "--input", str(image_folder / "000.png")]
    kind = reconstruct_image.ReconstructionArguments
    folders = run_both(tmp_path / "reconstructed", reconstruct_image.reconstruct, kind, *words)
    assert_close(folders, "*.png", Image.open, tolerance=0.1)
    save_diffusion_checkpoint(tmp_path / "runs", latent_cache)
    for sampler in ("dpmpp_2m", "ddpm"):
        words = ["--checkpoint", str(tmp_path / "runs"), "--prompts", "a red disc", "zwei", "--n_steps", "2"]
        words += ["--sampler", sampler]
        folders = run_both(tmp_path / sampler, text_to_image.generate, text_to_image.TextToImageArguments, *words)
        assert_close(folders, "*.png", Image.open, tolerance=0.1)


def test_sounds(tmp_path):
    save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "vocoder")
    config = AudioVAEConfig(**SMALL_MEL.as_dict(), width=16, latent_channels=4, n_encoder_blocks=1, n_decoder_blocks=1)
    save_stage_checkpoint(AudioVAE(config), "audio_vae", tmp_path / "vae")
    write_sound(tmp_path / "sound.wav")
    words = ["--checkpoint", str(tmp_path / "vocoder"), "--input", str(tmp_path / "sound.wav")]
    folders = run_both(tmp_path / "vocoded", vocode.vocode, vocode.VocodeArguments, *words)
    assert_close(folders, "*.wav", lambda file: soundfile.read(file)[0], tolerance=1e-3)
    words = ["--vae_checkpoint", str(tmp_path / "vae"), "--vocoder_checkpoint", str(tmp_path / "vocoder"), *words[2:]]
    kind = reconstruct_audio.ReconstructionArguments
    folders = run_both(tmp_path / "reconstructed", reconstruct_audio.reconstruct, kind, *words)
    assert_close(folders, "*.wav", lambda file: soundfile.read(file)[0], tolerance=1e-3)


def evaluated(tmp_path: Path, *words: str) -> list[dict]:
    """The scores of both devices."""
    words = ("--checkpoint", str(tmp_path / "runs"), *words)
    folders = run_both(tmp_path, evaluate.evaluate, evaluate.EvaluateArguments, *words)
    return [json.loads((folder / "metrics.json").read_text())["scores"]["model"] for folder in folders]


@pytest.mark.slow
def test_evaluation_of_an_image_vae(image_cache, tmp_path):
    save_checkpoint(tmp_path / "runs", image_cache)
    one, other = evaluated(tmp_path, "--cached_dataset", str(image_cache))
    assert one["psnr_db"] == pytest.approx(other["psnr_db"], rel=1e-4) and one.keys() == other.keys()


@pytest.mark.slow
def test_evaluation_of_a_text_model(tmp_path):
    cache = make_text(tmp_path / "cache")
    save_text_checkpoint(tmp_path / "runs", cache, "recurrent-tiny")
    one, other = evaluated(tmp_path, "--cached_dataset", str(cache))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one.keys() == other.keys()
