"""Evaluation of a language model: bits per byte on held-out text, next to gzip, lzma and a unigram baseline. For
recurrent models also the loss over thinking steps, and the loss and speed with early exits."""

from functools import partial
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from dataset_loading.collators import collate_stack
from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from model.language_head import IGNORED, next_token_targets
from model.layers import in_double
from utils.console.progress import reported
from utils.evaluation.arguments.multimodal import TextEvaluationArguments
from utils.evaluation.evaluator import Evaluation, Evaluator
from utils.evaluation.tables import Column, fact_table, score_table
from utils.generation.arguments.text import GenerationArguments
from utils.generation.text import TextGenerator, check_tokenizer, split_windows
from utils.metrics.text import (
    compressed_bits_per_byte,
    model_inputs,
    ratios,
    token_counts,
    unigram_nats,
    window_sums,
    windows_at_once,
)
from utils.metrics.timing import Stopwatch

SPEED_PROMPTS = 4  # prompts continued one after another to time generation; the first one is the warm-up
COMPRESSED_BYTES = 16_000_000  # of the evaluated text, for gzip and lzma
DECODED_TOKENS = 1 << 20  # tokens that are decoded at once
ROW_NAMES = {"model": "this model", "unigram": "unigram", "gzip": "gzip -9", "lzma": "lzma -9e"}
COLUMNS = {
    "steps": Column("steps", "{:d}"),
    "threshold": Column("threshold", "{:g}"),
    "bits_per_byte": Column("bits per byte", "{:.4f}"),
    "loss": Column("loss", "{:.4f}"),
    "loss_difference": Column("difference", "{:+.4f}"),
    "perplexity": Column("perplexity", "{:.2f}"),
    "accuracy": Column("accuracy", "{:.4f}"),
    "thinking_steps": Column("mean steps", "{:.2f}"),
    "relative_seconds": Column("relative time", "{:.2f}"),
    "tokens_per_second": Column("tokens/s", "{:.1f}"),
}


class TextEvaluator(Evaluator):
    """Nothing is random: the timed generation is greedy."""

    arguments_class = TextEvaluationArguments
    model_class = MegaTransformerForCausalLM
    definitions: ClassVar[dict[str, str]] = {
        "loss": "Cross-entropy in nats per target token: the sum over all evaluated targets divided by their number.",
        "perplexity": "Exponential of the loss.",
        "bits_per_byte": "Sum of the cross-entropy in bits divided by the UTF-8 bytes of the targets; comparable "
        "between tokenizers.",
        "accuracy": "Share of targets that are the most probable token.",
        "unigram": "A unigram model of the tokens of the training split with add-one smoothing, on the same targets.",
        "gzip, lzma": "Compressed size of the evaluated text in bits per byte, for at most its first "
        f"{COMPRESSED_BYTES // 10**6} MB. The compressors have not seen the training split.",
        "targets_per_second": "Evaluated targets per second of the model, without data loading. A forward pass has at "
        "most --batch_size windows, and fewer (at least one) where their logits would exceed 256 MB in fp32.",
        "tokens_per_second": "New tokens per second of greedy generation at batch size 1, including the time for the "
        "prompt.",
        "thinking_steps": "The same targets with other numbers of thinking steps.",
        "exits": "Early exit: a token stops when another step changes it by less than the threshold. Mean number of "
        "steps, loss, time of whole windows relative to no exits with the same maximum number of steps, and "
        "generated tokens per second.",
    }

    @classmethod
    def of(cls, record):
        if not record.get("latents"):
            return cls
        # Models of images and audio are loaded for their runs alone.
        from utils.evaluation.multimodal.evaluator import MultimodalEvaluator

        return MultimodalEvaluator

    def load_model(self):
        model = super().load_model()
        model.lm_head.chunk_size = 0  # A loss in chunks returns no logits, which the accuracy needs.
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
        # Loss of the model and of the baselines, speed of the forward pass and of generation.
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
        title = "Bits per byte on held-out text"
        tables = [score_table(rows, COLUMNS, title=title, names=ROW_NAMES), detail_table(metrics)]
        # Recurrent models: other depths, and early exit.
        if args.thinking_steps:
            metrics["thinking_steps"] = [
                {"steps": n, **ratios(self.sums(batches, n_thinking_steps=n, exit_threshold=0.0)[0])}
                for n in sorted(set(args.thinking_steps))
            ]
            rows_by_depth = dict(enumerate(metrics["thinking_steps"]))
            columns = {name: column for name, column in COLUMNS.items() if name != "thinking_steps"}
            tables.append(score_table(rows_by_depth, columns, title="Loss over thinking steps"))
        if args.exit_thresholds:
            metrics["exits"] = self.exit_rows(dataset, batches)
            tables.append(score_table(dict(enumerate(metrics["exits"])), COLUMNS, title="Early exit"))
        curves = {"loss_by_thinking_steps": {row["steps"]: row["loss"] for row in metrics.get("thinking_steps", [])}}
        return Evaluation(metrics, rows["model"], tables, curves=curves)

    def check_flags(self) -> None:
        """Raises: ValueError: flags of the recurrent core for a model without one, exits without a criterion, or more
        steps than the model's maximum."""
        args, config = self.args, self.model.config
        # Flags that need a recurrent core, and the steps that it can take.
        flags = [name for name in ("thinking_steps", "exit_thresholds") if getattr(args, name)]
        if flags and not config.n_recurrent_layers:
            raise ValueError(f"--{flags[0]} has no effect: {self.checkpoint} has no recurrent core")
        # The largest number of steps that the flags ask for.
        n_steps = max([*args.thinking_steps, args.max_thinking_steps])
        if flags and n_steps > config.recurrent_max_thinking_steps:
            limit = config.recurrent_max_thinking_steps
            raise ValueError(
                f"{n_steps} thinking steps exceed recurrent_max_thinking_steps={limit} of {self.checkpoint}"
            )
        # The flag replaces the criterion of the configuration.
        if args.exit_criterion != "own":
            config.recurrent_exit_criterion = args.exit_criterion
        elif args.exit_thresholds and config.recurrent_exit_criterion == "none":
            raise ValueError("--exit_thresholds needs --exit_criterion: the model has recurrent_exit_criterion='none'")

    def without_exit(self) -> dict[str, float]:
        """The arguments of the model that disable early exit; empty for models without a recurrent core."""
        return {"exit_threshold": 0.0} if self.model.config.n_recurrent_layers else {}

    def sums(self, batches: DataLoader, **keywords) -> tuple[dict[str, float], float]:
        """Totals of `window_sums` and `bytes` over all evaluated windows, and the seconds of the forward passes."""
        totals: dict[str, float] = {}  # accumulated in fp64
        watch, seconds = Stopwatch(self.device), 0.0
        title = ", ".join(["loss", *(f"{name} {value}" for name, value in keywords.items())])
        for batch in reported(batches, title, len(batches), "batches"):
            inputs = model_inputs({name: value.to(self.device) for name, value in batch.items()})
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                # The forward passes alone are timed.
                start = watch.now()
                at_once = windows_at_once(self.model.config.vocab_size, inputs["labels"].shape[1])
                sums = window_sums(self.model, inputs, at_once=at_once, **keywords)
                seconds += watch.now() - start
            for name, value in {**sums, "bytes": batch["n_bytes"]}.items():
                totals[name] = totals.get(name, 0.0) + in_double(value).sum().item()
        return totals, seconds

    def baselines(
        self, dataset: TextDataset, batches: DataLoader, sums: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        """The same targets under a unigram model of the training split, and the text compressed by gzip and lzma."""
        vocab_size = self.model.config.vocab_size
        # Counts of the evaluated targets, (V,), and the first of them for the compressors.
        held_out, first_ids, n_bytes = torch.zeros(vocab_size, dtype=torch.int64), [], 0
        for batch in batches:
            inputs = model_inputs(batch)
            ids = next_token_targets(inputs["labels"], inputs["segment_ids"])  # (B, L)
            # Targets alone, (N,).
            ids = ids[ids != IGNORED]
            held_out += torch.bincount(ids, minlength=vocab_size)
            if n_bytes < COMPRESSED_BYTES:
                first_ids.append(ids.int())
                n_bytes += int(batch["n_bytes"].sum())
        # The unigram baseline needs the frequencies of the training split.
        train = TextDataset(self.cache()[0], "train", dataset.sequence_length)
        nats = unigram_nats(token_counts(train.tokens, vocab_size), held_out) * sums["targets"]
        rows = {"unigram": ratios({"nats": nats, "targets": sums["targets"], "bytes": sums["bytes"]})}
        # The compressors see the text as bytes, without special tokens.
        chunks = torch.cat(first_ids).split(DECODED_TOKENS)
        text = "".join(dataset.tokenizer.decode(chunk, skip_special_tokens=True) for chunk in chunks)
        text = text.encode()[:COMPRESSED_BYTES]
        compressed = compressed_bits_per_byte(text) if text else {}
        return {**rows, **{name: {"bits_per_byte": value} for name, value in compressed.items()}}

    def generation_speed(self, dataset: TextDataset, **keywords) -> float:
        """New tokens per second of greedy generation at batch size 1."""
        generator = TextGenerator(self.model, dataset.tokenizer)
        # Prompt and continuation fit into a training window.
        n_new = min(self.args.speed_tokens, dataset.sequence_length // 2)
        settings = GenerationArguments(max_new_tokens=n_new, temperature=0.0, **keywords)
        # One prompt at a time, as in interactive use.
        watch = Stopwatch(self.device)
        for prompt, _ in split_windows(dataset, SPEED_PROMPTS, n_new):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                generate = partial(generator.continue_tokens, settings=settings, must_fill=True)
                watch.time(generate, [prompt])
        return watch.per_second() * n_new

    def exit_rows(self, dataset: TextDataset, batches: DataLoader) -> list[dict[str, float]]:
        """One row without exits and one per threshold, with the same maximum number of steps."""
        config = self.model.config
        max_steps = self.args.max_thinking_steps or config.recurrent_test_thinking_steps
        max_steps = max_steps or config.recurrent_mean_thinking_steps
        rows: list[dict[str, float]] = []  # threshold 0: no exits
        # Loss, its time, and the speed of generation at every threshold.
        for threshold in (0.0, *sorted(set(self.args.exit_thresholds))):
            sums, seconds = self.sums(batches, n_thinking_steps=max_steps, exit_threshold=threshold)
            row = {"threshold": threshold, "most_steps": max_steps, **ratios(sums), "seconds": seconds}
            if self.args.speed_tokens:
                keywords = {"thinking_steps": max_steps, "exit_threshold": threshold}
                row["tokens_per_second"] = self.generation_speed(dataset, **keywords)
            rows.append(row)
        # Relative to the first row, which has no exits.
        for row in rows:
            row["loss_difference"] = row["loss"] - rows[0]["loss"]
            row["relative_seconds"] = row["seconds"] / rows[0]["seconds"]
        return rows


def detail_table(metrics: dict[str, Any]) -> Table:
    """Size and speed."""
    facts = {
        "parameters": f"{metrics['model']['parameters']:,}",
        "evaluated targets, bytes": f"{metrics['n_targets']:,}, {metrics['n_bytes']:,}",
        "targets per second": f"{metrics['targets_per_second']:.0f}",
    }
    if "tokens_per_second" in metrics:
        facts["generated tokens per second"] = f"{metrics['tokens_per_second']:.1f}"
    return fact_table("Model", facts)
