"""Small real caches of audio: speech-like clips as files, preprocessed, and faulty clips."""

import csv
import json
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from dataset_loading.audio.cached import VocoderDataset
from dataset_loading.cache_writer import save_tensors
from dataset_loading.files import MANIFEST, replace_file
from model.audio.spectral import LogMel, MelSettings
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from tests.helpers.runs import changed

# A vocoder that trains in seconds; the discriminator joins at step 2 and is updated every other step.
SMALL_VOCODER = """
    --config tiny --override width=32 n_layers=1 --segment_frames 8 --logging_steps 1 --eval_steps 1000
    --save_steps 1000 --gan_start_step 2 --gan_warmup_steps 1 --gan_ramp_steps 4 --stft_resolutions 256 1024
    --discriminator_periods 2 5 --discriminator_resolutions 256 --discriminator_every 2
    --n_logged_samples 0""".split()  # noqa: SIM905

SPEAKERS = ("ann", "bob")


def gliding_tone(n_samples: int, f0: float, generator: torch.Generator, *, sample_rate: int = 16000) -> Tensor:
    """A gliding harmonic tone with pauses and breath, (n_samples,) in [-1, 1]."""
    seconds = torch.arange(n_samples, dtype=torch.float64) / sample_rate
    glide = 1 + 0.2 * torch.sin(2 * torch.pi * 1.5 * seconds)
    phase = 2 * torch.pi * (f0 * glide / sample_rate).cumsum(0)
    tone = sum(torch.sin(k * phase) / k for k in range(1, int(0.45 * sample_rate / (1.2 * f0))))
    loudness = torch.sin(2 * torch.pi * 2.3 * seconds).clamp_min(0)
    breath = 0.02 * torch.randn(n_samples, generator=generator, dtype=torch.float64)
    return (0.25 * tone * loudness + breath * (1.1 - loudness)).clamp(-1, 1).float()


def write_clips(folder: Path, count: int, sample_rate: int = 16000) -> Path:
    """`count` WAV files of 0.3 to 1 second by two speakers, with transcripts in metadata.csv."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "transcription", "speaker"])
        for number in range(count):
            n_samples = int(sample_rate * (0.3 + 0.7 * (number * 7 % count) / count))
            waveform = gliding_tone(n_samples, 90 + 160 * number / count, generator, sample_rate=sample_rate)
            soundfile.write(folder / f"{number:03}.wav", waveform.numpy(), sample_rate)
            rows.writerow([f"{number:03}.wav", f"clip {number}", SPEAKERS[number % len(SPEAKERS)]])
    return folder


def make_audio_cache(out: Path, count: int = 36, *flags: str) -> Path:
    """Write and preprocess `count` clips for vocoders, a sixth of them or so for validation."""
    raw = write_clips(out.parent / f"{out.name}_raw", count)
    words = ["--dataset_name", str(raw), "--output_dir", str(out), "--num_workers", "0"]
    AudioVocoderPreprocess.main(changed([*words, "--validation_fraction", "0.15"], *flags))
    return out


def spoil(cache: Path, n_frames: int = 3) -> Path:
    """Overwrite training clips with ones that are silent, clipped, constant, a click, and clipped with `n_frames`
    frames."""
    dataset = VocoderDataset(cache, "train")
    settings: MelSettings = dataset.mel
    n_samples = 40 * settings.hop_length
    click = torch.zeros(n_samples)
    click[n_samples // 2] = 1.0
    square = torch.sin(torch.arange(n_samples) * 0.05).sign()
    bad = [
        torch.zeros(n_samples),
        square,
        torch.full((n_samples,), 0.5),
        click,
        square[: n_frames * settings.hop_length],
    ]
    for entry, waveform in zip(dataset.entries, 2 * bad):
        sample = {"mel": LogMel(settings)(waveform[None])[0], "waveform": waveform}
        entry |= {**save_tensors(cache / "train" / f"{entry['key']}.pt", sample), "length": sample["mel"].shape[1]}
    replace_file(cache / MANIFEST, json.dumps(dataset.manifest).encode())
    return cache
