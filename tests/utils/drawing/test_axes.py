"""Axes of log-mels: where their ticks are."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.audio.spectral import LogMel, MelSettings
from utils.drawing.axes import BELOW, FREQUENCIES, LEFT, with_axes
from utils.drawing.text import INK


@pytest.mark.parametrize("settings", [MelSettings(), MelSettings(sample_rate=44100, f_min=40.0, f_max=16500.0)])
def test_frequencies_are_at_the_bins_that_hear_them(settings):
    image = with_axes(Image.new("RGB", (200, 800)), 100, settings)
    pixels = np.asarray(image)
    ticks = [y for y in range(800) if tuple(pixels[y, LEFT - 2]) == INK and tuple(pixels[y, LEFT - 4]) == INK]
    shown = [frequency for frequency in FREQUENCIES if frequency < settings.f_max]
    assert len(ticks) == len(shown)
    seconds = torch.arange(settings.sample_rate) / settings.sample_rate
    for y, frequency in zip(ticks, reversed(shown)):
        mel = LogMel(settings)(torch.sin(2 * torch.pi * frequency * seconds)[None])[0]
        loudest = mel.mean(1).argmax().item()
        assert abs((1 - y / 800) * settings.n_mels - (loudest + 0.5)) < 2


def test_seconds_are_at_their_frames():
    image = with_axes(Image.new("RGB", (400, 80)), 125, MelSettings())  # 125 frames of 256 samples: 2 s.
    assert image.size == (400 + LEFT, 80 + BELOW)
    row = np.asarray(image)[81]
    ticks = [x - LEFT for x in range(image.width) if tuple(row[x]) == INK]
    assert ticks == [0, 40, 80, 120, 160, 200, 240, 280, 320, 360, 399]
