"""Callbacks of the stages: clean stop on a signal; numbers, images and histograms for TensorBoard.

`Stage` sets the attribute `trainer` of each.
"""

import logging
import signal

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from utils.distributed import any_across_ranks

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """SIGTERM or SIGINT: finish the step on every process, save a checkpoint, end the run.

    Launchers signal processes one after another, so that the flag is combined over all of them after each step. The
    `deepspeed` runner does not pass signals on: send it to the process group, `kill -TERM -- -PGID`.
    """

    trainer = None

    def __init__(self):
        self.signalled = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number, frame):
        """Signal handler; a second signal ends the process at once."""
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        if any_across_ranks(self.signalled, args.device):
            logger.warning("signal received: saving at step %d and stopping", state.global_step)
            control.should_save = True
            control.should_training_stop = True


class ScalarLogs(TrainerCallback):
    """Logged numbers in TensorBoard, in groups: `eval_x` -> eval/x, `train_x` (totals of a run) -> summary/x, a name
    with a slash as it is, any other x -> train/x.

    The writer stays open after training, for the last evaluation; transformers' own callback closes it and would open
    another one elsewhere.
    """

    trainer = None

    def __init__(self, writer: SummaryWriter):
        self.writer = writer

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(grouped(name), value, state.global_step)
        self.writer.flush()


def grouped(name: str) -> str:
    """The TensorBoard name of a logged number."""
    for prefix, group in (("eval_", "eval"), ("train_", "summary")):
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    return name if "/" in name else f"train/{name}"
