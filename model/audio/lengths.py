"""Clips of different lengths in one batch.  B batch, M mel bins, F frames, Z latent channels, m latent rows, L latent
frames."""

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


def latents_to_sequence(latents: Tensor) -> Tensor:
    """Latents of an audio VAE, (B, Z, L) or (B, Z, m, L), as a sequence of vectors: (B, L, Z) or (B, L, Z * m)."""
    return latents.flatten(1, -2).transpose(1, 2)


def sequence_to_latents(sequence: Tensor, n_channels: int) -> Tensor:
    """The inverse of `latents_to_sequence`, as `AudioVAE.decode` takes it.

    Args: n_channels: Z; where the vectors have m times as many values, the latents have m rows.
    """
    latents = sequence.transpose(1, 2)
    return latents if latents.shape[1] == n_channels else latents.unflatten(1, (n_channels, -1))
