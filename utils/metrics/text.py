"""Numbers of a language model: sums over targets, from which every ratio is made once, at the end.

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

LOGITS_AT_ONCE = 1 << 26  # Numbers that evaluation holds of a model's output: 256 MB in fp32.
COUNTED_AT_ONCE = 1 << 24  # Tokens.


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of windows: `input_ids`, `segment_ids`, and the tokens again as `labels`, (B, L); padding is
    a segment of its own, so that it is no target."""
    return {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"], "labels": batch["input_ids"]}


def windows_at_once(vocab_size: int, length: int) -> int:
    """How many windows of a length may go through a model together, so that their logits stay below
    `LOGITS_AT_ONCE`; at least one."""
    return max(1, LOGITS_AT_ONCE // (length * vocab_size))


def window_sums(
    model: Any, inputs: Mapping[str, Tensor], most_steps: int = 0, at_once: int = 0, **keywords: Any
) -> dict[str, Tensor]:
    """Sums per window of what a model says about it.

    Args:
        model: a `MegaTransformerForCausalLM`, or an engine around one.
        inputs: `input_ids`, `segment_ids` and `labels`, (B, L).
        most_steps: R; 0: do not count by steps.
        at_once: windows per pass through the model, which bounds memory; 0: all.
        keywords: further ones of the model.
    Returns: name -> (B,): `nats`; `targets`; where the model gives logits `hits`, targets that are its first guess; of
        a recurrent model `steps`, thinking steps of the positions with a target. And `step_counts`, (B, R + 1), how
        many of them took 0, 1, ... R steps, where they are counted.
    """
    n_windows = len(inputs["labels"])
    if 0 < at_once < n_windows:
        parts = [
            window_sums(model, {k: v[start : start + at_once] for k, v in inputs.items()}, most_steps, **keywords)
            for start in range(0, n_windows, at_once)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    output = model(**inputs, use_cache=False, **keywords)
    targets = next_token_targets(inputs["labels"], inputs["segment_ids"])[:, :-1]
    counted = targets != IGNORED
    sums = {"nats": output.cross_entropy.sum(1), "targets": counted.sum(1)}
    if output.logits is not None:
        sums["hits"] = ((output.logits[:, :-1].argmax(-1) == targets) & counted).sum(1)
    if output.thinking_steps is not None:
        steps = output.thinking_steps[:, :-1]
        sums["steps"] = (steps * counted).sum(1)
        if most_steps:
            sums["step_counts"] = torch.stack([((steps == k) & counted).sum(1) for k in range(most_steps + 1)], dim=1)
    return sums


def ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """`loss` in nats per target and `perplexity`; `bits_per_byte`, `accuracy` and mean `thinking_steps` where the sums
    have `bytes`, `hits` and `steps`."""
    loss = sums["nats"] / sums["targets"]
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if "bytes" in sums:
        found["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
    for name, of in (("accuracy", "hits"), ("thinking_steps", "steps")):
        if of in sums:
            found[name] = sums[of] / sums["targets"]
    return found


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a text as gzip and lzma pack it, at their best, from that text alone."""
    sizes = {"gzip": len(gzip.compress(text, 9)), "lzma": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def token_counts(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """How often each id occurs, (V,) int64; the tokens (N,) may lie on disk and are read piece by piece."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return torch.from_numpy(counts)


def unigram_nats(counts: Tensor, targets: Tensor) -> float:
    """Mean nats of targets under the counts (V,) of the training split's tokens, each counted once more.

    Args: targets: how often each id is a target, (V,).
    """
    frequencies = counts.double() + 1
    return -(targets.double() @ (frequencies / frequencies.sum()).log() / targets.sum()).item()
