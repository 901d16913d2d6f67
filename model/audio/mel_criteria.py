"""Losses on log-mels of different lengths.  B batch, M mel bins, F mel frames.

Every loss is a sample's mean over its own valid values, then the mean over the batch: micro-batches of equal size
average to the loss of the whole batch, however they are padded.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.lengths import masked_mean
from model.text.tokenizer import PADDING


def mel_gradient_loss(error: Tensor, n_frames: Tensor) -> Tensor:
    """Mean absolute difference of the errors of neighbouring frames, plus that of neighbouring mel bins.

    Args:
        error: reconstruction - target, (B, M, F).
        n_frames: (B,).
    Returns: (B,) fp32.
    """
    over_time = masked_mean(error.diff(dim=-1).abs(), n_frames - 1)  # n frames make n - 1 pairs
    return over_time + masked_mean(error.diff(dim=-2).abs(), n_frames)


# Distances (error (B, M, F), n_frames (B,)) -> (B,), by name, in the order of their sum. A new term is a row here and
# a weight of `MelLoss`.
TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda error, n_frames: masked_mean(error.abs(), n_frames),
    "l2": lambda error, n_frames: masked_mean(error.square(), n_frames),
    "gradient": mel_gradient_loss,
}


class MelLoss(nn.Module):
    """Weighted distances between log-mels, by name: `TERMS`.

    Args:
        l1_weight: weight of the mean absolute error, in nats.
        l2_weight: weight of the mean squared error.
        gradient_weight: weight of `mel_gradient_loss`.
    Raises: ValueError: a negative weight, or all weights zero.
    """

    def __init__(self, l1_weight: float = 1.0, l2_weight: float = 0.0, gradient_weight: float = 0.0):
        super().__init__()
        self.weights = {"l1": l1_weight, "l2": l2_weight, "gradient": gradient_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"{name}_weight={weight} must be >= 0")
        if not any(self.weights.values()):
            raise ValueError("l1_weight, l2_weight and gradient_weight are all 0: nothing would be reconstructed")

    def forward(self, reconstruction: Tensor, target: Tensor, n_frames: Tensor) -> dict[str, Tensor]:
        """Args: reconstruction, target: (B, M, F); n_frames: (B,).
        Returns: weighted fp32 scalars "l1", "l2", "gradient"; those with weight 0 are left out."""
        error = reconstruction.float() - target.float()
        weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        return {name: weight * TERMS[name](error, n_frames).mean() for name, weight in weights.items()}


def character_loss(logits: Tensor, lengths: Tensor, tokens: Tensor, *, token_lengths: Tensor) -> Tensor:
    """CTC loss (Graves et al. 2006) in nats per character; 0, without a gradient, for a transcript longer than its
    latents can spell, and for an empty one, which says nothing of what is spoken.

    Args:
        logits: (B, L, V); the blank is the token of padding.
        lengths: valid latent frames, (B,).
        tokens: as `encode_caption` gives them, (B, T), the first one begins the text.
        token_lengths: (B,), the first one counted.
    Returns: (B,) fp32.
    """
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)  # (L, B, V)
    n_characters = token_lengths - 1
    # The token that begins the text is not spoken, and so not a target.
    losses = F.ctc_loss(
        log_probabilities, tokens[:, 1:], lengths, n_characters, PADDING, reduction="none", zero_infinity=True
    )
    return losses.where(n_characters > 0, 0.0) / n_characters.clamp_min(1)
