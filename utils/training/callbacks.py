"""Callbacks of the stages: clean stop on a signal, numbers for TensorBoard, and the base of those that show the
output of a model for validation samples."""

import contextlib
import logging
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from utils.distributed import maximum_across_ranks

logger = logging.getLogger(__name__)


class StopOnSignalCallback(TrainerCallback):
    """SIGTERM or SIGINT: finish the step on every process, save a checkpoint, end the run.

    Launchers signal processes one after another; therefore the flag is combined over all of them after each step. The
    `deepspeed` runner does not pass signals on: send it to the process group, `kill -TERM -- -PGID`.

    Attributes:
        number: of the signal that this process got; 0: none.
        stopped_by: of the signal that ended the training, equal on all processes; 0: none did.
    """

    def __init__(self):
        self.number = self.stopped_by = 0

    def on_train_begin(self, args, state, control, **kwargs):
        # The former handlers return when training ends.
        self.previous = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number, frame):
        """Signal handler; a second signal ends the process at once."""
        if self.number:
            logger.warning("a second signal: ending at once")
            os._exit(128 + number)
        self.number = number

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped_by = self.stopped_by or maximum_across_ranks(self.number, args.device)
        if self.stopped_by:
            logger.warning("signal received: saving at step %d and stopping", state.global_step)
            # Every process takes the same decision, at the same step.
            control.should_save = True
            control.should_training_stop = True

    def end_as_signalled(self) -> None:
        """Raises: SystemExit: a signal has ended the training, with the status of one that it ends, so that a script
        does not go on with the next stage."""
        if self.stopped_by:
            logger.warning("stopped by %s; --resume_from_checkpoint goes on", signal.Signals(self.stopped_by).name)
            raise SystemExit(128 + self.stopped_by)


class ScalarLogsCallback(TrainerCallback):
    """Logged numbers in TensorBoard, in groups: `eval_x` -> eval/x, `train_x` (totals of a run) -> summary/x, a name
    with a slash as it is, any other x -> train/x.

    The writer stays open after training, for the last evaluation; transformers' own callback closes it and would open
    another one elsewhere.
    """

    def __init__(self, writer: SummaryWriter):
        self.writer = writer

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in (logs or {}).items():
            # Entries that are no numbers stay on the console.
            if isinstance(value, int | float):
                self.writer.add_scalar(grouped(name), value, state.global_step)
        self.writer.flush()


class EvaluationCallback(TrainerCallback):
    """Shows the present model in TensorBoard after each evaluation, and before the first step.

    Every process computes, because a forward of sharded weights is collective; a plain copy with averaged weights is
    run by rank 0 alone. Only rank 0, which has a writer, writes. Training is not affected: random number generators
    keep their states. Subclasses say what is computed: `compute`, and what is written: `write`.

    Args:
        trainer: whose model is shown.
        writer: None except on rank 0.
    """

    before_training = True  # Whether to show before the first step too.

    def __init__(self, trainer: Any, writer: SummaryWriter | None):
        self.trainer, self.writer = trainer, writer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.before_training:
            self.show(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.show(state.global_step)

    @torch.no_grad()
    def show(self, step: int) -> None:
        """Compute on every process, write on rank 0."""
        with unmoved_generators():
            model = self.trainer.evaluation_model()
            # A plain copy needs no collective forward: rank 0 computes alone.
            if self.writer is None and model is self.trainer.ema_model:
                return
            content = self.compute(model)
            if self.writer is not None and content is not None:
                self.write(content, step)
                self.writer.flush()

    def compute(self, model) -> Any:
        """What is shown of a model in eval mode, on every process; None for nothing this time."""
        raise NotImplementedError

    def write(self, content: Any, step: int) -> None:
        """Write the result of `compute`, on rank 0."""
        raise NotImplementedError

    def add_image(self, name: str, image: Any, step: int) -> None:
        """Write a PIL image under `images/`."""
        # (Y, X, 3), which TensorBoard calls HWC.
        self.writer.add_image(f"images/{name}", np.asarray(image), step, dataformats="HWC")


@contextlib.contextmanager
def unmoved_generators() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's random number generators at the end."""
    # torch restores its generators itself, those of the CPU and of the GPU of this process.
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)
        random.setstate(python)
        np.random.set_state(numpy)


def grouped(name: str) -> str:
    """The TensorBoard name of a logged number."""
    for prefix, group in (("eval_", "eval"), ("train_", "summary")):
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    # A name with a slash names its group.
    return name if "/" in name else f"train/{name}"
