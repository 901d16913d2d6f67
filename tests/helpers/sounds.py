"""Tones, files of them, and noise."""

import io
import math

import soundfile
import torch

RATE = 16000


def tone(frequency, seconds=1.0, rate=RATE, *, amplitude=0.5):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate)).double() / rate).float()


def encoded(samples, rate=RATE, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def amplitude_at(waveform, frequency, rate=RATE):
    """Amplitude of one frequency, by projection on its cosine and sine."""
    phase = 2 * math.pi * frequency * torch.arange(len(waveform)) / rate
    return 2 * torch.complex(waveform * phase.cos(), waveform * phase.sin()).mean().abs().item()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
