"""What a multimodal model predicts of given streams: nats of texts, errors of flows, steps of the core.

B streams, N spans, m tokens, W values of a token, L positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.language_head import IGNORED
from model.layers import in_double
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.layout import Part, build_stream, join_streams
from model.multimodal.spans import Spans, spans_in
from model.thinking import Thinking
from utils.console.progress import reported
from utils.evaluation.multimodal.items import Direction, others
from utils.flags.choices import SPANS
from utils.seeds import seed_of

TIMES = (0.5, 0.9)  # At which the errors of flows are measured; 0: data, 1: noise.


@dataclass
class StreamLosses:
    """Sums over some streams.

    Attributes:
        nats, targets, hits: cross-entropy of text and the token that ends it, their number, and how many of them are
            the most probable token.
        errors, tokens: mean squared errors of noisy tokens, and their number.
        steps, counts: modality -> thinking steps of its tokens, and their number; empty without a core.
    """

    nats: float = 0.0
    targets: int = 0
    hits: int = 0
    errors: float = 0.0
    tokens: int = 0
    steps: dict[str, float] | None = None
    counts: dict[str, int] | None = None


def stream_losses(
    model: MegaTransformerMultimodal,
    rows: Sequence[Sequence[Part]],
    *,
    time: float = 0.0,
    seeds: Sequence[int] = (),
    thinking: Thinking | None = None,
) -> StreamLosses:
    """Sums over streams whose last part is the target.

    Args:
        rows: parts of each stream, spans with latents.
        time: of the noisy copies.
        seeds: of the noise, one per stream.
        thinking: options of the core.
    """
    config, device = model.config, model.device
    streams = [build_stream(config, parts) for parts in rows]
    batch = join_streams(streams, config.pad_token_id or 0)
    spans: dict[str, Spans] = {}
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    for name in SPANS:
        numbers, places = spans_in(streams, name)
        if not places:
            continue
        # Noise belongs to the stream; clean copies have time 0.
        latents = [rows[row][place.part].latents.to(device) for row, place in places]  # type: ignore[union-attr]
        generators = [torch.Generator().manual_seed(seeds[row]) if seeds else None for row, _ in places]
        noise = [torch.randn(x.shape, generator=generator).to(device) for x, generator in zip(latents, generators)]
        clean, noise = (pad_sequence(values, batch_first=True) for values in (latents, noise))
        is_noisy = torch.tensor([place.is_noisy for _, place in places], device=device)
        times = torch.full((len(places),), time, device=device) * is_noisy
        noisy = model.processes[name].add_noise(clean, noise, times)
        copies = torch.where(is_noisy[:, None, None], noisy, clean)
        spans[name] = Spans(copies, times, is_noisy, *numbers.to(device))
        if is_noisy.any():
            goal = model.processes[name].target(clean, noise, times)[is_noisy]
            targets[name] = (goal, spans[name].lengths[is_noisy])
    labels = batch.labels.to(device)
    placement = type(batch.placement)(*(vector.to(device) for vector in batch.placement))
    output = model(
        batch.ids.to(device), batch.positions.to(device), placement, spans=spans, labels=labels, thinking=thinking
    )

    # Text and the token that ends it; the other special tokens are no text.
    losses = StreamLosses()
    wanted = labels[:, 1:]
    is_text = (wanted != IGNORED) & ((wanted < config.null_token_id) | (wanted == config.eos_token_id))
    losses.nats, losses.targets = in_double(output.nats * is_text).sum().item(), int(is_text.sum())
    if output.hits is not None:
        losses.hits = int((output.hits * is_text).sum())
    for name, (goal, lengths) in targets.items():
        errors = (output.predictions[name].float() - goal).square().mean(-1)
        is_token = torch.arange(errors.shape[1], device=device) < lengths[:, None]
        losses.errors += in_double(errors * is_token).sum().item()
        losses.tokens += int(is_token.sum())
    if output.thinking_steps is not None:
        losses.steps, losses.counts = modality_steps(output.thinking_steps, placement.document, spans)
    return losses


def modality_steps(steps: Tensor, document: Tensor, spans: dict[str, Spans]) -> tuple[dict, dict]:
    """Sums of thinking steps (B, L) over the tokens of each modality, and the numbers of these tokens."""
    is_text = document >= 0
    sums, counts = {}, {}
    for name, chosen in spans.items():
        places, is_token = chosen.places(steps.shape[1])
        places = places[is_token]
        sums[name], counts[name] = in_double(steps.flatten()[places]).sum().item(), len(places)
        is_text = is_text.flatten().index_fill(0, places, False).view(steps.shape)
    return {"text": in_double(steps[is_text]).sum().item(), **sums}, {"text": int(is_text.sum()), **counts}


def add_losses(total: StreamLosses, losses: StreamLosses) -> None:
    """Add the sums of further streams."""
    for name in ("nats", "targets", "hits", "errors", "tokens"):
        setattr(total, name, getattr(total, name) + getattr(losses, name))
    for name in ("steps", "counts"):
        added = getattr(losses, name)
        if added is not None:
            before = getattr(total, name) or {}
            setattr(total, name, {key: before.get(key, 0) + added.get(key, 0) for key in {**before, **added}})


class TeacherForcing:
    """Losses of a model on given streams, in batches.

    Args:
        autocast: a function that returns the context of forward passes.
        seed: of the noise, which also depends on the item.
    """

    def __init__(self, model: MegaTransformerMultimodal, *, batch_size: int, autocast: Callable[[], Any], seed: int):
        self.model, self.batch_size, self.autocast, self.seed = model, batch_size, autocast, seed

    def losses(
        self, rows: Sequence[Sequence[Part]], keys: Sequence[str], *, time: float = 0.0, **thinking: Any
    ) -> StreamLosses:
        """Sums over streams; thinking: options of the core, see `Thinking`."""
        total = StreamLosses()
        options = None if self.model.model.core is None else Thinking(**{"exit_threshold": 0.0, **thinking})
        starts = range(0, len(rows), self.batch_size)
        for start in reported(starts, f"losses, time {time:g}", len(starts), "batches"):
            batch = slice(start, start + self.batch_size)
            seeds = [seed_of(self.seed, f"{key} flow") for key in keys[batch]]
            with self.autocast():
                losses = stream_losses(self.model, rows[batch], time=time, seeds=seeds, thinking=options)
            add_losses(total, losses)
        return total

    def scores(
        self,
        direction: Direction,
        parts: dict[str, list[Part]],
        *,
        keys: Sequence[str],
        n_bytes: int = 0,
        **thinking: Any,
    ) -> dict[str, Any]:
        """Scores of a direction under the true conditions and under those of other items.

        Args:
            parts: modality -> that part of each item.
            keys: of the items.
            n_bytes: of all texts.
        Returns: for text `bits_per_byte`, `token_accuracy` and `other_bits_per_byte`; for spans `error_t0.5` and so
            on, `other_error_t0.5`, and their quotient `ratio_t0.5`; with a core `steps`, its mean steps by modality.
            Without another item those of other conditions are left out.
        """
        source, target = direction
        streams = [[part] for part in parts[target]]
        changed = []
        if source:
            streams = [list(pair) for pair in zip(parts[source], parts[target])]
            if len(streams) > 1:
                changed = [list(pair) for pair in zip(others(parts[source]), parts[target])]
        row: dict[str, Any] = {}
        for time in (0.0,) if target == "text" else TIMES:
            losses = self.losses(streams, keys, time=time, **thinking)
            other = self.losses(changed, keys, time=time, **thinking) if changed else None
            if target == "text":
                row["bits_per_byte"] = losses.nats / math.log(2) / n_bytes
                row["token_accuracy"] = losses.hits / losses.targets
                row |= {"other_bits_per_byte": other.nats / math.log(2) / n_bytes} if other else {}
            else:
                row[f"error_t{time}"] = losses.errors / losses.tokens
                if other:
                    row[f"other_error_t{time}"] = other.errors / other.tokens
                    row[f"ratio_t{time}"] = other.errors / losses.errors
            if losses.steps and losses.counts:
                row["steps"] = {name: losses.steps[name] / count for name, count in losses.counts.items() if count}
        return row
