"""Checkpoints of small vocoders and audio VAEs without training, for what reads checkpoints, and files of sound."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from model.audio.spectral import MelSettings
from model.audio.vocoders import Vocoder, VocoderConfig
from utils.checkpoints import EMA, STAGE, mark_complete, provenance, write_json

SMALL_MEL = MelSettings(sample_rate=8000, n_fft=256, hop_length=64, n_mels=40, f_max=4000.0)
SMALL_VOCODER = {"width": 16, "n_layers": 2}
SMALL_HIFIGAN = {"architecture": "hifigan", "hifigan_width": 16, "hifigan_factors": [8, 8]}


def small_vocoder(**fields) -> Vocoder:
    """A vocoder whose last layer is not zero, as after training.

    Args: fields: of its configuration, instead of `SMALL_VOCODER`.
    """
    torch.manual_seed(0)
    vocoder = Vocoder(VocoderConfig(**{**SMALL_MEL.as_dict(), **(fields or SMALL_VOCODER)})).eval()
    for parameter in vocoder.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return vocoder


def save_stage_checkpoint(model: PreTrainedModel, stage: str, run_dir: Path, averaged: dict | None = None) -> Path:
    """Write `checkpoint-4` as a run of that stage does; `averaged` are the averaged weights, where there are any."""
    folder = run_dir / "checkpoint-4"
    model.save_pretrained(folder)
    if averaged is not None:
        save_file({name: value.contiguous() for name, value in averaged.items()}, folder / EMA)
    write_json(folder / STAGE, {"stage": stage, "preset": "tiny", "arguments": {}, "data": {}, **provenance()})
    mark_complete(folder)
    return folder


def write_sound(file: Path, seconds: float = 0.5, rate: int = 8000, n_channels: int = 1) -> np.ndarray:
    """A gliding tone; returns its samples (S, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 * time + 50 * time**2))
    samples = np.stack([tone * (1 + 0.2 * channel) for channel in range(n_channels)], axis=1)
    soundfile.write(file, samples, rate)
    return samples
