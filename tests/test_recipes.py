"""A recipe run from its first to its last line, with a few steps of every stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from dataset_loading.embedded.speech import build_speech

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("runs", "cached_datasets", "data", "generated", ".*")


@pytest.mark.slow
def test_audio_recipe_speaks_three_sentences(tmp_path):
    # A copy of the repository, since a recipe writes into its own.
    repository = shutil.copytree(ROOT, tmp_path / "repository", ignore=shutil.ignore_patterns(*OUTPUTS))
    build_speech(tmp_path / "speech", limit=48)
    steps = {f"{name}_STEPS": "3" for name in ("VOCODER", "VAE", "TUNING", "SPEECH")}
    sizes = {"SIZE": "tiny", "MEL": "16k", "BATCH": "2", "SEGMENT": "32", "FRAMES": "300", "DISCRIMINATOR": "thin"}
    starts = {"GAN_START": "1", "VAE_GAN_START": "1", "GAN_RAMP": "1", "EVERY": "2", "CLIPS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"DATASET": str(tmp_path / "speech/train"), "GPUS": "0", "PATH": path, **steps, **sizes, **starts}
    environment = {**os.environ, **variables}
    subprocess.run(["bash", "recipes/audio.sh"], cwd=repository, env=environment, check=True)
    runs = repository / "runs"
    waveforms = [soundfile.read(runs / f"audio_diffusion/voice/sentences/{number:03}.wav")[0] for number in range(3)]
    assert all(len(waveform) > 8000 and abs(waveform).max() > 0 for waveform in waveforms)
    record = json.loads((runs / "vocoder/voice_through_vae/checkpoint-3/stage.json").read_text())
    manifest = json.loads((repository / "cached_datasets/voice_through_vae/manifest.json").read_text())
    assert record["vae_fingerprint"] == manifest["settings"]["vae_fingerprint"] != ""
    assert record["arguments"]["init_from"] == "runs/vocoder/voice"
    scores = json.loads((runs / "vocoder/voice_through_vae/after_vae/metrics.json").read_text())
    assert "voice_through_vae" in scores["model"]["vocoder"]


@pytest.mark.parametrize("name", ["audio", "demo", "image", "multimodal", "text"])
def test_recipes_have_a_heading_per_stage_and_end_with_the_next_command(name):
    lines = (ROOT / "recipes" / f"{name}.sh").read_text().splitlines()
    headings = [number for number, line in enumerate(lines) if line.startswith("heading ")]
    stages = [number for number, line in enumerate(lines) if "pretrain_" in line and not line.startswith("#")]
    # Between two stages there is a heading, and one before the first.
    for first, second in zip([-1, *stages], stages):
        assert any(first < number < second for number in headings), lines[second]
    script = f". recipes/heading.sh; {next(line for line in lines if line.startswith('next ')).rstrip(chr(92))}"
    last = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert last.startswith("next: python inference/")
