"""Numbers of a language model: sums over targets, from which every ratio is made once, at the end.

B batch, L sequence, R thinking steps.
"""

import gzip
import lzma
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.language_head import IGNORED, next_token_targets


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of windows: `input_ids`, `segment_ids`, and the tokens again as `labels`, (B, L); padding is
    a segment of its own, so that it is no target."""
    return {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"], "labels": batch["input_ids"]}


def window_sums(model: Any, inputs: Mapping[str, Tensor], most_steps: int = 0, **keywords: Any) -> dict[str, Tensor]:
    """Sums per window of what a model says about it.

    Args:
        model: a `MegaTransformerForCausalLM`, or an engine around one.
        inputs: `input_ids`, `segment_ids` and `labels`, (B, L).
        most_steps: R; 0: do not count by steps.
        keywords: further ones of the model.
    Returns: name -> (B,): `nats`; `targets`; where the model gives logits `hits`, targets that are its first guess; of
        a recurrent model `steps`, thinking steps of the positions with a target. And `step_counts`, (B, R + 1), how
        many of them took 0, 1, ... R steps, where they are counted.
    """
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


def unigram_nats(counts: Tensor, targets: Tensor) -> float:
    """Mean nats of targets (N,) under the counts (V,) of the training split's tokens, each counted once more."""
    frequencies = counts.double() + 1
    return -(frequencies / frequencies.sum()).log()[targets].mean().item()
