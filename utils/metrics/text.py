"""Metrics of a language model: sums over targets, of which the ratios are taken once at the end.

B batch, L sequence, R thinking steps.
"""

import gzip
import lzma
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.language_head import IGNORED, next_token_targets

LOGITS_AT_ONCE = 1 << 26  # logits that evaluation holds at once: 256 MB in fp32
COUNTED_AT_ONCE = 1 << 24  # tokens


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's inputs for a batch of windows: `input_ids`, `segment_ids`, and the tokens again as `labels`, (B, L).

    Padding is a segment of its own, so it is never a target."""
    return {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"], "labels": batch["input_ids"]}


def windows_at_once(vocab_size: int, length: int) -> int:
    """The number of windows per forward pass whose logits stay below `LOGITS_AT_ONCE`; at least one."""
    return max(1, LOGITS_AT_ONCE // (length * vocab_size))


def window_sums(
    model: Any, inputs: Mapping[str, Tensor], *, max_steps: int = 0, at_once: int = 0, **keywords: Any
) -> dict[str, Tensor]:
    """Sums over the targets of each window.

    Args:
        model: a `MegaTransformerForCausalLM`, or an engine around one.
        inputs: `input_ids`, `segment_ids` and `labels`, (B, L).
        max_steps: R; 0: do not count positions by steps.
        at_once: windows per forward pass, which bounds memory; 0: all.
        keywords: further arguments of the model.
    Returns: name -> (B,):
        nats: cross-entropy of the targets.
        targets: their number.
        hits: targets that are the most probable token; only where the model returns logits.
        steps: thinking steps of the positions with a target; only of recurrent models.
        step_counts: (B, R + 1), number of these positions that took 0, 1, ... R steps; only with `max_steps`.
    """
    n_windows = len(inputs["labels"])
    if 0 < at_once < n_windows:
        chunks = [
            window_sums(
                model, {k: v[start : start + at_once] for k, v in inputs.items()}, max_steps=max_steps, **keywords
            )
            for start in range(0, n_windows, at_once)
        ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    output = model(**inputs, use_cache=False, logits_to_keep=None, **keywords)  # no logits beside a loss in chunks
    # The last position of a window has no target: (B, L - 1).
    targets = next_token_targets(inputs["labels"], inputs["segment_ids"])[:, :-1]
    counted = targets != IGNORED
    sums = {"nats": output.cross_entropy.sum(1), "targets": counted.sum(1)}
    if output.logits is not None:
        sums["hits"] = ((output.logits[:, :-1].argmax(-1) == targets) & counted).sum(1)
    if output.thinking_steps is not None:
        steps = output.thinking_steps[:, :-1]
        sums["steps"] = (steps * counted).sum(1)
        if max_steps:
            sums["step_counts"] = torch.stack([((steps == k) & counted).sum(1) for k in range(max_steps + 1)], dim=1)
    return sums


def ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """`loss` in nats per target and `perplexity`; `bits_per_byte`, `accuracy` and mean `thinking_steps` if the sums
    contain `bytes`, `hits` and `steps`."""
    loss = sums["nats"] / sums["targets"]
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows above 709
    if "bytes" in sums:
        metrics["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
    for name, numerator in (("accuracy", "hits"), ("thinking_steps", "steps")):
        if numerator in sums:
            metrics[name] = sums[numerator] / sums["targets"]
    return metrics


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a text compressed by gzip and lzma at their highest levels, without other data."""
    sizes = {"gzip": len(gzip.compress(text, 9)), "lzma": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def token_counts(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """Number of occurrences of each id, (V,) int64. The tokens (N,) may be a memory map; they are read in chunks."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return torch.from_numpy(counts)


def unigram_nats(counts: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy in nats of a unigram model with add-one smoothing.

    Args:
        counts: occurrences of each id in the training split, (V,).
        targets: number of times that each id is a target, (V,).
    """
    frequencies = counts.double() + 1  # An id that is absent in training still has a finite loss.
    return -(targets.double() @ (frequencies / frequencies.sum()).log() / targets.sum()).item()
