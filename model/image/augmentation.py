"""Differentiable augmentation (DiffAugment, arXiv 2006.10738).  B batch, C channels, Y X rows and columns.

The random numbers are an argument, so that real and generated images, micro-batches and resumed runs can share them.
"""

import torch
from torch import Tensor

from utils.flags.choices import AugmentationKind
from utils.options import suggest

N_UNIFORMS = 8  # columns of `uniforms`: brightness, saturation, contrast, shift y x, cutout y x, one spare
TRANSLATION_RATIO = 0.125  # largest shift over the side
CUTOUT_RATIO = 0.5  # side of the cut square over the side


def diff_augment(image: Tensor, uniforms: Tensor, policy: list[AugmentationKind]) -> Tensor:
    """Augment each image with its own random numbers; differentiable in the image.

    Args:
        image: (B, C, Y, X) in [-1, 1].
        uniforms: (B, 8) in [0, 1).
        policy: any of "color", "translation", "cutout", applied in this order; an empty list returns the image.
    Returns:
        (B, C, Y, X); "color" can leave [-1, 1].
    Raises:
        ValueError: unknown policy, or uniforms of another shape.
    """
    if tuple(uniforms.shape) != (image.shape[0], N_UNIFORMS):
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}, expected ({image.shape[0]}, {N_UNIFORMS})")
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"augmentation {name!r} is not known{suggest(name, AUGMENTATIONS)}")
    for name, (augment, columns) in AUGMENTATIONS.items():
        if name in policy:
            image = augment(image, uniforms[:, columns])
    return image


def change_color(image: Tensor, uniforms: Tensor) -> Tensor:
    """Brightness +-0.5, saturation 0 to 2, contrast 0.5 to 1.5; uniforms: (B, 3)."""
    brightness, saturation, contrast = uniforms.view(-1, 3, 1, 1, 1).unbind(dim=1)
    image = image + (brightness - 0.5)
    gray = image.mean(dim=1, keepdim=True)
    image = gray + (image - gray) * (2.0 * saturation)
    level = image.mean(dim=(1, 2, 3), keepdim=True)
    return level + (image - level) * (0.5 + contrast)


def translate(image: Tensor, uniforms: Tensor) -> Tensor:
    """Shift by whole pixels, at most 1/8 of each side, zeros flowing in; uniforms: (B, 2)."""
    indices, masks = [], []
    for axis, size in enumerate(image.shape[-2:]):
        limit = round(size * TRANSLATION_RATIO)
        shift = (uniforms[:, axis] * (2 * limit + 1)).floor().long() - limit
        index = torch.arange(size, device=image.device) - shift[:, None]  # (B, size), the source of each pixel
        indices.append(index.clamp(0, size - 1))
        masks.append((index >= 0) & (index < size))
    rows, columns = indices
    mask = masks[0][:, :, None] & masks[1][:, None, :]  # (B, Y, X)
    batch = torch.arange(image.shape[0], device=image.device)[:, None, None]
    shifted = image.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2) * mask[:, None]


def cut_out(image: Tensor, uniforms: Tensor) -> Tensor:
    """Zero a rectangle of half the sides whose centre lies anywhere; uniforms: (B, 2)."""
    masks = []
    for axis, size in enumerate(image.shape[-2:]):
        side = round(size * CUTOUT_RATIO)
        start = (uniforms[:, axis] * (size + 1)).floor().long() - side // 2
        position = torch.arange(size, device=image.device) - start[:, None]
        masks.append((position >= 0) & (position < side))
    hole = masks[0][:, :, None] & masks[1][:, None, :]  # (B, Y, X)
    return image * ~hole[:, None]


AUGMENTATIONS = {
    "color": (change_color, slice(0, 3)),
    "translation": (translate, slice(3, 5)),
    "cutout": (cut_out, slice(5, 7)),
}
