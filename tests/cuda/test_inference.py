"""What is generated on a GPU equals what a CPU generates, in fp32; bf16 runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.helpers.audio_cache import make_audio_cache
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint, small_vocoder, write_sound

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU"),
]


def run_both(tmp_path: Path, script: str, *words: str) -> tuple[Path, Path]:
    """Run a script on the CPU and on the GPU at the same time; returns both output folders."""
    folders = tmp_path / "cpu", tmp_path / "gpu"
    processes = []
    for folder in folders:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if folder.name == "cpu" else {}
        environment = {**os.environ, **hidden, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, script, *words, "--output_dir", str(folder)]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in processes:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text[-6000:]
    return folders


def pixel_difference(cpu: Path, gpu: Path, pattern: str) -> float:
    """The largest mean difference of two images of the same name, in levels of 255."""
    names = [file.name for file in sorted(cpu.rglob(pattern))]
    assert names and names == [file.name for file in sorted(gpu.rglob(pattern))]
    pairs = zip(sorted(cpu.rglob(pattern)), sorted(gpu.rglob(pattern)))
    arrays = [[np.asarray(Image.open(file)).astype(float) for file in pair] for pair in pairs]
    return max(np.abs(one - two).mean() for one, two in arrays)


def test_text_to_image(latent_cache, tmp_path):
    save_diffusion_checkpoint(tmp_path / "runs", latent_cache)
    words = ["--checkpoint", str(tmp_path / "runs"), "--prompts", "a red disc", "zwei", "--n_steps", "6"]
    cpu, gpu = run_both(tmp_path, "inference/text_to_image.py", *words)
    assert pixel_difference(cpu, gpu, "*.png") <= 0.1


def test_reconstruct_image(image_cache, image_folder, tmp_path):
    save_checkpoint(tmp_path / "runs", image_cache)
    words = ["--checkpoint", str(tmp_path / "runs"), "--input", str(image_folder / "000.png")]
    cpu, gpu = run_both(tmp_path, "inference/reconstruct_image.py", *words)
    assert pixel_difference(cpu, gpu, "*.png") <= 0.1


def test_vocode(tmp_path):
    save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "runs")
    write_sound(tmp_path / "sound.wav")
    words = ["--checkpoint", str(tmp_path / "runs"), "--input", str(tmp_path / "sound.wav")]
    cpu, gpu = run_both(tmp_path, "inference/vocode.py", *words)
    (one,), (two,) = ([soundfile.read(file)[0] for file in sorted(folder.rglob("*.wav"))] for folder in (cpu, gpu))
    assert one.shape == two.shape and np.abs(one - two).max() <= 2e-3
    run_both(tmp_path / "bf16", "inference/vocode.py", *words, "--bf16")


@pytest.mark.parametrize("preset", ["tiny", "recurrent-tiny"])
def test_generate_text(preset, tmp_path):
    save_text_checkpoint(tmp_path / "runs", make_text(tmp_path / "cache"), preset, spread=0.3)
    words = [
        "--checkpoint",
        str(tmp_path / "runs"),
        "--prompts",
        "the tensor",
        "a list of bears",
        "--temperature",
        "0",
    ]
    cpu, gpu = run_both(tmp_path, "inference/generate_text.py", *words, "--max_new_tokens", "24")
    one, two = ([file.read_text() for file in sorted(folder.rglob("*.txt"))] for folder in (cpu, gpu))
    assert one == two and one


def evaluated(tmp_path: Path, *words: str) -> tuple[dict, dict]:
    """metrics.json of both devices."""
    folders = run_both(tmp_path, "evaluate.py", "--checkpoint", str(tmp_path / "runs"), *words)
    cpu, gpu = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert gpu["device"] != "cpu" == cpu["device"]
    return cpu, gpu


def test_evaluation_of_an_image_vae(image_cache, tmp_path):
    save_checkpoint(tmp_path / "runs", image_cache)
    cpu, gpu = evaluated(tmp_path, "--cached_dataset", str(image_cache))
    assert gpu["scores"]["model"]["psnr_db"] == pytest.approx(cpu["scores"]["model"]["psnr_db"], rel=1e-3)


def test_evaluation_of_a_diffusion_model(latent_cache, tmp_path):
    save_diffusion_checkpoint(tmp_path / "runs", latent_cache)
    evaluated(tmp_path, "--cached_dataset", str(latent_cache), "--n_steps", "4")


def test_evaluation_of_a_text_model(tmp_path):
    cache = make_text(tmp_path / "cache")
    save_text_checkpoint(tmp_path / "runs", cache, "recurrent-tiny")
    cpu, gpu = evaluated(tmp_path, "--cached_dataset", str(cache))
    assert gpu["scores"]["model"]["loss"] == pytest.approx(cpu["scores"]["model"]["loss"], rel=1e-4)


def test_an_audio_cache_on_a_machine_with_a_gpu(tmp_path):
    assert (make_audio_cache(tmp_path / "cache", 12) / "manifest.json").exists()
