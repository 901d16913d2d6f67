"""The order of training samples: a permutation per epoch that does not depend on the number of processes."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)

LISTED = 10_000_000  # From this number of samples on the permutation is computed place by place, without a list.
# How the permutation is computed, which `stage.json` says; records of earlier versions do not.
ORDER, FORMER_ORDER = "list below 10 million, else cipher", "list"
CHUNK = 1 << 16  # Places whose samples are computed at once.
N_ROUNDS = 8


class EpochSampler(Sampler[int]):
    """A permutation of the training set per (seed, epoch), cut to whole optimizer steps.

    All processes compute the same permutation; accelerate distributes its batches in turn, so that a step sees the
    same samples on one process or on many, with or without gradient accumulation. Below 10 million samples it is
    drawn as a list, 8 bytes a sample; above it is a `Permutation`, which needs no memory.

    Args: order: `"list"` for a list of any length, as in runs of earlier versions.
    """

    def __init__(self, n_samples: int, samples_per_step: int, seed: int, *, order: str = ORDER):
        if n_samples < samples_per_step:
            raise ValueError(
                f"{n_samples} training samples make no optimizer step of {samples_per_step} (batch_size x "
                "accumulation x processes); lower --batch_size or --gradient_accumulation_steps, or add data"
            )
        self.n_samples, self.seed, self.epoch = n_samples, seed, 0
        self.is_listed = order == FORMER_ORDER or n_samples < LISTED
        # The samples that fill no optimizer step are left out; they are others in each epoch.
        self.length = n_samples - n_samples % samples_per_step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose permutation the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        if not self.is_listed:
            permutation = Permutation(self.n_samples, f"{self.seed} {self.epoch}")
            for start in range(0, self.length, CHUNK):
                yield from permutation(np.arange(start, min(start + CHUNK, self.length))).tolist()
            return
        # The factor exceeds any number of epochs, so that no two (seed, epoch) share a permutation.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for chunk in torch.randperm(self.n_samples, generator=generator)[: self.length].split(CHUNK):
            yield from chunk.tolist()


class BucketSampler(Sampler[list[int]]):
    """Micro-batches of a fixed number of samples, those of each from one bucket, such as images of one size.

    The micro-batches of an epoch are a function of (seed, epoch), cut to whole optimizer steps as in `EpochSampler`,
    and in random order, so that a step has several buckets. The `n_parts` of a step come one after the other: those of
    one process that accumulates, or of several processes, to which accelerate gives batches in turn. What is left of a
    bucket, fewer samples than a micro-batch, is left out; it is others in each epoch. A bucket with fewer samples in
    all has one micro-batch, in which they are repeated.

    Args:
        buckets: the bucket of each sample.
        batch_size: samples of a micro-batch.
        n_parts: micro-batches of a step (accumulation x processes).
        names: of the buckets, for messages.
    Raises: ValueError: there are fewer micro-batches than a step has.
    """

    def __init__(
        self, buckets: Sequence[int], batch_size: int, seed: int, *, n_parts: int = 1, names: Sequence[str] = ()
    ):
        self.batch_size, self.seed, self.n_parts, self.epoch = batch_size, seed, n_parts, 0
        numbers = torch.tensor(buckets)
        self.members = {bucket: (numbers == bucket).nonzero()[:, 0] for bucket in numbers.unique().tolist()}
        for bucket, members in self.members.items():
            if len(members) < batch_size:
                logger.warning(
                    "bucket %s has %d training samples, fewer than batch_size=%d: they are repeated, in one "
                    "micro-batch per epoch; lower --batch_size, or preprocess with fewer --aspect_buckets",
                    *(names[bucket] if names else bucket, len(members), batch_size),
                )
        n_batches = sum(max(1, len(members) // batch_size) for members in self.members.values())
        if n_batches < n_parts:
            raise ValueError(
                f"{len(buckets)} training samples in {len(self.members)} buckets make {n_batches} micro-batches of "
                f"{batch_size}, and no optimizer step of {n_parts} (accumulation x processes); lower --batch_size or "
                "--gradient_accumulation_steps, or add data"
            )
        self.length = n_batches - n_batches % n_parts

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose micro-batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        # As for `EpochSampler`: no two (seed, epoch) share a generator.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches: list[torch.Tensor] = []
        for members in self.members.values():
            shuffled = members[torch.randperm(len(members), generator=generator)]
            if len(shuffled) < self.batch_size:
                shuffled = shuffled.repeat(-(-self.batch_size // len(shuffled)))[: self.batch_size]
            whole = len(shuffled) - len(shuffled) % self.batch_size
            batches += shuffled[:whole].split(self.batch_size)
        for number in torch.randperm(len(batches), generator=generator)[: self.length].tolist():
            yield batches[number].tolist()


class Permutation:
    """A permutation of range(n) as a function: a Feistel cipher on pairs of digits to a base of about sqrt(n), applied
    again where the result is not below n ("generalised Feistel", Black and Rogaway 2002; cycle walking).

    Args:
        n: number of elements.
        key: another permutation for every text.
    """

    def __init__(self, n: int, key: str):
        self.n, self.base = n, max(2, math.isqrt(n - 1) + 1)  # n <= base ** 2
        digest = hashlib.shake_128(f"permutation {n} {key}".encode()).digest(8 * N_ROUNDS)
        self.keys = np.frombuffer(digest, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The elements at some places, int64 in [0, n), any shape."""
        elements = self.encipher(places.astype(np.uint64))
        # The domain has base ** 2 - n elements too many, fewer than 2 sqrt(n) + 1.
        while (outside := elements >= self.n).any():
            elements[outside] = self.encipher(elements[outside])
        return elements.astype(np.int64)

    def encipher(self, values: np.ndarray) -> np.ndarray:
        """A permutation of range(base ** 2). Each round adds a hash of one digit to the other one."""
        base = np.uint64(self.base)
        left, right = np.divmod(values, base)
        for key in self.keys:
            left, right = right, (left + scramble(right + key)) % base
        return left * base + right


def scramble(values: np.ndarray) -> np.ndarray:
    """A hash of each number, below 2 ** 32: the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(32)
