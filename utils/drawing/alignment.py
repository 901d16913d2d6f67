"""Images of durations: log-mels with the boundaries of tokens, predicted against real durations.  M mel bins, F mel
frames, T tokens."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from utils.drawing.audio import ORANGE, colored, fit_width, strip_sheet
from utils.drawing.images import Group

MAX_DURATION = 40  # mel frames; longer ones are drawn there
CELL = 8  # pixels of one mel frame in the plot of durations
BOUNDARY = (255, 255, 255)


def aligned_mel(mel: Tensor, durations: Tensor, log_floor: float, *, max_frames: int = 0) -> Image.Image:
    """A log-mel with a line at the end of every token that has a frame.

    Args:
        mel: (M, F), low frequencies at the bottom.
        durations: mel frames of tokens, (T,).
        max_frames: frames of the longest clip on the sheet, see `fit_width`.
    """
    n_frames = mel.shape[1]
    high = max(mel.nan_to_num(log_floor, log_floor, log_floor).max().item(), log_floor + 1)
    image = fit_width(colored(mel, log_floor, high), n_frames, max(len(mel), 80), max_frames=max_frames)
    draw = ImageDraw.Draw(image)
    for end in durations.cumsum(0)[durations > 0].tolist()[:-1]:
        x = round(end / n_frames * image.width)
        draw.line([(x, 0), (x, image.height // 6)], BOUNDARY)
    return image


def duration_image(real: Tensor, predicted: Tensor) -> Image.Image:
    """How many tokens have which real (to the right) and predicted (upwards) duration, both (T,) mel frames."""
    pairs = torch.stack([predicted, real]).long().clamp(0, MAX_DURATION)
    size = MAX_DURATION + 1
    counts = torch.bincount(pairs[0] * size + pairs[1], minlength=size * size).view(size, size)
    # Logarithms, so that rare durations are seen beside frequent ones.
    image = colored(counts.float().log1p(), 0, counts.max().float().log1p().item())
    image = image.resize((size * CELL, size * CELL), Image.Resampling.NEAREST)
    ImageDraw.Draw(image).line([(0, image.height), (image.width, 0)], ORANGE)
    error = (predicted.float() - real.float()).abs().mean().item()
    return strip_sheet([Group([image], "real (right) and predicted (up) mel frames")], title=f"mean error {error:.2f}")
