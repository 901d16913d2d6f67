"""Random numbers that belong to a sample, not to a process."""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def philox_key(seed: int, step: int, index: int, stream: str) -> np.ndarray:
    """The 128 bits of a Philox key: seed and stream (32 bits each), step (24 bits) and sample (40 bits). Different
    keys give independent sequences."""
    # NumPy would make floats, which round, of a list with numbers below and above 2 ** 63.
    return np.array([(seed & 0xFFFFFFFF) << 32 | zlib.crc32(stream.encode()), step << 40 | index], np.uint64)


def generators(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str) -> list[np.random.Generator]:
    """One generator per sample, the same in whichever process, batch or resumed run the sample comes.

    Args:
        indices: (B,) numbers of the samples in the data set.
        stream: name of the use, so that two uses never share numbers.
    """
    keys = [philox_key(seed, step, int(index), stream) for index in indices.tolist()]
    return [np.random.Generator(np.random.Philox(key=key)) for key in keys]


def generators_in_turn(
    seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str
) -> Iterator[np.random.Generator]:
    """The `generators` one after another, as one object that the next sample's key is set in: a new object costs ten
    times as much, since it first gathers entropy that nobody uses."""
    philox = np.random.Philox(key=(0, 0))
    generator, state = np.random.Generator(philox), philox.state
    for index in indices.tolist():
        state["state"]["key"][:] = philox_key(seed, step, int(index), stream)
        philox.state = state  # A copy, at the beginning of the key's sequence.
        yield generator


def sample_normal(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, (B, *shape) float32 on the CPU; row b belongs to sample `indices[b]` at this step."""
    noise = np.empty((len(indices), math.prod(shape)), np.float32)
    for row, generator in zip(noise, generators_in_turn(seed, step, indices, stream=stream)):
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise).view(len(indices), *shape)


def sample_uniform(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape) float32 on the CPU; row b belongs to sample `indices[b]` at this step."""
    numbers = np.empty((len(indices), math.prod(shape)), np.float32)
    for row, generator in zip(numbers, generators_in_turn(seed, step, indices, stream=stream)):
        generator.random(out=row, dtype=np.float32)
    return torch.from_numpy(numbers).view(len(indices), *shape)


def sample_keys(seed: int, step: int, indices: Tensor | np.ndarray, *, stream: str) -> Tensor:
    """Random keys of the dropout of `model.dropout`, (B,) int64 on the CPU; row b belongs to sample `indices[b]`."""
    limits = np.iinfo(np.int64)
    rows = [
        generator.integers(limits.min, limits.max, endpoint=True, dtype=np.int64)
        for generator in generators_in_turn(seed, step, indices, stream=stream)
    ]
    return torch.from_numpy(np.stack(rows))


Sampler = Callable[..., Tensor]


class NoiseAhead:
    """Random numbers of samples, made by a thread one optimizer step before they are asked for, while the device
    computes. They are those of the functions above, whoever makes them.

    What was asked for at this step, by stream and shape, is made for the samples of the next one; what has another
    shape there is made when it is asked for.

    Args: seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.pool = ThreadPoolExecutor(1, "noise")
        self.requests: dict[tuple[Sampler, str, tuple[int, ...]], None] = {}  # Of this step, in order.
        self.futures: dict[tuple, Future[Tensor]] = {}

    def prepare(self, step: int, batches: Sequence[np.ndarray]) -> None:
        """Begin to make the numbers of a step.

        Args: batches: numbers of the samples of each of its micro-batches, (B,).
        """
        self.futures = {key: future for key, future in self.futures.items() if key[0] == step - 1}
        requests, self.requests = self.requests, {}
        for indices in batches:
            for sampler, stream, shape in requests:
                keywords = {"stream": stream, "shape": shape}
                future = self.pool.submit(sampler, self.seed, step, indices, **keywords)
                self.futures[step, indices.tobytes(), sampler, stream, shape] = future

    def __call__(
        self, sampler: Sampler, step: int, indices: np.ndarray, *, stream: str, shape: Sequence[int]
    ) -> Tensor:
        """`sampler(seed, step, indices, stream=stream, shape=shape)`, (B, *shape) on the CPU."""
        shape = tuple(shape)
        self.requests[sampler, stream, shape] = None
        future = self.futures.pop((step, indices.tobytes(), sampler, stream, shape), None)
        return future.result() if future else sampler(self.seed, step, indices, stream=stream, shape=shape)


def seed_of(seed: int, key: str) -> int:
    """The seed of one copy of one sample, a number of 63 bits."""
    # The sign bit is dropped: torch.Generator takes the seed as a signed 64-bit integer.
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big") >> 1
