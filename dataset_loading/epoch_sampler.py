"""The order of training samples: a permutation per epoch that does not depend on the number of processes."""

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A permutation of the training set per (seed, epoch), cut to whole optimizer steps.

    All processes compute the same permutation; accelerate distributes its batches in turn, so that a step sees the
    same samples on one process or on many, with or without gradient accumulation.
    """

    def __init__(self, n_samples: int, samples_per_step: int, seed: int):
        if n_samples < samples_per_step:
            raise ValueError(
                f"{n_samples} training samples make no optimizer step of {samples_per_step} (batch_size x "
                "accumulation x processes); lower --batch_size or --gradient_accumulation_steps, or add data"
            )
        self.n_samples, self.seed, self.epoch = n_samples, seed, 0
        # The samples that fill no optimizer step are left out; they are others in each epoch.
        self.length = n_samples - n_samples % samples_per_step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose permutation the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        # The factor exceeds any number of epochs, so that no two (seed, epoch) share a permutation.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.n_samples, generator=generator)[: self.length].tolist())
