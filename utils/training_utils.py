"""Trainers: transformers' `Trainer` plus what every stage needs (exact data order, optimizer hooks, evaluation on
averaged weights, named loss terms; complete checkpoints are in `utils/saving.py`), and the GrokFast mixins.

The trainers of the stages are in `utils/training/` and can be imported from here.
"""

import importlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dataset_loading.collators import HostFields, batches_of
from dataset_loading.epoch_sampler import ORDER, EpochSampler
from model.adapters.lora import adapters_of, load_merged
from model.layers import to_device
from utils.checkpoints import checkpoints_in, is_complete, step_of
from utils.devices import peak_memory_gib
from utils.distributed import any_across_ranks, mean_across_ranks
from utils.optimizer_hooks import GradientEMA, GradientMA, NonFiniteGuard, OptimizerHook, WeightEMA
from utils.saving import SavingTrainer
from utils.seeds import NoiseAhead, sample_keys, sample_normal, sample_uniform

logger = logging.getLogger(__name__)

# Trainer -> its module in utils/training, which is loaded when the trainer is asked for.
TRAINERS = {
    "GANTrainer": "gan",
    "ImageVAEGANTrainer": "image_vae",
    "RecurrentVAEGANTrainer": "recurrent_vae",
    "DiffusionTrainer": "diffusion",
    "AudioDiffusionTrainer": "audio_diffusion",
    "VocoderTrainer": "vocoder",
    "AudioVAEGANTrainer": "audio_vae",
    "MultimodalTrainer": "multimodal",
    "MultimodalStreamTrainer": "streams.trainer",
}

# The interface to transformers: what the trainers override or read of its `Trainer`, most of it private. A name ->
# its parameters there (None: an attribute of the instance), and why we need it. tests/utils/test_transformers_seam.py
# names every entry that the installed transformers lacks or calls in another way.
RELIES_ON: dict[str, tuple[str | None, str]] = {
    "get_train_dataloader": ("", "batches by a budget of frames, or of images of one size"),
    "_get_train_sampler": ("train_dataset", "the data order is that of EpochSampler"),
    "get_eval_dataloader": ("eval_dataset", "clips of like length come in one batch"),
    "_run_epoch": (
        "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
        "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
        "the sampler is told its epoch, and a finished run makes no step more",
    ),
    "get_batch_samples": (
        "epoch_iterator, num_batches, device",
        "the targets of an optimizer step are counted, and noise is made a step ahead",
    ),
    "_prepare_inputs": ("inputs", "batches of our own steps go to the device"),
    "training_step": ("model, inputs, num_items_in_batch", "a stage does its own forward and backward"),
    "compute_loss": ("model, inputs, return_outputs, num_items_in_batch", "the loss of a stage without adversary"),
    "create_optimizer": ("model", "hooks are attached to the optimizer"),
    "get_decay_parameter_names": ("model", "embeddings and learned states take no weight decay"),
    "create_scheduler": ("num_training_steps, optimizer", "the discriminator has a schedule of its own"),
    "_maybe_log_save_evaluate": (
        "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate",
        "hooks are checked, and a skipped step does not spoil the sum of losses",
    ),
    "_total_loss_scalar": (None, "the sum of losses, which a skipped step must not turn into nan"),
    "_globalstep_last_logged": (None, "whether this step was logged"),
    "_train_batch_size": (None, "samples of one process and micro-batch"),
    "_memory_tracker": (None, "evaluation starts it, as transformers does"),
    "log": ("logs, start_time", "named loss terms, rates and memory join the line"),
    "evaluate": ("eval_dataset, ignore_keys, metric_key_prefix", "averaged weights, each sample once"),
    "_save_checkpoint": ("model, trial", "a checkpoint is complete or absent"),
    "_save": ("output_dir, state_dict", "tied weights are written once"),
    "_save_optimizer_and_scheduler": ("output_dir", "a thread can write them"),
    "_load_optimizer_and_scheduler": ("checkpoint", "the stage's own state is loaded with them"),
    "_load_rng_state": ("checkpoint", "a damaged file is named"),
}


def __getattr__(name: str) -> type:
    """The trainer of a stage."""
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"utils.training.{TRAINERS[name]}"), name)


class StageTrainer(SavingTrainer):
    """The Trainer of a stage.

    Attributes:
        host_fields: what of a batch the host reads, the device does not, and stays on the host, as numpy arrays.

    Args:
        stage_arguments: the stage's flags.
        stage_record: content of `stage.json` in every checkpoint.
        kwargs: as for `transformers.Trainer`.
    """

    host_fields: ClassVar[tuple[str, ...]] = ("index",)

    def __init__(self, *, stage_arguments, stage_record: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        self.data_collator = HostFields(self.data_collator, self.host_fields)
        self.stage_arguments = stage_arguments
        self.stage_record = stage_record or {}
        # Hooks around the optimizer's step, see `utils/optimizer_hooks.py`.
        self.guard = NonFiniteGuard(stage_arguments.max_skipped_steps, any_across_ranks)
        self.ema = WeightEMA(stage_arguments.ema_decay) if stage_arguments.use_ema else None
        # A plain copy of the model for the averaged weights, built at the first evaluation.
        self.ema_model = None
        self.ema_model_step = -1  # The step whose averaged weights `ema_model` holds.
        # Sums and counts of the terms since the last log line; step and time from which speeds are measured.
        self.terms: dict[str, Tensor] = {}
        self.term_counts: dict[str, int] = {}
        self.last_log = (0, time.perf_counter())
        self.has_trained = False  # Not where a finished run is resumed.
        self.saved_step = -1  # The step of the last checkpoint that this run wrote.
        # On a CPU the thread would take the cores that compute.
        self.noise_ahead = None if self.args.device.type == "cpu" else NoiseAhead(self.args.seed)
        self.next_batches: tuple = (None, [])  # The iterator of the epoch, and its micro-batches of the next step.
        self.optimizer_settings: list[dict] = []  # Of each parameter group, as the flags say.

    # ---- Data order.

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        accumulated = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        order = self.stage_record.get("sample_order", ORDER)
        self.epoch_sampler = EpochSampler(len(dataset), accumulated, self.args.seed, order=order)
        return self.epoch_sampler

    def _run_epoch(self, *, epoch: int, **kwargs):
        # Where several processes resume within an epoch, neither transformers nor accelerate tell the sampler which.
        self.epoch_sampler.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:  # Here transformers would make one step more.
            self.control.should_training_stop = True
            return
        if self.is_deepspeed_enabled and not self.has_trained:
            self.guard.watch(self.model_wrapped)
        if not self.has_trained:  # Speeds count this process's steps, from here on.
            self.last_log = (self.state.global_step, time.perf_counter())
        self.has_trained = True
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step. Beside a device, those of the next one are loaded, too, and a thread
        makes their noise."""
        if self.noise_ahead is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        # Those that were loaded a step ago, unless another epoch has begun.
        iterator, batches = self.next_batches
        if iterator is not epoch_iterator:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        following, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.next_batches = (epoch_iterator, following)
        self.noise_ahead.prepare(self.state.global_step + 1, [batch["index"] for batch in following])
        return batches, None

    def sample_numbers(self, sampler: Callable, inputs: dict, stream: str, shape) -> Tensor:
        """Random numbers (B, *shape) that belong to this step's samples, on the training device."""
        step, index = self.state.global_step, inputs["index"]
        if self.noise_ahead is None:
            numbers = sampler(self.args.seed, step, index, stream=stream, shape=shape)
        else:
            numbers = self.noise_ahead(sampler, step, index, stream=stream, shape=shape)
        return to_device(numbers, self.args.device)

    def sample_noise(self, inputs: dict, stream: str, shape) -> Tensor:
        """Standard normal noise (B, *shape) that belongs to this step's samples, on the training device."""
        return self.sample_numbers(sample_normal, inputs, stream, shape)

    def sample_uniforms(self, inputs: dict, stream: str, shape) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), that belong to this step's samples, on the training device."""
        return self.sample_numbers(sample_uniform, inputs, stream, shape)

    def dropout_keys(self, inputs: dict) -> Tensor:
        """Keys (B,) int64 of this step's samples for `model.dropout`, on the training device."""
        keys = sample_keys(self.args.seed, self.state.global_step, inputs["index"], stream="dropout")
        return to_device(keys, self.args.device)

    # ---- Optimizer.

    def gradient_filters(self) -> list[OptimizerHook]:
        """Filters between clipping and the optimizer's step, in order."""
        return []

    def optimizer_hooks(self) -> list[OptimizerHook]:
        """All hooks of the optimizer: the guard, the filters, the weight average."""
        return [self.guard, *self.gradient_filters(), *([self.ema] if self.ema else [])]

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            super().create_optimizer(model)
            self.hooks = self.optimizer_hooks()
            # In order: the guard drops non-finite gradients before a filter could store them.
            for hook in self.hooks:
                hook.attach(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # A checkpoint that is loaded next overwrites them; `ResumeCallback` lets the flags take effect again.
        groups = (optimizer or self.optimizer).param_groups
        self.optimizer_settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        return scheduler

    @property
    def run_lengths(self) -> list[list[int]]:
        """Pairs (step, length of the run from this step on), one unless a resume changed the length."""
        return self.stage_record.get("run_lengths") or [[0, self.state.max_steps]]

    def check_hooks_fired(self) -> None:
        """Raise if the engine replaced the optimizer and silently dropped the hooks."""
        # An engine may skip a step before any hook.
        silent = [] if self.guard.applied == 0 else [type(hook).__name__ for hook in self.hooks if hook.fired == 0]
        if silent:
            raise RuntimeError(
                f"{', '.join(silent)} did not run in the first optimizer step: the engine uses another optimizer. "
                'With CPU offload set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration'
            )

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.stage_step(model, inputs)

    def stage_step(self, model, inputs: dict) -> Tensor:
        """Forward and backward of one micro-batch; returns the detached loss, divided by the micro-batches of a
        step."""
        loss = super().training_step(model, inputs)
        self.judge_step()
        return loss

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch's loss, which is divided by the micro-batches of a step already."""
        engine = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # DeepSpeed would divide once more.
        self.accelerator.backward(loss, **engine)
        self.judge_step()

    def judge_step(self) -> None:
        """Let the guard decide about the optimizer step, after its last backward; DeepSpeed has stepped by now."""
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self.guard.judge()

    # ---- Skipped steps.

    def skip_problem(self) -> str:
        """Why skipped steps end the run with an error, in words; "" where they do not."""
        return self.guard.problem(is_over=self.state.global_step >= self.state.max_steps)

    def check_skipped_steps(self, loss: Tensor) -> None:
        """Raises: FloatingPointError: too many steps in a row were skipped, or all since the last good checkpoint; on
        every process. Names step, losses that were not finite, remedies, and the checkpoint to go on from.

        Args: loss: the sum of this process's losses since the last log line, a scalar.
        """
        problem = self.skip_problem()
        if not problem:
            return
        means = {"loss": mean_across_ranks(loss.clone()).item(), **self.mean_terms()}
        losses = ", ".join(f"{name} {value}" for name, value in means.items() if not math.isfinite(value))
        losses = f"not finite since the last log line: {losses}" if losses else "all losses are finite"
        step, run_dir = self.state.global_step, Path(self.args.output_dir)
        good = [folder for folder in checkpoints_in(run_dir) if step_of(folder) <= step - self.guard.in_a_row]
        good = [folder for folder in good if is_complete(folder)]
        goes_on = f"go on with --resume_from_checkpoint {good[-1]}" if good else "no checkpoint holds a trained step"
        raise FloatingPointError(
            f"step {step}: {problem} ({losses}); lower --learning_rate or --discriminator_learning_rate, look for "
            f"broken samples, or raise --max_skipped_steps; {goes_on}"
        )

    def warn_of_skipped_steps(self) -> None:
        """Close the log of a run with the number of skipped steps, if there are any."""
        guard, step = self.guard, self.state.global_step
        if guard.skipped:
            end = f", the last {guard.in_a_row} among them: its weights are those of step {step - guard.in_a_row}"
            logger.warning(
                "%d of %d optimizer steps were skipped, since their gradients were not finite%s; lower "
                "--learning_rate or look for broken samples",
                *(guard.skipped, step, end if guard.in_a_row else ""),
            )

    # ---- Logs.

    def record(self, terms: dict[str, Tensor]) -> None:
        """Add detached numbers of one micro-batch to those that the next log line averages, each where it is: on the
        host, or on the device, which nothing waits for before that line."""
        for name, value in terms.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            self.terms[name] = self.terms.get(name, 0.0) + value
            self.term_counts[name] = self.term_counts.get(name, 0) + 1

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs) -> None:
        self.background.check()
        self.check_hooks_fired()
        self.check_skipped_steps(tr_loss)
        total = self._total_loss_scalar
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        # The Trainer resets its sum by subtraction, which a skipped non-finite step would turn into nan for good.
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.nan_to_num_(0.0, 0.0, 0.0)
            self._total_loss_scalar = self._total_loss_scalar if math.isfinite(self._total_loss_scalar) else total

    def mean_terms(self) -> dict[str, float]:
        """Means of the recorded numbers over micro-batches and processes since the last log line. Every process must
        call it."""
        names = sorted(self.terms)  # The same order on every process.
        if not names:
            return {}
        means = [(self.terms[name] / self.term_counts[name]).to(self.args.device) for name in names]
        means = mean_across_ranks(torch.stack(means))
        return dict(zip(names, means.tolist(), strict=True))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self.terms:
            logs.update(self.mean_terms())
            self.terms, self.term_counts = {}, {}
            # Speeds since the last log line, peak memory, and the steps that were skipped.
            step, moment = self.last_log
            self.last_log = (self.state.global_step, time.perf_counter())
            if self.last_log[0] > step:  # Time in evaluation and saving does not count.
                logs.update(self.rates(logs, (self.last_log[0] - step) / (self.last_log[1] - moment)))
            logs["memory_gib"] = peak_memory_gib()
            if self.guard.skipped:
                logs["skipped_steps"] = self.guard.skipped
        super().log(logs, *args, **kwargs)

    def rates(self, logs: dict[str, float], steps_per_second: float) -> dict[str, float]:
        """Speeds of training to log, next to the other numbers `logs` of the line."""
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return {"samples_per_second": per_step * steps_per_second}

    # ---- Evaluation.

    def evaluation_model(self):
        """A model in eval mode to evaluate, sample and measure with: a plain copy with the averaged weights, or the
        trained model itself where there is no average. Every process must call it."""
        # The averaged weights of this step may be loaded already.
        if self.ema_model is not None and self.ema_model_step == self.state.global_step:
            return self.ema_model
        averaged = self.averaged_weights()
        # No average: the trained model, within its engine where ZeRO may shard it.
        if averaged is None:
            model = self.model_wrapped if self.is_deepspeed_enabled else self.model
            model.eval()
            return model
        # The copy is built once, and gets the averaged weights of the present step.
        if self.ema_model is None:
            with torch.random.fork_rng():  # Fresh weights, overwritten at once, must not move the run's generator.
                self.ema_model = type(self.model)(self.model.config).requires_grad_(False)
            self.ema_model.to(self.args.device).eval()
        if adapters := adapters_of(self.model):  # The copy is a plain model.
            load_merged(self.ema_model, averaged, adapters)
        else:
            self.ema_model.load_state_dict(averaged)
        self.ema_model_step = self.state.global_step
        return self.ema_model

    def evaluation_terms(self, model, inputs: dict) -> dict[str, Tensor]:
        """Metrics per sample of one validation batch, name -> (B,); `loss` must be among them."""
        raise NotImplementedError

    def batch_terms(self, model, inputs: dict) -> dict[str, Tensor]:
        """`evaluation_terms` of a batch, or of the batches of like samples that it consists of (`collate_by_length`,
        `collate_by_shape`), in the order of the samples."""
        terms = [self.evaluation_terms(model, batch) for batch in batches_of(inputs)]
        if "batches" not in inputs:
            return terms[0]
        back = inputs["rows"].argsort()
        return {name: torch.cat([batch_terms[name] for batch_terms in terms])[back] for name in terms[0]}

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """`evaluation_summary` of `evaluation_terms` over the validation set, each sample counted once whatever the
        number of processes."""
        # Terms per sample, gathered from all processes: those that only fill up the last batch are left out.
        self._memory_tracker.start()
        model = self.evaluation_model()
        gathered: dict[str, list[Tensor]] = {}
        for inputs in self.get_eval_dataloader(eval_dataset):
            terms = self.batch_terms(model, self._prepare_inputs(inputs))
            for name, values in self.accelerator.gather_for_metrics(terms).items():
                gathered.setdefault(name, []).append(values.float().cpu())

        # Summary, log line and callbacks; their time does not count as training.
        summary = self.evaluation_summary({name: torch.cat(values) for name, values in gathered.items()})
        summary |= self.evaluation_extras(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.last_log = (self.state.global_step, time.perf_counter())
        return metrics

    def evaluation_summary(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Metrics from the terms of all validation samples, name -> (N,) fp32 on the CPU: their means."""
        return {name: values.mean().item() for name, values in terms.items()}

    def evaluation_extras(self, model) -> dict[str, float]:
        """Metrics of an evaluation that are not means over samples. Every process calls it with the same model."""
        return {}

    def final_metrics(self) -> dict[str, float]:
        """The metrics of the last step; it is evaluated now unless the schedule of evaluations did so."""
        for line in self.state.log_history:
            if line["step"] == self.state.global_step and "eval_loss" in line:
                return {name: value for name, value in line.items() if name.startswith("eval_")}
        return self.evaluate()


class GrokfastEMATrainer(StageTrainer):
    """Mixed in before a stage's trainer: GrokFast with an exponential moving average (arXiv 2405.20233, Algorithm
    1)."""

    def gradient_filters(self):
        return [GradientEMA(self.stage_arguments.grokfast_alpha, self.stage_arguments.grokfast_lambda)]


class GrokFastMATrainer(StageTrainer):
    """Mixed in before a stage's trainer: GrokFast with a moving average over a window (arXiv 2405.20233, Algorithm
    2)."""

    def gradient_filters(self):
        return [GradientMA(self.stage_arguments.grokfast_window, self.stage_arguments.grokfast_lambda)]


def trainer_class_for(name: str, base: type) -> type:
    """The stage's trainer, with the GrokFast filter that `--trainer` names mixed in."""
    mixins = {"default": None, "grokfast_ema": GrokfastEMATrainer, "grokfast_ma": GrokFastMATrainer}
    mixin = mixins[name]
    return base if mixin is None else type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


def expected_steps(n_samples: int, samples_per_step: int, *, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    per_epoch = n_samples // samples_per_step
    return max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
