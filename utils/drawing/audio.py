"""Images of audio: log-mels, waveforms, phase errors and latents, with time from left to right.

M mel bins, F frames, S samples, K frequency bins, Z latent channels, L latent frames.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model.audio.spectral import MelSettings, stft
from utils.drawing.axes import with_axes
from utils.drawing.images import GAP, LINE, PAPER, Group
from utils.drawing.text import typeface

TRIPLE = ("target", "predicted", "difference")
SPAN = 1.5  # nats: differences of log-mels from here on are white
MAX_WIDTH = 480  # pixels of one clip
AUDIBLE = 1e-3  # phases of bins below this share of the maximum magnitude are not drawn
# From dark blue over red to light yellow, with linearly increasing lightness.
WARM = (
    (4, 6, 30),
    (41, 19, 84),
    (96, 24, 114),
    (156, 42, 106),
    (211, 70, 82),
    (242, 117, 62),
    (252, 182, 78),
    (252, 252, 191),
)
# Diverging: blue is negative, grey zero, red positive.
SIGNED = ((33, 66, 140), (120, 160, 214), (240, 240, 240), (226, 140, 110), (160, 30, 40))
BLUE, ORANGE = (31, 88, 163), (221, 106, 28)


def colored(values: Tensor, low: float, high: float, *, palette: Sequence[tuple[int, int, int]] = WARM) -> Image.Image:
    """A matrix as an image with the first row at the bottom.

    Args:
        values: (rows, columns); NaN and negative infinity are drawn as `low`.
        low, high: the values of the first and the last colour of the palette.
    """
    values = torch.nan_to_num(values.detach().float().cpu(), low, high, low)
    position = ((values - low) / max(high - low, 1e-12)).clamp(0, 1).flip(0) * (len(palette) - 1)
    # Linear interpolation between the two nearest colours: (rows, columns, 3).
    colors = torch.tensor(palette, dtype=torch.float32)
    lower = position.floor().long().clamp_max(len(palette) - 2)
    mixed = torch.lerp(colors[lower], colors[lower + 1], (position - lower).unsqueeze(-1))
    return Image.fromarray(mixed.round().byte().numpy())


def fit_width(image: Image.Image, n_frames: int, height: int, *, max_frames: int = 0) -> Image.Image:
    """An image resized so that the longest clip of a sheet is `MAX_WIDTH` wide and all clips have the same time scale.

    Args: max_frames: frames of the longest clip; 0: those of this one.
    """
    # A frame is at most 4 pixels wide.
    width = max(1, round(n_frames * min(MAX_WIDTH / max(max_frames, n_frames), 4)))
    is_larger = width >= image.width and height >= image.height
    return image.resize((width, height), Image.Resampling.NEAREST if is_larger else Image.Resampling.BOX)


def mel_triple(generated: Tensor, target: Tensor, settings: MelSettings, *, max_frames: int = 0) -> list[Image.Image]:
    """Target, generated log-mel and their absolute difference, see `TRIPLE`, with the axes of `with_axes`.

    The first two have the same scale, from the floor to the maximum of the target. The difference is white from
    `SPAN` on.

    Args:
        generated, target: (M, F); frames beyond the shorter one are left out.
        settings: of the log-mels.
        max_frames: frames of the longest clip on the sheet, see `fit_width`.
    """
    generated, target = generated.detach().float().cpu(), target.detach().float().cpu()
    M, F = len(target), min(generated.shape[1], target.shape[1])
    generated, target = generated[:, :F], target[:, :F]
    low = settings.log_floor
    high = max(target.max().item(), low + 1)
    images = [colored(mel, low, high) for mel in (target, generated)]
    images.append(colored((target - generated).abs(), 0, SPAN))
    images = [fit_width(image, F, max(M, 80), max_frames=max_frames) for image in images]
    return [with_axes(image, F, settings) for image in images]


def strip_sheet(groups: Sequence[Group], labels: Sequence[str] = (), *, title: str = "") -> Image.Image:
    """Rows of images of any aspect ratio: a row per group with its caption below, columns aligned.

    Args:
        groups: each with as many images as the first one.
        labels: one per image of a group, above the first row.
        title: one line at the top.
    """
    assert groups and all(len(group.images) == len(groups[0].images) for group in groups), "unequal groups"
    # Layout: widths of the columns, heights of the rows.
    font = typeface(13)
    widths = [max(image.width for image in column) for column in zip(*(group.images for group in groups))]
    lefts = [GAP + sum(widths[:i]) + i * GAP for i in range(len(widths))]
    heights = [max(image.height for image in group.images) + GAP + LINE * bool(group.caption) for group in groups]
    top = GAP + LINE * bool(title) + LINE * bool(labels)
    sheet = Image.new("RGB", (max(lefts[-1] + widths[-1] + GAP, 240), top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    # Title and column labels, then one row per group.
    if title:
        font.draw(draw, (GAP, GAP), title, width=sheet.width - 2 * GAP)
    for left, width, label in zip(lefts, widths, labels):
        font.draw(draw, (left, top - LINE), label, width=width)
    for group, height in zip(groups, heights):
        for left, image in zip(lefts, group.images):
            sheet.paste(image, (left, top))
        if group.caption:
            font.draw(draw, (GAP, top + height - GAP - LINE), group.caption, width=sheet.width - 2 * GAP)
        top += height
    return sheet


def waveform_image(waveforms: Mapping[str, Tensor], rate: int, height: int = 96) -> Image.Image:
    """Waveforms below each other with common axes. Each column of pixels shows the range of its samples.

    Args:
        waveforms: label -> (S,).
        rate: Hz.
        height: pixels per waveform.
    """
    # Common axes: the longest waveform and the maximum level.
    waveforms = {label: waveform.detach().float().cpu().nan_to_num() for label, waveform in waveforms.items()}
    length = max(len(waveform) for waveform in waveforms.values())
    peak = max(max(waveform.abs().max().item() for waveform in waveforms.values()), 1e-4)
    groups = []
    for color, (label, waveform) in zip((BLUE, ORANGE) * len(waveforms), waveforms.items()):
        padded = torch.zeros(length)
        padded[: len(waveform)] = waveform
        # (S,) -> (MAX_WIDTH, samples per column); pixels between minimum and maximum of a column are coloured.
        columns = torch.nn.functional.pad(padded, (0, -length % MAX_WIDTH)).view(MAX_WIDTH, -1)
        middle = height / 2
        tops = (middle - columns.amax(1) / peak * (middle - 1)).round().int().numpy()
        ends = (middle - columns.amin(1) / peak * (middle - 1)).round().int().numpy()
        rows = np.arange(height)[:, None]
        pixels = np.full((height, MAX_WIDTH, 3), 255, np.uint8)
        pixels[(rows >= tops) & (rows <= ends)] = color
        groups.append(Group([Image.fromarray(pixels)], label))
    return strip_sheet(groups, title=f"{length / rate:.2f} s, full scale {peak:.3f}")


def phase_errors(generated: Tensor, target: Tensor, *, n_fft: int, hop_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of the phases of a generated waveform.

    Args: generated, target: (S,).
    Returns:
        phase: |difference| of the phases, wrapped, (K, F) in [0, pi].
        frequency: |difference| of the phase increments between frames, wrapped, (K, F), 0 in the first frame. It is
            invariant to a constant phase offset.
        weight: magnitude of the target divided by its maximum, (K, F).
    """
    length = min(len(generated), len(target))
    window = torch.hann_window(n_fft)
    estimate, truth = (
        stft(waveform[None, :length].detach().float().cpu(), window, hop_length)[0] for waveform in (generated, target)
    )  # (K, F), complex
    rotation = truth * estimate.conj()  # Its angle is the difference of the phases.
    change = torch.nn.functional.pad(rotation[:, 1:] * rotation[:, :-1].conj(), (1, 0), value=1.0)
    magnitude = truth.abs()
    return rotation.angle().abs(), change.angle().abs(), magnitude / magnitude.max().clamp_min(1e-12)


def phase_image(
    generated: Tensor, target: Tensor, *, n_fft: int, hop_length: int
) -> tuple[Image.Image, dict[str, float]]:
    """Phase errors of audible bins, and their means weighted by magnitude.

    Args: generated, target: (S,).
    Returns: the image, and the means `phase` and `frequency` in radians. Random phases have pi / 2 and, since frames
        overlap, about 1.
    """
    *errors, weight = phase_errors(generated, target, n_fft=n_fft, hop_length=hop_length)
    total = weight.sum().clamp_min(1e-12)
    names = ("phase", "frequency")
    means = {name: ((error * weight).sum() / total).item() for name, error in zip(names, errors)}
    captions = (
        f"phase error, mean {means['phase']:.2f} rad",
        f"error of phase increments, mean {means['frequency']:.2f} rad",
    )
    groups = []
    for error, caption in zip(errors, captions):
        image = colored(torch.where(weight > AUDIBLE, error, 0.0), 0, torch.pi)
        groups.append(Group([fit_width(image, error.shape[1], 128)], caption))
    return strip_sheet(groups), means


def latent_image(latents: Tensor, *, max_frames: int = 0) -> Image.Image:
    """Latents over time, one row per channel (and mel row within it). The palette spans mean +- 2.5 std of the row.

    Args:
        latents: (Z, L), or (Z, m, L).
        max_frames: frames of the longest clip on the sheet, see `fit_width`.
    """
    rows = latents.detach().float().cpu().flatten(0, -2)
    mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True, correction=0)
    image = colored((rows - mean) / (2.5 * std).clamp_min(1e-8), -1, 1, palette=SIGNED)
    height = max(6 * len(rows), 48) if len(rows) < 64 else len(rows)
    return fit_width(image, rows.shape[1], height, max_frames=max_frames)
