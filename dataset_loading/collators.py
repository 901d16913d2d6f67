"""Batches from samples."""

from collections.abc import Sequence

import torch
from torch import Tensor


def collate_stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples with the same keys and shapes along a new first axis.

    Raises:
        ValueError: keys or shapes differ between samples; the message names the key and the shapes.
    """
    keys = samples[0].keys()
    for sample in samples:
        if sample.keys() != keys:
            raise ValueError(f"samples of one batch have different keys: {sorted(keys)} and {sorted(sample)}")
    batch = {}
    for key in keys:
        tensors = [sample[key] for sample in samples]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"{key!r} has different shapes within one batch: {sorted(shapes)}")
        batch[key] = torch.stack(tensors)
    return batch
