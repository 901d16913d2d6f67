"""Tensors as images, and sheets of labelled images for TensorBoard, evaluation and inference.

B batch, C channels, Y X rows and columns, Z latent channels, y x latent rows and columns.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dataset_loading.files import replacing
from dataset_loading.image.pixels import to_uint8
from utils.drawing.text import typeface

TRIPLE = ("input", "reconstruction", "difference x2")
MIN_CELL, MAX_CELL = 128, 256  # side of an image on a sheet, in pixels
GAP, LINE = 6, 18  # pixels between images, and height of a line of text
CAPTION_LINES = 4  # lines of a caption at most
PAPER = (236, 236, 236)


@dataclasses.dataclass
class Group:
    """Images drawn side by side with a common caption below."""

    images: Sequence[Image.Image]
    caption: str = ""


def to_image(image: Tensor) -> Image.Image:
    """A tensor (3, Y, X) or (1, Y, X) in [-1, 1] as an 8-bit RGB image."""
    return Image.fromarray(to_uint8(image.detach()).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())


def difference(generated: Tensor, target: Tensor) -> Tensor:
    """Twice the absolute difference as an image: black where equal, white from half the value range on.

    Args:
        generated, target: (..., C, Y, X) in [-1, 1].
    Returns: the same shape, in [-1, 1].
    """
    return (2 * (generated - target).abs() - 1).clamp(-1, 1)


def triple(generated: Tensor, target: Tensor) -> list[Image.Image]:
    """Input (the target), reconstruction and difference of one image (3, Y, X) in [-1, 1], see `TRIPLE`."""
    return [to_image(image) for image in (target, generated, difference(generated.clamp(-1, 1), target))]


def channel_images(latents: Tensor) -> Tensor:
    """Latent channels as grey images: per channel, mean +- 2.5 std of the batch is mapped to [-1, 1].

    Args:
        latents: (B, Z, y, x).
    Returns: (B, Z, 1, y, x) in [-1, 1].
    """
    mean = latents.mean((0, 2, 3), keepdim=True)
    std = latents.std((0, 2, 3), keepdim=True, correction=0)
    return ((latents - mean) / (2.5 * std).clamp_min(1e-8)).clamp(-1, 1).unsqueeze(2)


def fit_cell(image: Image.Image, side: int) -> Image.Image:
    """An image inside a square of `side` pixels, enlarged by an integer factor or shrunk to fit."""
    factor = side // max(image.size)  # Integer factors keep pixels sharp; 0 where the image must shrink.
    scale = factor or side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    scaled = image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (side, side), PAPER)
    cell.paste(scaled, ((side - size[0]) // 2, (side - size[1]) // 2))
    return cell


def shrunk(image: Image.Image) -> Image.Image:
    """An image as any sheet shows it: of a large one, a sheet that is drawn later needs no more."""
    return image if max(image.size) <= MAX_CELL else fit_cell(image, MAX_CELL)


def about_square(n_groups: int, width: int, height: int) -> int:
    """How many of some groups lie side by side where the sheet is about as wide as high.

    Args: width, height: of a group, in pixels.
    """

    def proportion(n_across: int) -> float:
        quotient = n_across * width / (-(-n_groups // n_across) * height)
        return max(quotient, 1 / quotient)

    return min(range(1, n_groups + 1), key=proportion)


def draw_sheet(
    groups: Sequence[Group],
    labels: Sequence[str] = (),
    *,
    n_across: int | None = 1,
    title: str = "",
    min_cell: int = MIN_CELL,
) -> Image.Image:
    """Groups of images, `n_across` of them side by side, each above its caption.

    Args:
        groups: each with the same number of images.
        labels: one per image of a group, above the first row.
        n_across: groups per row; None: as many as make the sheet about square.
        title: one line at the top.
        min_cell: side of the square that a small image is enlarged to, in pixels.
    """
    assert groups and all(len(group.images) == len(groups[0].images) for group in groups), "groups of unequal length"
    # Layout: the side of a cell, the size of a group, and the rows of groups.
    font = typeface(13)
    longest = max(max(image.size) for group in groups for image in group.images)
    side = min(max(longest, min_cell), MAX_CELL)
    n_images = len(groups[0].images)
    group_width = n_images * (side + GAP) + 2 * GAP
    captions = [font.wrap(group.caption, group_width - 3 * GAP, CAPTION_LINES) for group in groups]
    row_height = side + GAP + LINE * max(map(len, captions))
    n_across = min(n_across or about_square(len(groups), group_width, row_height), len(groups))
    top = GAP + LINE * bool(title) + LINE * bool(labels)
    n_rows = -(-len(groups) // n_across)
    sheet = Image.new("RGB", (n_across * group_width, top + n_rows * row_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    # Title, then every group: its images, labels above the first row, its caption below.
    if title:
        font.draw(draw, (1.5 * GAP, GAP), title, width=sheet.width - 3 * GAP)
    for index, group in enumerate(groups):
        row, column = divmod(index, n_across)
        left, upper = column * group_width + int(1.5 * GAP), top + row * row_height
        for i, image in enumerate(group.images):
            sheet.paste(fit_cell(image, side), (left + i * (side + GAP), upper))
            if labels and row == 0:
                font.draw(draw, (left + i * (side + GAP), top - LINE), labels[i], width=side)
        for line, text in enumerate(captions[index]):
            font.draw(draw, (left, upper + side + 1 + line * LINE), text, width=group_width - 3 * GAP)
    return sheet


def draw_prompts(
    rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], seeds: Sequence[int], *, title: str = ""
) -> Image.Image:
    """A sheet of the images of prompts: the seeds of a prompt in a row, or, where that would be much wider than high,
    one image after the other.

    Args: rows: for each prompt the images of all seeds.
    """
    if len(seeds) <= max(4, 2 * len(prompts)):
        groups, labels = [Group(*row) for row in zip(rows, prompts, strict=True)], [f"seed {seed}" for seed in seeds]
        if len(seeds) == 1:  # Said once.
            return draw_sheet(groups, n_across=None, title=f"{labels[0]}  {title}".rstrip())
        return draw_sheet(groups, labels, n_across=None, title=title)
    # The prompt stands once at the top if all images are of one.
    names = [f"{prompt}  " for prompt in prompts] if len(prompts) > 1 else [""]
    groups = [
        Group([image], f"{name}seed {seed}")
        for name, row in zip(names, rows, strict=True)
        for seed, image in zip(seeds, row, strict=True)
    ]
    return draw_sheet(groups, n_across=None, title=title if len(prompts) > 1 else f"{prompts[0]}  {title}".rstrip())


def save_image(image: Image.Image, file: Path) -> None:
    """Write a PNG atomically; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        image.save(temporary, format="PNG")


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `multiple`.

    Args:
        image: (B, C, Y, X).
    Returns: (B, C, Y', X'), whose first Y rows and X columns are the input.
    """
    Y, X = image.shape[-2:]
    return torch.nn.functional.pad(image, (0, -X % multiple, 0, -Y % multiple), mode="replicate")


def resize_shorter_side(image: Image.Image, length: int) -> Image.Image:
    """The image resized so that its shorter side has `length` pixels, with its aspect ratio preserved."""
    scale = length / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    # The gap makes a fast reduction by an integer factor precede the exact resampling.
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
