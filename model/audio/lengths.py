"""Clips of different lengths in one batch.  B batch, M mel bins, F frames."""

import torch
from torch import Tensor


def valid_frames(n_frames: Tensor, n_all: int) -> Tensor:
    """(B,) lengths -> (B, n_all) bool, True in valid frames."""
    return torch.arange(n_all, device=n_frames.device) < n_frames[:, None]


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
    total = values.where(valid_frames(n_frames, values.shape[-1])[:, None], 0.0).sum((1, 2))
    return total / (values.shape[1] * n_frames.clamp_min(1))
