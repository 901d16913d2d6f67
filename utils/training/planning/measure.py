"""Does a run fit, and how long does it take: real steps of each of its phases, measured and extrapolated."""

import contextlib
import copy
import dataclasses
import io
import itertools
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, set_seed

from utils.devices import compile_in_place, peak_memory_gib
from utils.distributed import maximum_across_ranks, rank, world_size
from utils.megatransformer_utils import training_arguments
from utils.metrics.timing import Stopwatch
from utils.training.log_lines import LogLinesCallback
from utils.training.planning.batch_size import settle_batch_size
from utils.training.planning.dry_run import show_phases
from utils.training.planning.phases import Phase, check_perceptual_start, first_steps

N_WARM_UP = 3  # Steps of each phase that are not counted: kernels are chosen and states allocated in them.
RESERVE = 0.1  # Share of the peak memory that a batch size leaves for longer samples, checkpoints and fragments.
NEVER = 10**9  # Steps between log lines, evaluations and checkpoints of the Trainer.


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a run costs.

    Attributes:
        phases: of the run, from its first step or that of its checkpoint on.
        step_seconds: mean seconds of an optimizer step in each of them.
        samples_per_step: of all processes.
        evaluation_seconds: of one evaluation with everything that it shows.
        n_evaluations: of the rest of the run.
        memory_gib: peak of the GPU, or of the process on a CPU; of the process that needs most.
        n_made: steps that were made for this, those to warm up included.
    """

    phases: list[Phase]
    step_seconds: list[float]
    samples_per_step: float
    evaluation_seconds: float
    n_evaluations: int
    memory_gib: float
    n_made: int

    @property
    def hours(self) -> float:
        """Of the run, without checkpoints."""
        steps = sum((phase.end - phase.start) * time for phase, time in zip(self.phases, self.step_seconds))
        return (steps + self.n_evaluations * self.evaluation_seconds) / 3600

    def lines(self) -> list[str]:
        """The report."""
        device = "this process"
        if torch.cuda.is_available():
            device = f"the {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB of the GPU"
        lines = [f"measured {self.n_made} steps; nothing is trained or kept"]
        lines.append(f"peak memory: {self.memory_gib:.2f} GiB of {device}")
        for phase, seconds in zip(self.phases, self.step_seconds):
            rate, n_steps = self.samples_per_step / seconds, phase.end - phase.start
            lines.append(f"{phase.name}: {seconds:.4g} s per step, {rate:.4g} samples per second, {n_steps:,} steps")
        lines.append(f"evaluation: {self.evaluation_seconds:.4g} s, {self.n_evaluations:,} times")
        return [*lines, f"whole run: {self.hours:.3g} hours, without the time of saving checkpoints"]


def measured_phases(args: Any, first: int, n_steps: int) -> list[Phase]:
    """The parts of a run whose steps cost differently: before and from the steps on at which the adversary and the
    perceptual distance begin to act, or all of it.

    Args:
        first: the step that the run goes on from.
        n_steps: its length.
    """
    # The distance that acts all the time is no part of its own.
    starts = {name: start for name, start in first_steps(vars(args)).items() if start or name == "the adversary"}
    # Where something begins, a part of the run ends; parts without steps are left out.
    ends = sorted({min(max(start, first), n_steps) for start in starts.values()} | {n_steps})
    phases = []
    for begin, end in itertools.pairwise([first, *ends]):
        states = [f"{'with' if begin >= start else 'before'} {name}" for name, start in starts.items()]
        phases.append(Phase(", ".join(states) or "training", begin, end))
    return [phase for phase in phases if phase.end > phase.start]


def counted_steps(args: Any, n_steps: int) -> int:
    """Steps that are measured of each phase: whole periods of what happens at every n-th step alone."""
    period = 1
    if getattr(args, "gan_weight", 0):
        period = args.discriminator_every * (args.r1_every if args.r1_weight > 0 else 1)
    return math.ceil(n_steps / period) * period


class MeasureCallback(TrainerCallback):
    """Takes the training through steps in the middle of each phase, and the evaluation in between, and stops it.

    The evaluation comes before the counted steps of the first phase, since its copy of the model stays in memory.

    Args:
        phases: see `measured_phases`.
        n_warm_up, n_counted: steps of each phase.
        device: of the training.
        reserve: share of the peak memory so far that stays free in the counted steps.
    Attributes:
        step_seconds: of a step, by phase.
        evaluation_seconds: of the evaluation.
    """

    def __init__(
        self, phases: list[Phase], *, n_warm_up: int, n_counted: int, device: torch.device, reserve: float = 0.0
    ):
        self.device, self.reserve, self.reserved = device, reserve, torch.empty(0)
        self.n_warm_up, self.n_counted, self.watch = n_warm_up, n_counted, Stopwatch(device)
        self.phases, self.step_seconds, self.evaluation_seconds = phases, [], 0.0
        self.n_made, self.since = 0, 0.0  # Steps of the present phase, and when the clock was started.

    def next_step(self) -> int:
        """The number of the step that is made next: numbers in the middle of the phase, again from the first one where
        the phase has fewer."""
        phase, n = self.phases[len(self.step_seconds)], self.n_warm_up + self.n_counted
        first = max(phase.start, (phase.start + phase.end - n) // 2)
        return first + self.n_made % (phase.end - first)

    def on_train_begin(self, args, state, control, **kwargs):
        state.global_step = self.next_step()

    def on_step_end(self, args, state, control, **kwargs):
        # What the end of the run would do; a signal still stops the training.
        control.should_save = control.should_log = False
        control.should_training_stop &= state.global_step < state.max_steps
        self.n_made += 1
        if self.n_made == self.n_warm_up:
            n_bytes = round(self.reserve * peak_memory_gib() * 2**30)
            self.reserved = torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)
            self.since = self.watch.now()
            control.should_evaluate = not self.step_seconds
        elif self.n_made == self.n_warm_up + self.n_counted:
            self.step_seconds.append((self.watch.now() - self.since) / self.n_counted)
            self.n_made, self.reserved = 0, torch.empty(0)
        if len(self.step_seconds) == len(self.phases):
            control.should_training_stop = True
        else:
            state.global_step = self.next_step()

    def on_evaluate(self, args, state, control, **kwargs):
        now = self.watch.now()
        self.evaluation_seconds, self.since = now - self.since, now


def measure(stage: Any, n_counted: int, *, reserve: float = 0.0) -> Measurement:
    """Make real steps of a `Stage`'s run, as it would make them, in a folder that is gone afterwards.

    Args:
        n_counted: optimizer steps that are counted of each phase.
        reserve: share of the peak memory that stays free in them.
    Raises: ValueError, OSError: what a run would raise.
    """
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        stage.run_dir = Path(folder)
        # As in `Stage.run_alone`, without what belongs to the run's folder.
        stage.check_run()
        stage.prepare()
        config = stage.build_config()
        datasets = stage.build_datasets(config)
        settle_batch_size(stage, len(datasets["train"]), try_batch_size)
        # TensorBoard's files are in the folder; a tracker would keep a run that was none.
        stage.args.report_to = ["tensorboard"] if "tensorboard" in stage.args.report_to else ["none"]
        args = copy.copy(stage.args)
        args.eval_steps = args.save_steps = args.logging_steps = NEVER
        training = training_arguments(args, stage.run_dir)
        n_steps, _ = stage.count_steps(datasets["train"], world_size())
        check_perceptual_start(args, n_steps)  # The trainer's steps may be more.
        first = stage.resumption.step if stage.resumption is not None else 0
        phases = measured_phases(args, min(first, n_steps - 1), n_steps)
        n_warm_up, n_counted = min(N_WARM_UP, n_counted), counted_steps(args, n_counted)
        training.max_steps = max(n_steps, len(phases) * (n_warm_up + n_counted))
        set_seed(args.seed)
        trainer = stage.build_trainer(stage.build_trained_model(config), datasets, training, n_steps=n_steps)
        if args.compile_model:
            compile_in_place(trainer.model)
        # Added last: it is called after the other callbacks, whose time counts.
        device, counts = training.device, {"n_warm_up": n_warm_up, "n_counted": n_counted}
        callback = MeasureCallback(phases, **counts, device=device, reserve=reserve)
        trainer.add_callback(callback)
        trainer.remove_callback(LogLinesCallback)  # Its lines would tell of a run.
        trainer.train()
        if stage.writer is not None:
            stage.writer.close()
        stage.stopping.end_as_signalled()
        return Measurement(
            phases,
            callback.step_seconds,
            samples_of_step(trainer),
            callback.evaluation_seconds,
            math.ceil(n_steps / stage.args.eval_steps) - first // stage.args.eval_steps,
            maximum_across_ranks(round(peak_memory_gib() * 2**30), device) / 2**30,
            len(phases) * (n_warm_up + n_counted),
        )


def try_batch_size(stage_class: type, args: Any, batch_size: int) -> None:
    """Make the steps of `--measure 1` with a batch size, silently; for a process of its own.

    Raises: what a run raises, also where memory is full.
    """
    logging.disable(logging.ERROR)
    args.batch_size = batch_size
    with contextlib.redirect_stdout(io.StringIO()):
        measure(stage_class(args), 1, reserve=RESERVE)


def samples_of_step(trainer: Any) -> float:
    """Mean number of samples of an optimizer step, of all processes."""
    args, sampler = trainer.args, trainer.epoch_sampler
    n_parts = args.gradient_accumulation_steps * args.world_size
    if not getattr(trainer.stage_arguments, "batch_frames", 0) and not getattr(
        trainer.stage_arguments, "batch_tokens", 0
    ):
        return args.train_batch_size * n_parts
    # A budget: the sampler counts micro-batches.
    return len(trainer.train_dataset) * n_parts / len(sampler)


def report(stage: Any) -> None:
    """Measure a stage's run, and print what it costs on rank 0."""
    measurement = measure(stage, stage.args.measure)
    if rank() == 0:
        console = Console(soft_wrap=True, highlight=False)
        for line in measurement.lines():
            console.print(line, markup=False)
        show_phases(console, stage.args, measurement.phases[-1].end)
