"""The multimodal transformer on text, images and audio: trainer, and what fits its configuration to the caches.

B rows, n spans of latents, N copies of spans in streams, m tokens, W latent values of a token.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dataset_loading.multimodal import MultimodalDataset, Task
from dataset_loading.text.windows import bits_per_byte
from model.dropout import has_dropout
from model.language_head import next_token_targets
from model.layers import in_double, to_device, widen
from model.multimodal.layout import Part, Stream, build_stream, join_streams, target_kinds, target_places
from model.multimodal.spans import Spans, spans_in
from model.thinking import Thinking
from utils.distributed import mean_across_ranks
from utils.seeds import sample_normal, sample_uniform
from utils.training.budget_batches import budget_dataloader, budget_sampler
from utils.training.multimodal import MultimodalTrainer

logger = logging.getLogger(__name__)

EVALUATED_TIMES = (0.5, 0.9)  # Of the flows' losses in evaluation; the ratio of conditions is taken at the last one.
LOWEST_RATIO = 1.2  # Below it, a flow ignores its text.
COUNTED = ("text", "begin", "length", "image", "audio")  # Kinds of targets; those of flows are noisy tokens.


class MultimodalStreamTrainer(MultimodalTrainer):
    """Trains a `MegaTransformerMultimodal`.

        loss = text_loss_weight         * sum over text targets of cross_entropy          / n_text
             + begin_loss_weight        * sum over begins of spans of cross_entropy       / n_begin
             + audio_length_loss_weight * sum over lengths of cross_entropy               / n_length
             + image_loss_weight        * sum over noisy tokens of weighted squared error / n_image
             + audio_loss_weight        * the same                                        / n_audio

    The squared error of the flow's prediction is a mean over the values of a token, each weighted by its latent
    channel. Sums are over all micro-batches and processes of an optimizer step, and so are the numbers.

    Texts that are dropped, times, noise and latents belong to (seed, step, row).

    Args:
        channel_weights: modality -> weight of each latent channel, (Z,), mean 1; without an entry 1.
    """

    host_fields = ("index", "task", "rows", "lengths")
    train_dataset: MultimodalDataset
    eval_dataset: MultimodalDataset

    def __init__(self, *, channel_weights: Mapping[str, Tensor] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.has_dropout = has_dropout(self.model)
        self.names = [name for name in ("image", "audio") if name in self.config.modalities]
        self.value_weights = {
            name: value_weights(self.config, name, weights).to(self.args.device)
            for name, weights in (channel_weights or {}).items()
        }

    # ---- Data order.

    def get_train_dataloader(self):
        """Batches of streams of like length by a budget of tokens, if there is one."""
        args = self.stage_arguments
        if not args.batch_tokens:
            return super().get_train_dataloader()
        return budget_dataloader(
            self, budget_sampler(self.train_dataset.lengths, args.batch_tokens, args, self.args.world_size, "tokens")
        )

    def rates(self, logs, steps_per_second):
        rates = super().rates(logs, steps_per_second)
        # The number of streams of a step varies with a budget of tokens.
        return {**rates, "samples_per_second": logs["samples_per_step"] * steps_per_second}

    # ---- Training.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step with their streams, and the numbers of targets per process by
        `COUNTED`, (5,)."""
        batches, _ = super(MultimodalTrainer, self).get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.zeros(len(COUNTED), dtype=torch.float64)
        batches = [
            {**batch, "streams": self.build_streams(batch, dropped=self.dropped_texts(batch))} for batch in batches
        ]
        for batch in batches:
            total += count_targets(self.config, batch["streams"])
        means = mean_across_ranks(widen(total, device))
        return batches, torch.where(means > 0, means, 1.0)

    def dropped_texts(self, batch: dict) -> list[bool]:
        """Which rows lose their text, for guidance: those of a text before a span."""
        uniforms = sample_uniform(self.args.seed, self.state.global_step, batch["index"], stream="drop", shape=())
        dropped = []
        for number, uniform in zip(batch["task"].tolist(), uniforms.tolist()):
            modalities = self.train_dataset.tasks[number].modalities
            generated = modalities[1] if modalities[0] == "text" and len(modalities) > 1 else None
            dropped.append(generated is not None and uniform < getattr(self.config, f"{generated}_condition_dropout"))
        return dropped

    def build_streams(self, batch: dict, *, dropped: list[bool] | None = None, text: str = "text") -> list[Stream]:
        """The streams of a batch.

        Args:
            dropped: rows whose first text is replaced by <null>.
            text: name of the texts in the batch.
        """
        streams = []
        n_tokens = {
            name: dict(zip(batch[name]["rows"].tolist(), batch[name]["lengths"].tolist()))
            for name in self.names
            if name in batch
        }
        for row, number in enumerate(batch["task"].tolist()):
            if (documents := batch["documents"][row]) is not None:
                streams.append(window_stream(batch["text"][row], documents))
                continue
            parts = []
            for place, name in enumerate(self.train_dataset.tasks[number].modalities):
                is_null = name == "text" and place == 0 and dropped is not None and dropped[row]
                ids = [self.config.null_token_id] if is_null else batch[text][row]
                parts.append(Part("text", ids=ids) if name == "text" else Part(name, n_tokens=n_tokens[name][row]))
            streams.append(build_stream(self.config, parts))
        return streams

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one micro-batch; see `MultimodalTrainer.training_step`."""
        assert isinstance(num_items_in_batch, Tensor), "the numbers of targets come from get_batch_samples"
        model.train()
        inputs = self._prepare_inputs(inputs)
        # Latents of the rows, times and noise.
        drawn = {name: self.draw(inputs, name) for name in self.names if name in inputs}
        counts = dict(zip(COUNTED, num_items_in_batch.float()))
        output, targets = self.forward_streams(
            model, inputs["streams"], drawn, n_targets=counts, index=inputs["index"]
        )
        terms = {"text": output.text_loss, "begin": output.begin_loss, "audio_length": output.length_loss}
        for name, prediction in output.predictions.items():
            errors = self.token_errors(prediction, targets[name], name) if name in targets else prediction  # zeros
            terms[name] = errors.sum() / counts[name]
        loss = sum(getattr(self.config, f"{name}_loss_weight") * term for name, term in terms.items())
        self.backward(loss)  # type: ignore[arg-type]

        # Log lines hold means over micro-batches, and these are parts of a sum.
        n_parts = self.current_gradient_accumulation_steps
        self.record({f"loss/{name}": term * n_parts for name, term in terms.items()})
        n_tokens = sum(len(stream) for stream in inputs["streams"])
        for name, number in (("targets_per_step", n_tokens), ("samples_per_step", len(inputs["streams"]))):
            self.record({name: torch.tensor(float(number * n_parts * self.args.world_size))})
        return loss.detach()  # type: ignore[union-attr]

    def draw(self, inputs: dict, name: str) -> dict[str, Tensor]:
        """What a step trains a modality on: `latents` sampled from the posteriors and `noise`, (n, m, W), `times`
        and `rows`, (n,)."""
        config, step, batch = self.config, self.state.global_step, inputs[name]
        index = inputs["index"][batch["rows"]]
        mean, std = batch["latents"].unbind(1)
        keywords = {"shape": mean.shape[1:]}
        posterior, noise = (
            to_device(sample_normal(self.args.seed, step, index, stream=f"{name} {kind}", **keywords), mean.device)
            for kind in ("posterior", "noise")
        )
        uniforms = sample_uniform(self.args.seed, step, index, stream=f"{name} time", shape=())
        sampling, mean_time, std_time = (
            getattr(config, f"{name}_time_{part}") for part in ("sampling", "mean", "std")
        )
        process = self.model.processes[name]
        times = to_device(process.training_times(uniforms, sampling, mean=mean_time, std=std_time), mean.device)
        return {"latents": mean + std * posterior, "noise": noise, "times": times, "rows": batch["rows"]}

    def forward_streams(
        self,
        model,
        streams: list[Stream],
        drawn: Mapping[str, Mapping[str, Tensor]],
        *,
        index: Tensor | None = None,
        n_targets: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, dict[str, tuple[Tensor, Spans]]]:
        """The model's output for streams, and for each modality with noise copies their targets (N_noisy, m, W) and
        spans.

        Args:
            drawn: of each modality what `draw` returns.
            index: of the rows in training, of which dropout and the number of thinking steps are functions.
        """
        device = self.args.device
        batch = join_streams(streams, self.config.pad_token_id or 0)
        spans, targets = {}, {}
        for name, values in drawn.items():
            numbers, places = spans_in(streams, name)  # type: ignore[arg-type]
            latents, noise, times = values["latents"], values["noise"], values["times"]
            noisy = self.model.processes[name].add_noise(latents, noise, times)
            # The latents of each copy of a span are those of its row.
            item_of = {row: item for item, row in enumerate(values["rows"].tolist())}
            items = to_device(torch.tensor([item_of[row] for row, _ in places]), device)
            is_noisy = torch.tensor([place.is_noisy for _, place in places])
            copy_of = to_device(is_noisy.nonzero()[:, 0], device)  # Numbers of the noise copies among the spans.
            is_noisy = to_device(is_noisy, device)
            copies = torch.where(is_noisy[:, None, None], noisy[items], latents[items])
            spans[name] = Spans(copies, times[items] * is_noisy, is_noisy, *to_device(numbers, device), copies=copy_of)
            chosen = spans[name].select(copy_of)
            if len(chosen.rows):
                target = self.model.processes[name].target(latents, noise, times)
                targets[name] = (target[items[copy_of]], chosen)
        # The host knows which positions are targets.
        places = target_places(self.config, next_token_targets(batch.labels))
        keywords: dict[str, Any] = {}
        if index is not None and self.is_recurrent:
            keywords["thinking"] = Thinking(**self.stream_thinking(index, batch.ids.shape[1]))
        elif self.is_recurrent:
            keywords["thinking"] = Thinking(exit_threshold=0.0)
        if index is not None and self.has_dropout:
            keywords["dropout_keys"] = self.dropout_keys({"index": index})
        output = model(
            to_device(batch.ids, device),
            to_device(batch.positions, device),
            type(batch.placement)(*(to_device(vector, device) for vector in batch.placement)),
            spans=spans,
            labels=to_device(batch.labels, device),
            target_places={name: to_device(numbers, device) for name, numbers in places.items()},
            n_targets=n_targets,
            **keywords,
        )
        return output, targets

    def stream_thinking(self, index: Tensor, length: int) -> dict[str, Any]:
        """The options of the recurrent core in this optimizer step."""
        shape = torch.empty(len(index), length, device="meta")
        keywords = self.thinking({"index": index, "input_ids": shape})
        return {"n_steps": keywords["n_thinking_steps"], "initial_state": keywords.get("initial_state")}

    def token_errors(self, prediction: Tensor, target: tuple[Tensor, Spans], name: str, *, weighted=True) -> Tensor:
        """Squared errors of tokens, means over their values, (N_noisy, m) fp32; 0 in padding."""
        values, spans = target
        errors = (prediction.float() - values).square()
        if weighted and name in self.value_weights:
            errors = errors * self.value_weights[name]
        index = torch.arange(errors.shape[1], device=errors.device)
        return errors.mean(-1).where(index < spans.lengths[:, None], 0.0)

    # ---- Evaluation.

    def evaluation_model(self):
        """As for all stages; a copy attends as the trained model does."""
        model = super().evaluation_model()
        if self.ema_model is not None:
            self.ema_model.uses_flex_attention = self.model.uses_flex_attention
        return model

    def evaluation_terms(self, model, inputs):
        """Per row: nats, hits and targets of text by task; squared errors of flows at two times, with the row's text
        and with that of another item, and their numbers of tokens. Noise is a function of the row alone."""
        streams, others = self.build_streams(inputs), self.build_streams(inputs, text="other_text")
        tasks, n_rows = self.eval_dataset.tasks, len(streams)
        terms: dict[str, Tensor] = {}
        for time in EVALUATED_TIMES:
            drawn = {name: self.evaluated(inputs, name, time) for name in self.names if name in inputs}
            output, targets = self.forward_streams(model, streams, drawn)
            if not terms:
                numbers = torch.from_numpy(inputs["task"]).to(self.args.device)
                terms = text_terms(self.config, output, streams, numbers, [task.name for task in tasks])
                terms["n_bytes"] = inputs["n_bytes"]
            changed, other_targets = self.forward_streams(model, others, drawn)
            for name in self.names:
                for kind, each, target in (("", output, targets), ("other_", changed, other_targets)):
                    sums = torch.zeros(n_rows, device=self.args.device)
                    if name in target:
                        errors = self.token_errors(each.predictions[name], target[name], name, weighted=False)
                        sums = sums.index_add(0, target[name][1].rows, errors.sum(1))
                    terms[f"{kind}{name}_t{time}"] = sums
                if time == EVALUATED_TIMES[0]:
                    counts = torch.zeros(n_rows, device=self.args.device)
                    if name in targets:
                        spans = targets[name][1]
                        counts = counts.index_add(0, spans.rows, spans.lengths.float())
                    terms[f"{name}_tokens"] = counts
        for name in self.names:
            terms[f"{name}_compared"] = compared_rows(inputs, tasks, name).to(self.args.device)
        return terms

    def evaluated(self, inputs: dict, name: str, time: float) -> dict[str, Tensor]:
        """As `draw`, at one time, from the posteriors' means."""
        batch = inputs[name]
        index = inputs["index"][batch["rows"]]
        mean = batch["latents"][:, 0]
        noise = sample_normal(self.args.seed, 0, index, stream=f"evaluation {name}", shape=mean.shape[1:])
        times = torch.full((len(mean),), time, device=mean.device)
        return {"latents": mean, "noise": to_device(noise, mean.device), "times": times, "rows": batch["rows"]}

    def evaluation_summary(self, terms):
        """Losses over the validation set. `<task>_nats` and `<task>_accuracy` per text target,
        `begin_nats` per token that begins a span; `text_bits_per_byte` of windows of text;
        `image_t0.9` a flow's squared error at a time; `condition_ratio_image` that with another item's text over that
        with the true one at the last time, of rows that have another text before the image: about 1 where text is
        ignored; without such rows it is left out. `loss` is the weighted sum of training, with
        equal weights of channels and times."""
        sums = {name: in_double(values).sum().item() for name, values in terms.items()}
        config, summary, loss = self.config, {}, 0.0
        for task in self.eval_dataset.tasks:
            if n := sums[f"{task.name}_targets"]:
                summary[f"{task.name}_nats"] = sums[f"{task.name}_nats"] / n
                if f"{task.name}_hits" in sums:
                    summary[f"{task.name}_accuracy"] = sums[f"{task.name}_hits"] / n
        n_text = sum(sums[f"{task.name}_targets"] for task in self.eval_dataset.tasks)
        nats = sum(sums[f"{task.name}_nats"] for task in self.eval_dataset.tasks)
        loss += config.text_loss_weight * nats / max(n_text, 1)
        for kind, name in (("begin", "begin"), ("length", "audio_length")):
            if n := sums[f"{kind}_targets"]:
                summary[f"{name}_nats"] = sums[f"{kind}_nats"] / n
                loss += getattr(config, f"{name}_loss_weight") * summary[f"{name}_nats"]
        if n := sums["n_bytes"]:
            summary["text_bits_per_byte"] = bits_per_byte(sums["text_nats"], int(n))
        for name in self.names:
            if not (n := sums[f"{name}_tokens"]):
                continue
            errors = [sums[f"{name}_t{time}"] / n for time in EVALUATED_TIMES]
            summary |= {f"{name}_t{time}": error for time, error in zip(EVALUATED_TIMES, errors)}
            loss += getattr(config, f"{name}_loss_weight") * sum(errors) / len(errors)
            if not sums[f"{name}_compared"]:
                continue
            last, is_compared = f"{name}_t{EVALUATED_TIMES[-1]}", terms[f"{name}_compared"].bool()
            other, own = (in_double(terms[kind][is_compared]).sum().item() for kind in (f"other_{last}", last))
            ratio = summary[f"condition_ratio_{name}"] = other / own
            if ratio < LOWEST_RATIO and self.state.global_step:
                logger.warning(
                    "condition_ratio_%s=%.2f at step %d: the %s hardly depends on its text",
                    *(name, ratio, self.state.global_step, name),
                )
        return {**summary, "loss": loss}


def compared_rows(inputs: Mapping[str, Any], tasks: Sequence[Task], name: str) -> Tensor:
    """Rows (B,) whose modality follows a text that another item's differs from: 1, others 0."""
    rows = []
    for row, number in enumerate(inputs["task"].tolist()):
        modalities = tasks[number].modalities
        follows = name in modalities and "text" in modalities[: modalities.index(name)]
        rows.append(float(follows and inputs["text"][row] != inputs["other_text"][row]))
    return torch.tensor(rows)


def value_weights(config, modality: str, weights: Tensor) -> Tensor:
    """Weights of the values of a token (W,) from those of its latent channels (Z,), mean 1."""
    weights = weights / weights.mean()
    patch = getattr(config, f"{modality}_encoder_patch_size")
    # Values of an image's token have the channel first, those of audio the frame.
    return weights.repeat_interleave(patch**2) if modality == "image" else weights.repeat(patch)


def window_stream(ids: list[int], documents: list[int]) -> Stream:
    """The stream of a window of packed documents; `documents` has the number of each token's."""
    stream = Stream()
    stream.add_documents(ids, documents)
    return stream


def count_targets(config, streams: list[Stream]) -> Tensor:
    """Targets of streams by `COUNTED`, (5,) fp64."""
    labels = torch.tensor([label for stream in streams for label in stream.labels])
    counts = [is_kind.sum().item() for is_kind in target_kinds(config, labels).values()]
    for name in ("image", "audio"):
        places = [place for stream in streams for place in stream.spans if place.is_noisy]
        counts.append(sum(place.n_tokens for place in places if place.modality == name))
    return torch.tensor(counts, dtype=torch.float64)


def text_terms(config, output, streams: list[Stream], tasks: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Per row: nats, hits and targets of text by task, and nats and targets of begins and of lengths, name -> (B,)."""
    kinds = target_kinds(config, join_streams(streams, 0).labels[:, 1:].to(output.nats.device))
    terms = {}
    for kind in ("begin", "length"):
        terms |= {f"{kind}_nats": (output.nats * kinds[kind]).sum(1), f"{kind}_targets": kinds[kind].sum(1).float()}
    for number, name in enumerate(names):
        chosen = kinds["text"] & (tasks == number)[:, None]
        terms |= {f"{name}_nats": (output.nats * chosen).sum(1), f"{name}_targets": chosen.sum(1).float()}
        if output.hits is not None:
            terms[f"{name}_hits"] = (output.hits * chosen).sum(1)
    return terms
