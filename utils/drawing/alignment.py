"""Images of durations: log-mels with the boundaries of tokens, predicted against real durations.  M mel bins, F mel
frames, T tokens."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model.audio.spectral import MelSettings
from utils.drawing.audio import ORANGE, colored, fit_width, strip_sheet
from utils.drawing.axes import with_axes
from utils.drawing.images import PAPER, Group
from utils.drawing.text import INK, typeface

MAX_DURATION = 40  # mel frames; longer ones are drawn there
PLOT, MARGIN = 328, 24  # pixels of the plot of durations, and of the numbers beside it
BOUNDARY = (255, 255, 255)
MARKS = "white marks: ends of phones"  # what a sheet of `aligned_mel` says


def aligned_mel(mel: Tensor, durations: Tensor, settings: MelSettings, *, max_frames: int = 0) -> Image.Image:
    """A log-mel with a line at the end of every token that has a frame, and the axes of `with_axes`.

    Args:
        mel: (M, F), low frequencies at the bottom.
        durations: mel frames of tokens, (T,).
        settings: of the log-mel.
        max_frames: frames of the longest clip on the sheet, see `fit_width`.
    """
    n_frames, log_floor = mel.shape[1], settings.log_floor
    high = max(mel.nan_to_num(log_floor, log_floor, log_floor).max().item(), log_floor + 1)
    image = fit_width(colored(mel, log_floor, high), n_frames, max(len(mel), 80), max_frames=max_frames)
    draw = ImageDraw.Draw(image)
    for end in durations.cumsum(0)[durations > 0].tolist()[:-1]:
        x = round(end / n_frames * image.width)
        draw.line([(x, 0), (x, image.height // 6)], BOUNDARY)
    return with_axes(image, n_frames, settings)


def duration_image(real: Tensor, predicted: Tensor) -> Image.Image:
    """How many tokens have which real (to the right) and predicted (upwards) duration, both (T,) mel frames."""
    pairs = torch.stack([predicted, real]).long().clamp_min(0)
    # Both axes reach as far as the longest duration; the last cell holds longer ones, too.
    longest = int(pairs.max())
    size = min(longest, MAX_DURATION) + 1
    pairs = pairs.clamp_max(size - 1)
    counts = torch.bincount(pairs[0] * size + pairs[1], minlength=size * size).view(size, size)
    # Logarithms, so that rare durations are seen beside frequent ones.
    cell = max(1, PLOT // size)
    plot = colored(counts.float().log1p(), 0, counts.max().float().log1p().item())
    plot = plot.resize((size * cell, size * cell), Image.Resampling.NEAREST)
    ImageDraw.Draw(plot).line([(0, plot.height), (plot.width, 0)], ORANGE)
    # Numbers below and to the left.
    image = Image.new("RGB", (plot.width + MARGIN, plot.height + MARGIN), PAPER)
    image.paste(plot, (MARGIN, 0))
    draw, font = ImageDraw.Draw(image), typeface(11).fonts[0]
    for number in range(0, size, 1 if size <= 10 else 5):
        center, text = (number + 0.5) * cell, f"{number}+" if number < longest and number == size - 1 else str(number)
        draw.text((MARGIN + center, plot.height + 4), text, INK, font, anchor="ma")
        draw.text((MARGIN - 4, plot.height - center), text, INK, font, anchor="rm")
    error = (predicted.float() - real.float()).abs().mean().item()
    title = f"{len(real)} tokens, mean error {error:.2f} mel frames"
    return strip_sheet([Group([image], "mel frames: real (right), predicted (up)")], title=title)
