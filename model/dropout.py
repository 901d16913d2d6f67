"""Dropout whose masks belong to samples: functions of a key per sample, instead of the state of a generator.

B batch.  A key is a random number per sample, (B,) int64, which `utils.seeds.sample_keys` makes from (seed, step,
sample). Without keys all of this is PyTorch's dropout.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def signed(number: int) -> int:
    """A number below 2^64 as the int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


# SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195): its odd step, 2^64 / golden ratio, and the
# factors of its finaliser. Each further axis of a mask has an odd step of its own.
GAMMA = signed(0x9E3779B97F4A7C15)
AXIS_STEPS = [signed(step) for step in (0xD1B54A32D192ED03, 0xABC98388FB8FAC03, 0x8CB92BA72F3D8DD7)]
FACTORS = (signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB))
LEVELS = 1 << 16  # Each element is compared with a random number of 16 bits, four of which come from one of 64.


def fold(keys: Tensor | None, number: int) -> Tensor | None:
    """Keys of use `number` of the same samples: keys of other numbers give independent masks. None stays None."""
    return None if keys is None else keys + signed(number * GAMMA % (1 << 64))


def check_keys(keys: Tensor | None, n_samples: int) -> None:
    """Raises: ValueError: keys are given, and are not one int64 per sample."""
    if keys is not None and (keys.dtype != torch.int64 or keys.shape != (n_samples,)):
        raise ValueError(
            f"dropout_keys is {keys.dtype} of shape {tuple(keys.shape)}: give int64 of shape ({n_samples},), one "
            "random number per sample, or none for PyTorch's dropout"
        )


def random_words(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Random bits (B, *shape) int64; those at a position are a function of key and position, for whatever `shape`.

    Args:
        keys: (B,) int64.
        shape: one to three axes.
    """
    # A point of a lattice per element.
    words = keys
    for size, step in zip(shape, AXIS_STEPS[: len(shape)], strict=True):
        words = words[..., None] + torch.arange(size, device=keys.device) * step
    # The finaliser of SplitMix64. Its first shifts may drag the sign along, the last one may not.
    words ^= words >> 30
    words *= FACTORS[0]
    words ^= words >> 27
    words *= FACTORS[1]
    words ^= (words >> 31) & ((1 << 33) - 1)
    return words


def dropout_threshold(p: float) -> int:
    """How many of `LEVELS` random numbers drop an element: the nearest number, of 1 to LEVELS - 1."""
    return min(max(round(p * LEVELS), 1), LEVELS - 1)


def keep_mask(keys: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Which elements stay, (B, *shape) bool: of each sample a function of its key and the element's position alone.

    Args:
        keys: (B,) int64.
        shape: one to three axes; a longer axis leaves the elements before its end as they are.
        p: probability that an element is dropped, in (0, 1); rounded to `dropout_threshold(p) / LEVELS`.
    """
    *leading, size = shape
    numbers = random_words(keys, (*leading, math.ceil(size / 4))).view(torch.int16)  # (B, *leading, size or more)
    return (numbers >= dropout_threshold(p) - LEVELS // 2)[..., :size]


@torch.library.custom_op("megatransformer::keep_mask", mutates_args=())
def keep_mask_kernel(keys: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """`keep_mask` as one operation, for compilers."""
    return keep_mask(keys, shape, p).contiguous()


@keep_mask_kernel.register_fake
def _(keys, shape, p):
    return keys.new_empty((keys.shape[0], *shape), dtype=torch.bool)


def dropout(x: Tensor, p: float, keys: Tensor | None = None) -> Tensor:
    """Zero elements with probability p, and divide the others by the probability that they stay.

    Args:
        x: (B, ...), one to three axes after the batch.
        p: in [0, 1).
        keys: (B,) int64, one key per sample: see `keep_mask`; None: the mask comes from PyTorch's generator.
    """
    if keys is None or p == 0:
        return F.dropout(x, p)
    mask = (keep_mask_kernel if torch.compiler.is_compiling() else keep_mask)(keys, x.shape[1:], p)
    return torch.where(mask, x * (LEVELS / (LEVELS - dropout_threshold(p))), 0.0)


class Dropout(nn.Dropout):
    """`nn.Dropout`, with masks that belong to samples where keys are given."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Args: x: (B, ...). keys: (B,) int64, see `dropout`; None: as `nn.Dropout`. Returns: (B, ...)."""
        return dropout(x, self.p, keys) if self.training and self.p else x


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer of the model drops anything in training."""
    return any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())
