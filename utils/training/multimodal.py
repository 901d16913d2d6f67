"""The multimodal transformer: a trainer with a loss over all targets of an optimizer step, each of which
samples its number of thinking steps; continuations and histograms in TensorBoard.  B batch, L sequence."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from model.dropout import has_dropout
from model.layers import in_double, widen
from model.multimodal.parameters import freeze, rate_factors, split_groups
from model.thinking import sample_thinking_steps
from utils.configuration import MegaTransformerConfig
from utils.distributed import is_sharded, mean_across_ranks, rank
from utils.generation.arguments.text import GenerationArguments
from utils.generation.text import TextGenerator, split_windows
from utils.metrics.text import model_inputs, ratios, window_sums, windows_at_once
from utils.resuming.schedules import position
from utils.seeds import generators
from utils.training.callbacks import EvaluationCallback
from utils.training_utils import StageTrainer

GREEDY = GenerationArguments(temperature=0.0)
SAMPLED = GenerationArguments(temperature=1.0, top_p=0.95)


class MultimodalTrainer(StageTrainer):
    """Trains a `MegaTransformerForCausalLM`.

        loss = sum over targets of (cross_entropy + z_loss_weight * (log of the softmax's denominator)^2) / n_targets

    Both are taken over all micro-batches and processes of an optimizer step: a target has the same weight however the
    samples are split.

    Args:
        tokenizer: saved into every checkpoint.
    """

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase, **kwargs):
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        # Saved with the tokenizer, so that AutoTokenizer encodes as in training: special tokens that a text spells are
        # characters.
        self.tokenizer.split_special_tokens = self.tokenizer.init_kwargs["split_special_tokens"] = True
        self.config: MegaTransformerConfig = self.model.config
        freeze(self.model, self.stage_arguments.freeze)
        self.rate_factors = rate_factors(self.model, self.stage_arguments.learning_rates)
        self.is_recurrent: bool = self.config.n_recurrent_layers > 0
        self.has_dropout: bool = has_dropout(self.model)
        self.config.use_cache = True  # The Trainer switches it off, which the checkpoint would keep.
        self.drawn_steps: list[int] = []  # Thinking steps of the optimizer steps since the last evaluation.
        self.used_steps: np.ndarray | None = None  # How many tokens of the last evaluation took 0, 1, 2, ... steps.

    # ---- Training.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, and the number of their targets per process (a mean)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # fp64 counts exactly; fp32 up to 16 million.
        total = widen(torch.zeros(()), device)
        for batch in batches:
            total += self.model.count_targets(batch["input_ids"], batch["segment_ids"]).to(device)
        return batches, mean_across_ranks(total).clamp_min(1)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one micro-batch.

        Args: num_items_in_batch: targets of the optimizer step / processes. Engines average gradients over processes,
            so that a sum divided by this number becomes the mean over all targets.
        Returns: the micro-batch's part of the loss, detached.
        """
        assert isinstance(num_items_in_batch, Tensor), "the number of targets comes from get_batch_samples"
        model.train()
        inputs = self._prepare_inputs(inputs)
        # Forward and backward; the loss is a sum over targets already divided by their number.
        keywords = self.thinking(inputs)
        if self.has_dropout:
            keywords["dropout_keys"] = self.dropout_keys(inputs)
        output = model(**model_inputs(inputs), **keywords, n_targets=num_items_in_batch, use_cache=False)
        self.backward(output.loss)

        # Log lines hold means over micro-batches, and these are parts of a sum.
        n_parts = self.current_gradient_accumulation_steps
        terms = {"loss/cross_entropy": output.cross_entropy.sum() / num_items_in_batch, "loss/z": output.z_loss}
        self.record({name: term * n_parts for name, term in terms.items()})
        self.record({"targets_per_step": num_items_in_batch * self.args.world_size})
        return output.loss.detach()

    def thinking(self, inputs: dict) -> dict:
        """The recurrent core's keywords in this optimizer step: number of steps, and noise of the first state."""
        if not self.is_recurrent:
            return {}
        n_steps = self.draw_thinking_steps()
        keywords = {"n_thinking_steps": n_steps}
        self.record({"thinking_steps": torch.tensor(float(n_steps))})
        if self.config.recurrent_state_initialization == "normal":
            shape = (inputs["input_ids"].shape[1], self.config.hidden_size)  # (L, D) per sample
            keywords["initial_state"] = self.sample_noise(inputs, "initial_state", shape)
        return keywords

    def draw_thinking_steps(self) -> int:
        """The number of thinking steps of the present optimizer step, from (seed, step), and the process where
        `--recurrent_steps_per_rank` asks for it."""
        # One number for all processes, unless each one samples its own.
        owner = rank() if self.stage_arguments.recurrent_steps_per_rank else 0
        step = self.state.global_step
        (generator,) = generators(self.args.seed, step, torch.tensor([owner]), stream="thinking_steps")
        n_steps = sample_thinking_steps(self.config, generator, self.mean_thinking_steps())
        # Once per optimizer step, not per micro-batch.
        if self.drawn_steps_until != step:
            self.drawn_steps.append(n_steps)
            self.drawn_steps_until = step
        return n_steps

    drawn_steps_until = -1  # The optimizer step of the last entry of `drawn_steps`.

    def mean_thinking_steps(self) -> float:
        """The mean of the present optimizer step: it grows linearly from 1 over the curriculum's steps, and goes on
        evenly where a resume changed the length of the run."""
        mean = self.config.recurrent_mean_thinking_steps
        grown = self.stage_arguments.recurrent_curriculum * self.run_lengths[0][1]
        return (
            mean
            if grown == 0
            else min(mean, 1 + (mean - 1) * position(self.run_lengths, self.state.global_step) / grown)
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay acts on matrices: not on norms, biases, embeddings and learned states."""
        embeddings = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
        }
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices - embeddings]

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            super().create_optimizer(model)
            if self.stage_arguments.freeze or self.stage_arguments.learning_rates:
                split_groups(self.optimizer, self.rate_factors)
        return self.optimizer

    def rates(self, logs, steps_per_second):
        tokens = logs["targets_per_step"] * steps_per_second
        return {**super().rates(logs, steps_per_second), "tokens_per_second": tokens}

    # ---- Evaluation.

    def evaluated_depths(self) -> list[int]:
        """Numbers of thinking steps whose validation loss is measured; none for models without a core."""
        if not self.is_recurrent:
            return []
        mean, maximum = self.config.recurrent_mean_thinking_steps, self.config.recurrent_max_thinking_steps
        return sorted({min(n, maximum) for n in self.stage_arguments.eval_thinking_steps or [1, 2, mean, 2 * mean]})

    def exits(self, model) -> bool:
        """Whether the evaluated model lets tokens leave its core early. It does not where ZeRO-3 shards it: processes
        that stop at different steps would wait for each other forever."""
        has_exits = self.is_recurrent and self.config.recurrent_exit_criterion != "none"
        return has_exits and not is_sharded(model)

    def evaluation_terms(self, model, inputs):
        """`window_sums` per sample without exits, bytes, nats at every depth, and where tokens exit early their nats
        and steps. Passes that compute all logits are split."""
        # Sums without exits; logits (B, L, V) may be too large for all windows at once.
        given = model_inputs(inputs)
        no_exit: dict = {"exit_threshold": 0.0} if self.is_recurrent else {}
        few = windows_at_once(self.config.vocab_size, given["labels"].shape[1])
        if not self.config.loss_chunk_size:
            no_exit["at_once"] = few
        terms = {**window_sums(model, given, **no_exit), "bytes": inputs["n_bytes"]}

        # Nats at every depth; the depth of the pass above needs no other one.
        for depth in self.evaluated_depths():
            is_default = depth == (
                self.config.recurrent_test_thinking_steps or self.config.recurrent_mean_thinking_steps
            )
            deep = terms if is_default else window_sums(model, given, n_thinking_steps=depth, **no_exit)
            terms[f"nats_{depth}_steps"] = deep["nats"]
        if self.exits(model):
            exited = window_sums(model, given, max_steps=self.config.recurrent_max_thinking_steps, at_once=few)
            terms |= {"nats_with_exits": exited["nats"], "step_counts": exited["step_counts"]}
        return {name: value.float() for name, value in terms.items()}

    def evaluation_summary(self, terms):
        """`ratios` of sums over the validation set, and the losses at every depth and with exits."""
        sums = {name: in_double(values).sum(0) for name, values in terms.items()}
        counts = sums.pop("step_counts", None)
        # Without exits all targets take the same number of steps, which is no metric.
        summary = ratios({name: value.item() for name, value in sums.items() if name != "steps"})
        for name in sums:
            if name.startswith("nats_"):
                summary[f"loss_{name.removeprefix('nats_')}"] = (sums[name] / sums["targets"]).item()
        # With exits: how many targets took 0, 1, 2, ... steps, and the mean.
        if counts is not None:
            self.used_steps = counts.numpy()
            summary["thinking_steps"] = (counts @ torch.arange(len(counts)).double() / counts.sum()).item()
        return summary

    # ---- Checkpoints.

    def save_extras(self, folder):
        super().save_extras(folder)
        if rank() == 0:
            self.tokenizer.save_pretrained(folder)


class TextSamplesCallback(EvaluationCallback):
    """Logs validation prompts with their true, a greedy and a sampled continuation.

    Args:
        n_samples: prompts.
        n_tokens: maximum of new tokens; at most half a window is generated.
    """

    before_training = False

    def __init__(self, trainer, writer, *, n_samples: int, n_tokens: int):
        super().__init__(trainer, writer)
        self.n_samples, self.n_tokens = n_samples, n_tokens

    def compute(self, model):
        trainer = self.trainer
        generator = TextGenerator(trainer.accelerator.unwrap_model(model), trainer.tokenizer)
        n_new = min(self.n_tokens, trainer.eval_dataset.sequence_length // 2)
        pairs = split_windows(trainer.eval_dataset, self.n_samples, n_new)
        prompts, truths = [prompt for prompt, _ in pairs], [truth for _, truth in pairs]
        # Threshold 0 keeps tokens from leaving the core early, see `MultimodalTrainer.exits`.
        exits = {} if trainer.exits(model) or not trainer.is_recurrent else {"exit_threshold": 0.0}
        greedy, sampled = (
            generator.continue_tokens(prompts, dataclasses.replace(settings, max_new_tokens=n_new, **exits))
            for settings in (GREEDY, SAMPLED)
        )
        # Token ids of the four texts of each sample, decoded.
        names = ("true continuation", "greedy", "sampled")
        rows = []
        for prompt, *ids in zip(prompts, truths, greedy, sampled, strict=True):
            texts = {name: generator.decode(row, prompt) for name, row in zip(names, ids, strict=True)}
            rows.append({"prompt": generator.decode(prompt), **texts})
        return rows

    def write(self, content, step):
        for number, texts in enumerate(content):
            self.writer.add_text(f"samples/{number:02}", as_markdown(texts), step)


def as_markdown(texts: dict[str, str]) -> str:
    """Blocks of text under their titles, which TensorBoard shows without interpreting them."""
    blocks = []
    for title, text in texts.items():
        lines = "\n".join(f"    {line}" for line in text.splitlines() or [""])
        blocks.append(f"**{title}**\n\n{lines}")
    return "\n\n".join(blocks)


class ThinkingStepsCallback(EvaluationCallback):
    """Logs histograms of the number of thinking steps of a recurrent model.

    thinking_steps/drawn      steps of the optimizer steps since the last evaluation
    thinking_steps/used       steps of the validation tokens, where tokens exit early
    """

    before_training = False

    def show(self, step):
        drawn, used = self.trainer.drawn_steps, self.trainer.used_steps
        if self.writer is not None and drawn:
            add_counts(self.writer, "thinking_steps/drawn", np.bincount(drawn), step=step)
        if self.writer is not None and used is not None:
            add_counts(self.writer, "thinking_steps/used", used, step=step)
        drawn.clear()  # On every process, all of which collect them.


def add_counts(writer: SummaryWriter, name: str, counts: Sequence[float] | np.ndarray, *, step: int) -> None:
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
