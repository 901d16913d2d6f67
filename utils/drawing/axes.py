"""Axes of log-mels: seconds from left to right, Hz from bottom to top.  M mel bins, F frames."""

import math

from PIL import Image, ImageDraw

from model.audio.spectral import MelSettings
from utils.drawing.images import PAPER
from utils.drawing.text import INK, typeface

LEFT, BOTTOM, RIGHT = 44, 18, 16  # pixels of the labels beside and below a log-mel, and of half of the last label
TICK, SIZE = 3, 11  # pixels: length of a tick, height of a label
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)  # seconds between two labels
WIDTH = 44  # pixels between two labels of time, at least
FREQUENCIES = (250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz


def slaney_mel(frequency: float) -> float:
    """Slaney's mel scale (Auditory Toolbox, 1998) of a frequency in Hz: linear below 1 kHz, logarithmic above."""
    return frequency * 3 / 200 if frequency < 1000 else 15 + 27 * math.log(frequency / 1000) / math.log(6.4)


def mel_row(frequency: float, settings: MelSettings) -> float:
    """The mel bin, 0 to M - 1, whose filter has its maximum at a frequency in Hz; between bins a fraction."""
    low, high = slaney_mel(settings.f_min), slaney_mel(settings.f_max)
    return (slaney_mel(frequency) - low) / (high - low) * (settings.n_mels + 1) - 1


def with_axes(image: Image.Image, n_frames: int, settings: MelSettings) -> Image.Image:
    """A log-mel with labelled ticks of Hz to its left and of seconds below; its top left corner is at (LEFT, 0).

    Args:
        image: of a log-mel (M, F), low frequencies at the bottom.
        n_frames: F.
        settings: of the log-mel.
    """
    framed = Image.new("RGB", (LEFT + image.width + RIGHT, image.height + BOTTOM), PAPER)
    framed.paste(image, (LEFT, 0))
    draw, font = ImageDraw.Draw(framed), typeface(SIZE).fonts[0]
    # Frequencies from below, without those whose labels would touch the one before.
    last = math.inf
    for frequency in FREQUENCIES:
        row = mel_row(frequency, settings)
        y = image.height * (1 - (row + 0.5) / settings.n_mels)
        if not (0 <= row <= settings.n_mels - 1 and SIZE / 2 <= y <= last - SIZE - 1):
            continue
        last = y
        draw.line([(LEFT - TICK, round(y)), (LEFT - 1, round(y))], INK)
        name = f"{frequency} Hz" if frequency < 1000 else f"{frequency // 1000} kHz"
        draw.text((LEFT - TICK - 2, y), name, INK, font, anchor="rm")
    # Seconds, as often as there is room.
    seconds = n_frames * settings.hop_length / settings.sample_rate
    pixels = image.width / seconds  # per second
    step = next((step for step in STEPS if step * pixels >= WIDTH), math.inf)
    for number in range(math.floor(seconds / step) + 1):
        x = LEFT + round(number * step * pixels) if number else LEFT
        draw.line([(x, image.height), (x, image.height + TICK)], INK)
        name = f"{number * step:.3g} s" if number else "0 s"
        draw.text((x, image.height + TICK + 1), name, INK, font, anchor="ma")
    return framed
