"""Features of any sound, from its log-mel: what it is made of, how it moves, and when.  M mel bins, F mel frames.

They need no trained network, so that distances and agreements of sounds can be measured everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

N_PLACES, N_BANDS = 8, 8  # to which the course of a sound is averaged, in time and in frequency
FLOOR = -9.0  # Log-mels are clamped here: the depth of silence says little.


def sound_blocks(n_mels: int) -> tuple[int, ...]:
    """Widths of the blocks of `sound_features`: spectrum, its spread, its changes, the course, the duration."""
    return n_mels, n_mels, n_mels, N_PLACES * N_BANDS, 1


def sound_features(mel: Tensor) -> Tensor:
    """Features (D,) fp32 of a log-mel (M, F): mean, std and mean absolute change of each bin over time; the course,
    pooled to `N_BANDS` x `N_PLACES` without the mean of each band; the logarithm of the frames."""
    mel = mel.float().clamp_min(FLOOR)
    changes = mel.diff(dim=1).abs().mean(1) if mel.shape[1] > 1 else torch.zeros(len(mel))
    course = F.adaptive_avg_pool2d(mel[None], (N_BANDS, N_PLACES))[0]
    course = course - course.mean(1, keepdim=True)
    frames = torch.tensor([float(mel.shape[1])]).log()
    return torch.cat([mel.mean(1), mel.std(1, correction=0), changes, course.flatten(), frames])
