"""Evaluation of a language model: held-out text in bits per byte, beside what packers and token frequencies reach;
for recurrent models the loss over thinking steps, and what early exits save."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from dataset_loading.collators import collate_stack
from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from model.language_head import IGNORED, next_token_targets
from utils.evaluation.evaluator import BatchedEvaluationArguments, Evaluation, Evaluator
from utils.generation.text import GenerationArguments, TextGenerator, check_tokenizer, split_windows
from utils.metrics.text import (
    compressed_bits_per_byte,
    model_inputs,
    ratios,
    token_counts,
    unigram_nats,
    window_sums,
    windows_at_once,
)
from utils.options import option
from utils.timing import Stopwatch

SPEED_PROMPTS = 4  # prompts that are continued, one after another, to time generation; the first one warms up
PACKED_BYTES = 16_000_000  # Of the evaluated text, for gzip and lzma.
DECODED_TOKENS = 1 << 20  # At once.


@dataclasses.dataclass
class TextEvaluationArguments(BatchedEvaluationArguments):
    """Flags of the evaluation of language models."""

    thinking_steps: list[int] = option(
        [], "recurrent models: numbers of thinking steps at which the loss is measured", gt=0
    )
    exit_thresholds: list[float] = option(
        [], "recurrent models: thresholds of early exits to measure; nats (kl) or relative change", gt=0
    )
    exit_criterion: Literal["own", "kl", "latent_difference"] = option(
        "own", "criterion of early exits; own: the model's", only_with=("exit_thresholds", bool)
    )
    max_thinking_steps: int = option(
        0, "maximum number of thinking steps with exits; 0: the model's own", ge=0, only_with=("exit_thresholds", bool)
    )
    speed_tokens: int = option(64, "tokens per prompt in timed generation, at most half a window; 0: not timed", ge=0)


class TextEvaluator(Evaluator):
    """Nothing is random: generation is timed with the likeliest tokens."""

    arguments_class = TextEvaluationArguments
    model_class = MegaTransformerForCausalLM
    definitions: ClassVar[dict[str, str]] = {
        "loss": "nats per target token: sum over all evaluated targets / their number; perplexity is its exponential",
        "bits_per_byte": "sum of nats / ln 2 / UTF-8 bytes of the targets; comparable between tokenizers",
        "accuracy": "share of targets that are the likeliest token",
        "unigram": "the evaluated targets under the token frequencies of the training split, each counted once more",
        "gzip, lzma": f"packed size of the evaluated text, at most its first {PACKED_BYTES // 10**6} MB, in bits per "
        "byte; packers have not seen the training split",
        "targets_per_second": "evaluated targets over the model's time, without reading; a pass takes as many of "
        "--batch_size windows as have 256 MB of logits in fp32 together, at least one",
        "tokens_per_second": "new tokens of one sequence at a time, the likeliest ones; the prompt counts as time",
        "thinking_steps": "the same targets after other numbers of steps than the model's own",
        "exits": "tokens stop once another step changes less than the threshold: mean steps, loss, computing time of "
        "whole windows relative to no exits at the same most steps, and tokens per second of generation",
    }

    def load_model(self):
        model = super().load_model()
        model.lm_head.chunk_size = 0  # The accuracy needs logits.
        return model

    def build_dataset(self):
        folder, split = self.cache()
        dataset = TextDataset(folder, split, self.record["arguments"]["sequence_length"])
        advice = (
            f"prepare them with --tokenizer {self.checkpoint} elsewhere, and name that folder with --cached_dataset"
        )
        check_tokenizer(self.checkpoint, dataset, advice)
        return dataset

    def measure(self, dataset, indices):
        args, config = self.args, self.model.config
        self.check_flags()
        batches = DataLoader(
            Subset(dataset, indices), args.batch_size, num_workers=args.num_workers, collate_fn=collate_stack
        )
        sums, seconds = self.sums(batches, **self.without_exit())
        rows = {"model": ratios(sums), **self.baselines(dataset, batches, sums)}
        metrics: dict[str, Any] = {"scores": rows, "n_targets": int(sums["targets"]), "n_bytes": int(sums["bytes"])}
        metrics["targets_per_second"] = sums["targets"] / seconds
        metrics["model"] = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocab_size": config.vocab_size,
        }
        if args.speed_tokens:
            metrics["tokens_per_second"] = self.generation_speed(dataset, **self.without_exit())
        tables = [score_table(rows), detail_table(metrics)]
        if args.thinking_steps:
            metrics["thinking_steps"] = [
                {"steps": n, **ratios(self.sums(batches, n_thinking_steps=n, exit_threshold=0.0)[0])}
                for n in sorted(set(args.thinking_steps))
            ]
            tables.append(row_table("Loss over thinking steps", metrics["thinking_steps"]))
        if args.exit_thresholds:
            metrics["exits"] = self.exit_rows(dataset, batches)
            tables.append(row_table("Early exit", metrics["exits"]))
        curves = {"loss_by_thinking_steps": {row["steps"]: row["loss"] for row in metrics.get("thinking_steps", [])}}
        return Evaluation(metrics, rows["model"], tables, {}, curves)

    def check_flags(self) -> None:
        """Raises: ValueError: flags of the recurrent core for a model without one, exits without a criterion, or more
        steps than the model takes."""
        args, config = self.args, self.model.config
        flags = [name for name in ("thinking_steps", "exit_thresholds") if getattr(args, name)]
        if flags and not config.n_recurrent_layers:
            raise ValueError(f"--{flags[0]} has no effect: {self.checkpoint} has no recurrent core")
        most = max([*args.thinking_steps, args.max_thinking_steps])
        if flags and most > config.recurrent_max_thinking_steps:
            limit = config.recurrent_max_thinking_steps
            raise ValueError(f"{most} thinking steps exceed recurrent_max_thinking_steps={limit} of {self.checkpoint}")
        if args.exit_criterion != "own":
            config.recurrent_exit_criterion = args.exit_criterion
        elif args.exit_thresholds and config.recurrent_exit_criterion == "none":
            raise ValueError("--exit_thresholds needs --exit_criterion: the model has recurrent_exit_criterion='none'")

    def without_exit(self) -> dict[str, float]:
        """The keywords that let every token take all steps; none for models without a core."""
        return {"exit_threshold": 0.0} if self.model.config.n_recurrent_layers else {}

    def sums(self, batches: DataLoader, **keywords) -> tuple[dict[str, float], float]:
        """`window_sums` of all evaluated windows together with their `bytes`, and the seconds that the model took."""
        totals: dict[str, float] = {}
        watch, seconds = Stopwatch(self.device), 0.0
        for batch in batches:
            inputs = model_inputs({name: value.to(self.device) for name, value in batch.items()})
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                start = watch.now()
                few = windows_at_once(self.model.config.vocab_size, inputs["labels"].shape[1])
                found = window_sums(self.model, inputs, at_once=few, **keywords)
                seconds += watch.now() - start
            for name, value in {**found, "bytes": batch["n_bytes"]}.items():
                totals[name] = totals.get(name, 0.0) + value.double().sum().item()
        return totals, seconds

    def baselines(
        self, dataset: TextDataset, batches: DataLoader, sums: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        """What the same targets cost without a model: as drawn from the training split's frequencies, and packed."""
        vocab_size = self.model.config.vocab_size
        held_out, begun, n_bytes = torch.zeros(vocab_size, dtype=torch.int64), [], 0
        for batch in batches:
            inputs = model_inputs(batch)
            ids = next_token_targets(inputs["labels"], inputs["segment_ids"])
            ids = ids[ids != IGNORED]
            held_out += torch.bincount(ids, minlength=vocab_size)
            if n_bytes < PACKED_BYTES:
                begun.append(ids.int())
                n_bytes += int(batch["n_bytes"].sum())
        train = TextDataset(self.cache()[0], "train", dataset.sequence_length)
        nats = unigram_nats(token_counts(train.tokens, vocab_size), held_out) * sums["targets"]
        rows = {"unigram": ratios({"nats": nats, "targets": sums["targets"], "bytes": sums["bytes"]})}
        parts = torch.cat(begun).split(DECODED_TOKENS)
        text = "".join(dataset.tokenizer.decode(part, skip_special_tokens=True) for part in parts)
        text = text.encode()[:PACKED_BYTES]
        packed = compressed_bits_per_byte(text) if text else {}
        return {**rows, **{name: {"bits_per_byte": value} for name, value in packed.items()}}

    def generation_speed(self, dataset: TextDataset, **keywords) -> float:
        """New tokens per second of one sequence at a time."""
        generator = TextGenerator(self.model, dataset.tokenizer)
        n_new = min(self.args.speed_tokens, dataset.sequence_length // 2)
        settings = GenerationArguments(max_new_tokens=n_new, temperature=0.0, **keywords)
        watch = Stopwatch(self.device)
        for prompt, _ in split_windows(dataset, SPEED_PROMPTS, n_new):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                continued = partial(generator.continue_tokens, settings=settings, must_fill=True)
                watch.time(continued, [prompt])
        return watch.per_second() * n_new

    def exit_rows(self, dataset: TextDataset, batches: DataLoader) -> list[dict[str, float]]:
        """One row without exits and one per threshold, at the same most steps."""
        config = self.model.config
        most = self.args.max_thinking_steps or config.recurrent_test_thinking_steps
        most = most or config.recurrent_mean_thinking_steps
        rows: list[dict[str, float]] = []
        for threshold in (0.0, *sorted(set(self.args.exit_thresholds))):
            sums, seconds = self.sums(batches, n_thinking_steps=most, exit_threshold=threshold)
            row = {"threshold": threshold, "most_steps": most, **ratios(sums), "seconds": seconds}
            if self.args.speed_tokens:
                keywords = {"thinking_steps": most, "exit_threshold": threshold}
                row["tokens_per_second"] = self.generation_speed(dataset, **keywords)
            rows.append(row)
        for row in rows:
            row["loss_difference"] = row["loss"] - rows[0]["loss"]
            row["relative_seconds"] = row["seconds"] / rows[0]["seconds"]
        return rows


NAMES = {"model": "this model", "unigram": "token frequencies", "gzip": "gzip -9", "lzma": "lzma -9e"}
COLUMNS = {
    "steps": ("steps", "d"),
    "threshold": ("exit below", "g"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "loss": ("loss", ".4f"),
    "loss_difference": ("difference", "+.4f"),
    "perplexity": ("perplexity", ".2f"),
    "accuracy": ("accuracy", ".4f"),
    "thinking_steps": ("mean steps", ".2f"),
    "relative_seconds": ("time", ".2f"),
    "tokens_per_second": ("tokens/s", ".1f"),
}


def cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    """The numbers of a row as they stand in a table; "-" for what it lacks."""
    return [format(row[name], COLUMNS[name][1]) if name in row else "-" for name in columns]


def score_table(scores: dict[str, dict[str, float]]) -> Table:
    """The model beside the baselines."""
    table = Table(title="Held-out text", title_justify="left", box=SIMPLE_HEAD)
    columns = ["bits_per_byte", "loss", "perplexity", "accuracy"]
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right")
    for name, row in scores.items():
        table.add_row(NAMES[name], *cells(row, columns), style="bold" if name == "model" else "")
    return table


def row_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """One row per depth or threshold."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns = [name for name in COLUMNS if name in rows[0]]
    if "steps" in columns:
        columns.remove("thinking_steps")
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right")
    for row in rows:
        table.add_row(*cells(row, columns))
    return table


def detail_table(metrics: dict[str, Any]) -> Table:
    """Size and speed."""
    table = Table(title="Model", title_justify="left", show_header=False, box=SIMPLE_HEAD)
    table.add_row("parameters", f"{metrics['model']['parameters']:,}")
    table.add_row("evaluated targets, bytes", f"{metrics['n_targets']:,}, {metrics['n_bytes']:,}")
    table.add_row("targets per second", f"{metrics['targets_per_second']:.0f}")
    if "tokens_per_second" in metrics:
        table.add_row("generated tokens per second", f"{metrics['tokens_per_second']:.1f}")
    return table
