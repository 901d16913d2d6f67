"""Drawing sound: log-mels, waveforms, phase errors and latents as images; time runs from left to right."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model.audio.spectral import stft
from utils.drawing.images import GAP, INK, LINE, PAPER, Group, shorten

TRIPLE = ("target", "predicted", "difference")
SPAN = 1.5  # nats: a difference of mels that is drawn white
MAX_WIDTH = 480  # pixels of one drawn clip
AUDIBLE = 1e-3  # phases of bins quieter than this share of the loudest one are not drawn
# Dark blue over red to light yellow, brightness rising evenly.
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
SIGNED = ((33, 66, 140), (120, 160, 214), (240, 240, 240), (226, 140, 110), (160, 30, 40))
BLUE, ORANGE = (31, 88, 163), (221, 106, 28)


def colored(values: Tensor, low: float, high: float, palette: Sequence[tuple[int, int, int]] = WARM) -> Image.Image:
    """A matrix as an image, its first row at the bottom.

    Args:
        values: (rows, columns); what is not finite is drawn as `low`.
        low, high: the values of the palette's first and last colour.
    """
    values = torch.nan_to_num(values.detach().float().cpu(), low, high, low)
    position = ((values - low) / max(high - low, 1e-12)).clamp(0, 1).flip(0) * (len(palette) - 1)
    colors = torch.tensor(palette, dtype=torch.float32)
    lower = position.floor().long().clamp_max(len(palette) - 2)
    mixed = torch.lerp(colors[lower], colors[lower + 1], (position - lower).unsqueeze(-1))
    return Image.fromarray(mixed.round().byte().numpy())


def fit_width(image: Image.Image, n_frames: int, height: int, longest: int = 0) -> Image.Image:
    """An image with one column per frame at a scale by which the longest clip of a sheet is `MAX_WIDTH` wide.

    Args: longest: frames of the longest clip; 0: this one.
    """
    width = max(1, round(n_frames * min(MAX_WIDTH / max(longest, n_frames), 4)))
    is_larger = width >= image.width and height >= image.height
    return image.resize((width, height), Image.Resampling.NEAREST if is_larger else Image.Resampling.BOX)


def mel_triple(target: Tensor, predicted: Tensor, log_floor: float, longest: int = 0) -> list[Image.Image]:
    """Target, prediction and absolute difference of one log-mel, low frequencies at the bottom.

    The first two share one scale, from the floor to the target's maximum; the difference is white from `SPAN` on.

    Args:
        target, predicted: (M, F); frames beyond the shorter one are left out.
        longest: frames of the longest clip on the sheet, see `fit_width`.
    """
    target, predicted = target.detach().float().cpu(), predicted.detach().float().cpu()
    M, F = len(target), min(target.shape[1], predicted.shape[1])
    target, predicted = target[:, :F], predicted[:, :F]
    high = max(target.max().item(), log_floor + 1)
    images = [colored(each, log_floor, high) for each in (target, predicted)]
    images.append(colored((target - predicted).abs(), 0, SPAN))
    return [fit_width(image, F, max(M, 80), longest) for image in images]


def strip_sheet(groups: Sequence[Group], labels: Sequence[str] = (), *, title: str = "") -> Image.Image:
    """Rows of images of any proportions, each group a row with its caption below, columns aligned.

    Args:
        groups: each with as many images as the first one.
        labels: one per image of a group, above the first row.
        title: one line at the top.
    """
    assert groups and all(len(group.images) == len(groups[0].images) for group in groups), "unequal groups"
    font = ImageFont.load_default(13)
    widths = [max(image.width for image in column) for column in zip(*(group.images for group in groups))]
    lefts = [GAP + sum(widths[:i]) + i * GAP for i in range(len(widths))]
    heights = [max(image.height for image in group.images) + GAP + LINE * bool(group.caption) for group in groups]
    top = GAP + LINE * bool(title) + LINE * bool(labels)
    sheet = Image.new("RGB", (max(lefts[-1] + widths[-1] + GAP, 240), top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), shorten(title, sheet.width - 2 * GAP, font), INK, font)
    for left, width, label in zip(lefts, widths, labels):
        draw.text((left, top - LINE), shorten(label, width, font), INK, font)
    for group, height in zip(groups, heights):
        for left, image in zip(lefts, group.images):
            sheet.paste(image, (left, top))
        if group.caption:
            draw.text((GAP, top + height - GAP - LINE), shorten(group.caption, sheet.width - 2 * GAP, font), INK, font)
        top += height
    return sheet


def waveform_image(waveforms: Mapping[str, Tensor], rate: int, height: int = 96) -> Image.Image:
    """Waveforms below each other at one scale of time and level: the range within each column of pixels.

    Args:
        waveforms: label -> (S,).
        rate: Hz.
        height: pixels per waveform.
    """
    sounds = {label: waveform.detach().float().cpu() for label, waveform in waveforms.items()}
    length = max(len(sound) for sound in sounds.values())
    peak = max(max(sound.nan_to_num().abs().max().item() for sound in sounds.values()), 1e-4)
    groups = []
    for color, (label, sound) in zip((BLUE, ORANGE) * len(sounds), sounds.items()):
        padded = torch.zeros(length)
        padded[: len(sound)] = sound.nan_to_num()
        columns = torch.nn.functional.pad(padded, (0, -length % MAX_WIDTH)).view(MAX_WIDTH, -1)
        middle = height / 2
        tops = (middle - columns.amax(1) / peak * (middle - 1)).round().int().numpy()
        ends = (middle - columns.amin(1) / peak * (middle - 1)).round().int().numpy()
        rows = np.arange(height)[:, None]
        pixels = np.full((height, MAX_WIDTH, 3), 255, np.uint8)
        pixels[(rows >= tops) & (rows <= ends)] = color
        groups.append(Group([Image.fromarray(pixels)], label))
    return strip_sheet(groups, title=f"{length / rate:.2f} s, full scale {peak:.3f}")


def phase_errors(real: Tensor, made: Tensor, n_fft: int, hop_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """How far the phases of a made waveform lie from the real one's.

    Args: real, made: (S,).
    Returns:
        phase: |difference| of the phases, wrapped, (K, F) in [0, pi].
        frequency: |difference| of their change from frame to frame, wrapped, (K, F), 0 in the first frame; it does
            not mind a constant offset of phase.
        weight: the real magnitude over its maximum, (K, F).
    """
    length = min(len(real), len(made))
    window = torch.hann_window(n_fft)
    a, b = (stft(each[None, :length].detach().float().cpu(), window, hop_length)[0] for each in (real, made))
    turn = a * b.conj()
    change = torch.nn.functional.pad(turn[:, 1:] * turn[:, :-1].conj(), (1, 0), value=1.0)
    magnitude = a.abs()
    return turn.angle().abs(), change.angle().abs(), magnitude / magnitude.max().clamp_min(1e-12)


def phase_image(real: Tensor, made: Tensor, n_fft: int, hop_length: int) -> tuple[Image.Image, dict[str, float]]:
    """Phase errors of bins that can be heard, and their means weighted by magnitude.

    Args: real, made: (S,).
    Returns: the image, and `phase` and `frequency` in radians; chance gives pi / 2 and, as frames overlap, about 1.
    """
    *errors, weight = phase_errors(real, made, n_fft, hop_length)
    total = weight.sum().clamp_min(1e-12)
    names = ("phase", "frequency")
    means = {name: ((error * weight).sum() / total).item() for name, error in zip(names, errors)}
    captions = (f"phase error, mean {means['phase']:.2f} rad", f"of its change, mean {means['frequency']:.2f} rad")
    groups = []
    for error, caption in zip(errors, captions):
        image = colored(torch.where(weight > AUDIBLE, error, 0.0), 0, torch.pi)
        groups.append(Group([fit_width(image, error.shape[1], 128)], caption))
    return strip_sheet(groups), means


def latent_image(latents: Tensor, longest: int = 0) -> Image.Image:
    """Latents over time, one row per channel (and mel row within it): 2.5 deviations about its mean fill the palette.

    Args: latents: (Z, L), or (Z, m, L).
    """
    rows = latents.detach().float().cpu().flatten(0, -2)
    mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True, correction=0)
    image = colored((rows - mean) / (2.5 * std).clamp_min(1e-8), -1, 1, SIGNED)
    return fit_width(image, rows.shape[1], max(6 * len(rows), 48) if len(rows) < 64 else len(rows), longest)
