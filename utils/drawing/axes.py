"""Axes of log-mels: seconds below, Hz to the left."""

import math

from PIL import Image, ImageDraw

from model.audio.spectral import MelSettings
from utils.drawing.images import PAPER
from utils.drawing.text import INK, typeface

LEFT, BELOW = 44, 16  # pixels beside and below a log-mel
FREQUENCIES = (250, 1000, 4000, 16000)  # Hz
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # seconds


def slaney_mel(frequency: float) -> float:
    """Hz to mel on Slaney's scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    return 3 * frequency / 200 if frequency < 1000 else 15 + 27 * math.log(frequency / 1000) / math.log(6.4)


def with_axes(image: Image.Image, n_frames: int, settings: MelSettings) -> Image.Image:
    """A log-mel, low frequencies at the bottom, with axes in seconds and Hz.

    Args:
        image: of `n_frames` frames, of any size.
        settings: of the log-mel.
    """
    framed = Image.new("RGB", (image.width + LEFT, image.height + BELOW), PAPER)
    framed.paste(image, (LEFT, 0))
    draw, font = ImageDraw.Draw(framed), typeface(10).fonts[0]
    # Frequencies: mel bins are equally spaced in mel.
    low, high = slaney_mel(settings.f_min), slaney_mel(settings.f_max)
    for frequency in FREQUENCIES:
        share = (slaney_mel(frequency) - low) / (high - low)
        if 0 < share < 1:
            y = round((1 - share) * image.height)
            draw.line([(LEFT - 4, y), (LEFT - 1, y)], INK)
            draw.text((LEFT - 6, y), f"{frequency} Hz", INK, font, anchor="rm")
    # Seconds, at least 40 pixels apart.
    seconds = max(n_frames, 1) * settings.hop_length / settings.sample_rate
    distance = next((tick for tick in TICKS if tick / seconds * image.width >= 40), TICKS[-1])
    for number in range(math.floor(seconds / distance) + 1):
        x = LEFT + min(round(number * distance / seconds * image.width), image.width - 1)
        draw.line([(x, image.height), (x, image.height + 3)], INK)
        if x + 20 <= framed.width:
            draw.text(
                (x, image.height + 4), f"{number * distance:g} s", INK, font, anchor="la" if not number else "ma"
            )
    return framed
