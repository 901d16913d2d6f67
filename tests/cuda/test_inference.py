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

from model.audio.vae import AudioVAE, AudioVAEConfig
from pretrain_audio_diffusion import AudioDiffusionStage
from tests.helpers.audio_cache import make_audio_cache
from tests.helpers.audio_latent_cache import SETTINGS, SMALL_SPEECH, make_speech
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import run_stage
from tests.helpers.stream_caches import SMALL_STREAMS, make_stream_caches
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.vocoder_checkpoint import (
    SMALL_MEL,
    SMALL_VOCODER,
    save_stage_checkpoint,
    small_vocoder,
    write_sound,
)
from utils.training.streams.stage import MultimodalStreamStage

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


def wave_difference(cpu: Path, gpu: Path) -> float:
    """The largest difference of the samples of two sounds of the same name."""
    pairs = list(zip(sorted(cpu.rglob("*.wav")), sorted(gpu.rglob("*.wav")), strict=True))
    assert pairs and all(one.name == two.name for one, two in pairs)
    waves = [[soundfile.read(file)[0] for file in pair] for pair in pairs]
    assert all(one.shape == two.shape for one, two in waves)
    return max(np.abs(one - two).max() for one, two in waves)


def test_reconstruct_audio(tmp_path):
    config = AudioVAEConfig(**SMALL_MEL.as_dict(), width=16, latent_channels=4, n_encoder_blocks=1, n_decoder_blocks=1)
    save_stage_checkpoint(AudioVAE(config).eval(), "audio_vae", tmp_path / "vae")
    save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "vocoder")
    write_sound(tmp_path / "sound.wav")
    words = ["--vae_checkpoint", str(tmp_path / "vae"), "--vocoder_checkpoint", str(tmp_path / "vocoder")]
    words += ["--input", str(tmp_path / "sound.wav")]
    assert wave_difference(*run_both(tmp_path, "inference/reconstruct_audio.py", *words)) <= 2e-3


def test_text_to_speech(tmp_path, fresh_logging):
    run = run_stage(AudioDiffusionStage, SMALL_SPEECH, make_speech(tmp_path / "speech"), tmp_path / "runs", "run", 2)
    vocoder = small_vocoder(**SETTINGS.as_dict(), **SMALL_VOCODER)  # Griffin-Lim scales rounding errors up.
    words = ["--vocoder_checkpoint", str(save_stage_checkpoint(vocoder, "vocoder", tmp_path / "vocoder"))]
    words += ["--checkpoint", str(run.folder), "--text", "the number is four", "--speaker", "ann"]
    assert wave_difference(*run_both(tmp_path, "inference/text_to_speech.py", *words)) <= 1e-2


def test_chat(tmp_path, fresh_logging):
    """Whole sequences differ where a token's logits are close; their kinds and files do not."""
    caches = make_stream_caches(tmp_path / "caches")
    common = [*SMALL_STREAMS, "--batch_size", "4", *caches]
    run = run_stage(MultimodalStreamStage, common, None, tmp_path / "runs", "run", 1)
    words = ["--checkpoint", str(run.folder), "--draw", "a red bear", "--speak", "a fish", "--max_new_tokens", "3"]
    cpu, gpu = run_both(tmp_path, "inference/chat.py", *words)
    assert pixel_difference(cpu, gpu, "*.png") <= 1
    assert [file.name for file in sorted(cpu.rglob("*.wav"))] == [file.name for file in sorted(gpu.rglob("*.wav"))]


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
