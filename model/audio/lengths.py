"""Clips of different lengths in one batch.  B batch, M mel bins, F frames."""

import torch
from torch import Tensor


def valid_frames(n_frames: Tensor, n_all: int) -> Tensor:
    """(B,) lengths -> (B, n_all) bool, True in valid frames."""
    return torch.arange(n_all, device=n_frames.device) < n_frames[:, None]


def crop_starts(n_frames: Tensor, length: int, uniforms: Tensor) -> Tensor:
    """First frames of crops of `length`, each place that fits being equally likely; 0 where the clip is shorter.

    Args:
        n_frames: valid frames of each clip, (B,).
        uniforms: in [0, 1), (B,).
    Returns: (B,).
    """
    return (uniforms * (n_frames - length + 1).clamp_min(1)).long()


def masked_mean(values: Tensor, n_frames: Tensor | None) -> Tensor:
    """Each sample's mean over its valid frames.

    Args:
        values: (B, M, F).
        n_frames: valid frames of each sample, (B,); 0 gives 0. None: all of them.
    Returns: (B,) fp32.
    """
    values = values.float()
    if n_frames is None:
        return values.flatten(1).mean(1)
    # `where` and no product: padding may hold anything, infinities too.
    total = values.where(valid_frames(n_frames, values.shape[-1])[:, None], 0.0).sum((1, 2))
    return total / (values.shape[1] * n_frames.clamp_min(1))
