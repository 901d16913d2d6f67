"""Random numbers that belong to a sample, not to a process."""

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generators(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str) -> list[np.random.Generator]:
    """One generator per sample, the same in whichever process, batch or resumed run the sample comes.

    Args:
        indices: (B,) numbers of the samples in the data set.
        stream: name of the use, so that two uses never share numbers.
    """
    # The 128 bits of a Philox key: seed and stream (32 bits each), step (24 bits) and sample (40 bits). Different keys
    # give independent sequences.
    key = (seed & 0xFFFFFFFF) << 32 | zlib.crc32(stream.encode())
    return [np.random.Generator(np.random.Philox(key=[key, step << 40 | int(index)])) for index in indices.tolist()]


def sample_normal(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, (B, *shape) float32 on the CPU; row b belongs to sample `indices[b]` at this step."""
    rows = [
        generator.standard_normal(shape, dtype=np.float32)
        for generator in generators(seed, step, indices, stream=stream)
    ]
    return torch.from_numpy(np.stack(rows))


def sample_uniform(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape) float32 on the CPU; row b belongs to sample `indices[b]` at this step."""
    rows = [generator.random(shape, dtype=np.float32) for generator in generators(seed, step, indices, stream=stream)]
    return torch.from_numpy(np.stack(rows))


def sample_keys(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str) -> Tensor:
    """Random keys of the dropout of `model.dropout`, (B,) int64 on the CPU; row b belongs to sample `indices[b]`."""
    limits = np.iinfo(np.int64)
    rows = [
        generator.integers(limits.min, limits.max, endpoint=True, dtype=np.int64)
        for generator in generators(seed, step, indices, stream=stream)
    ]
    return torch.from_numpy(np.stack(rows))


def seed_of(seed: int, key: str) -> int:
    """The seed of one copy of one sample, a number of 63 bits."""
    # The sign bit is dropped: torch.Generator takes the seed as a signed 64-bit integer.
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big") >> 1
