"""What TensorBoard shows of a text model: continuations of validation prompts, and histograms of thinking steps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from utils.pictures import spread
from utils.text_generation import GenerationArguments, TextGenerator

GREEDY = GenerationArguments(temperature=0.0)
SAMPLED = GenerationArguments(temperature=1.0, top_p=0.95)


def split_windows(dataset: Any, n_samples: int, n_new: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and their true continuations out of a data set of windows.

    Args:
        dataset: samples with `input_ids` and `segment_ids`, (L,).
        n_samples: windows, spread evenly over the set.
        n_new: most tokens of a continuation.
    Returns: pairs of token lists; prompt and continuation are of one document, the prompt is at least as long. A
        prompt and n_new tokens fit into a window if n_new is at most half of one.
    """
    pairs = []
    for index in spread(len(dataset), n_samples):
        sample = dataset[index]
        runs = np.split(sample["input_ids"].numpy(), np.flatnonzero(np.diff(sample["segment_ids"].numpy())) + 1)
        document = max(runs, key=len).tolist()
        cut = max(-(-len(document) // 2), len(document) - n_new)
        pairs.append((document[:cut], document[cut : cut + n_new]))
    return pairs


class TextSamples(TrainerCallback):
    """After each evaluation: validation prompts with their true, the likeliest and a drawn continuation.

    Args:
        writer: None except on rank 0.
        n_samples: prompts.
        n_tokens: most new tokens; at most half a window is made.
    """

    trainer: Any

    def __init__(self, writer: SummaryWriter | None, n_samples: int, n_tokens: int):
        self.writer, self.n_samples, self.n_tokens = writer, n_samples, n_tokens

    def on_evaluate(self, args, state, control, **kwargs):
        trainer = self.trainer
        model = trainer.evaluation_model()
        # Weights that may be sharded are run by all processes, a plain copy by the one that writes.
        if self.writer is None and model is trainer.ema_model:
            return
        generator = TextGenerator(trainer.accelerator.unwrap_model(model), trainer.tokenizer)
        n_new = min(self.n_tokens, trainer.eval_dataset.sequence_length // 2)
        pairs = split_windows(trainer.eval_dataset, self.n_samples, n_new)
        prompts = [prompt for prompt, _ in pairs]
        exits = {} if trainer.exits(model) or not trainer.is_recurrent else {"exit_threshold": 0.0}
        made = [
            generator.continue_tokens(prompts, dataclasses.replace(settings, max_new_tokens=n_new, **exits))
            for settings in (GREEDY, SAMPLED)
        ]
        for number, ((prompt, truth), greedy, sampled) in enumerate(zip(pairs, *made)):
            parts = {"prompt": prompt, "true continuation": truth, "likeliest": greedy, "drawn": sampled}
            if self.writer is not None:
                shown = {name: generator.decode(ids) for name, ids in parts.items()}
                self.writer.add_text(f"samples/{number:02}", as_markdown(shown), state.global_step)
        if self.writer is not None:
            self.writer.flush()


def as_markdown(parts: dict[str, str]) -> str:
    """Titled blocks of text as they are, which TensorBoard shows without interpreting them."""
    blocks = []
    for title, text in parts.items():
        lines = "\n".join(f"    {line}" for line in text.splitlines() or [""])
        blocks.append(f"**{title}**\n\n{lines}")
    return "\n\n".join(blocks)


class ThinkingStepsHistograms(TrainerCallback):
    """After each evaluation, for recurrent models.

    thinking_steps/drawn      steps of the optimizer steps since the last evaluation
    thinking_steps/used       steps of the validation tokens, where tokens exit early

    Args: writer: None except on rank 0.
    """

    trainer: Any

    def __init__(self, writer: SummaryWriter | None):
        self.writer = writer

    def on_evaluate(self, args, state, control, **kwargs):
        drawn, used = self.trainer.drawn_steps, self.trainer.used_steps
        if self.writer is not None and drawn:
            add_counts(self.writer, "thinking_steps/drawn", np.bincount(drawn), state.global_step)
        if self.writer is not None and used is not None:
            add_counts(self.writer, "thinking_steps/used", used, state.global_step)
        drawn.clear()


def add_counts(writer: SummaryWriter, name: str, counts: Sequence[float] | np.ndarray, step: int) -> None:
    """A histogram of whole numbers: `counts[k]` of them are k."""
    counts = np.asarray(counts, dtype=np.float64)
    numbers = np.arange(len(counts))
    present = numbers[counts > 0]
    writer.add_histogram_raw(
        name,
        min=float(present[0]),
        max=float(present[-1]),
        num=int(counts.sum()),
        sum=float(counts @ numbers),
        sum_squares=float(counts @ numbers**2),
        bucket_limits=(numbers + 0.5).tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
