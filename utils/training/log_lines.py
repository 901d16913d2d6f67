"""Log lines of a training: one per logging step, evaluation and end, the same on terminals and in files."""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

WINDOW = 20  # Log lines from which the time that is left is computed.
SPEEDS = ("frames_per_second", "tokens_per_second", "samples_per_second")
# What a line has elsewhere, or does without: the step says the epoch.
LEFT_OUT = (*SPEEDS, "memory_gib", "epoch", "total_flos", "frames_per_step", "targets_per_step", "samples_per_step")


def say(line: str) -> None:
    """A line on standard output, without colors and wrapping, so that files hold what terminals show."""
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: `40 s`, `2.1 min`, `3.4 h`, `2.5 days`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    for name, size in (("min", 60), ("h", 3600)):
        if seconds < 99.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds / 86400:.1f} days"


def number(value: Any, digits: int = 4) -> str:
    """Significant digits of a float, without an exponent where it is readable; other values as they are."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in text and value < 1e9 else text


def numbers(logs: Mapping[str, Any]) -> list[str]:
    """The numbers of a log, each with its name: `loss 0.066`. Of groups, such as gan/, the losses' alone: TensorBoard
    has all."""
    shown = [name for name in logs if name not in LEFT_OUT and ("/" not in name or name.startswith("loss/"))]
    return [f"{name} {number(logs[name])}" for name in shown]


def speeds(logs: Mapping[str, Any]) -> list[str]:
    """`152 samples/s` of what is logged."""
    return [f"{number(logs[name], 3)} {name.split('_')[0]}/s" for name in SPEEDS if name in logs]


def share(step: int, n_steps: int) -> str:
    """`step 300/1200 (25 %)`."""
    return f"step {step}/{n_steps} ({100 * step / max(n_steps, 1):.0f} %)"


def seconds_left(history: Sequence[tuple[int, float]], n_steps: int) -> float | None:
    """Seconds until `n_steps` at the speed of a history of steps and their times; None: it has no two steps."""
    if not history or history[-1][0] <= history[0][0]:
        return None
    (before, earlier), (step, moment) = history[0], history[-1]
    return (moment - earlier) / (step - before) * (n_steps - step)


def log_line(
    step: int,
    n_steps: int,
    logs: Mapping[str, Any],
    history: Sequence[tuple[int, float]],
    slower_from: Iterable[int] = (),
) -> str:
    """The line of a logging step.

    Args:
        logs: its numbers by name.
        history: of this and earlier steps, with their times in seconds.
        slower_from: steps from which on each takes longer, see `utils.training.planning.phases.first_steps`. The time
            that is left knows the past alone, and says so before the first of them that is still to come.
    """
    parts = [share(step, n_steps), *numbers(logs), *speeds(logs)]
    if "memory_gib" in logs:
        parts.append(f"{logs['memory_gib']:.1f} GiB")
    if (left := seconds_left(history, n_steps)) is not None:
        coming = min((start for start in slower_from if step <= start < n_steps), default=None)
        parts.append(f"{duration(left)} left" + (f", more from step {coming} on" if coming is not None else ""))
    return "  ".join(parts)


class LogLinesCallback(TrainerCallback):
    """Prints what is logged, on rank 0:

        step 300/1200 (25 %)  loss 0.066  psnr 24.1  152 samples/s  1.2 GiB  2.1 min left
        step 300/1200 (25 %)  eval_loss 0.071  eval_psnr 23.6
        step 1200/1200 (100 %)  trained 1200 steps in 3.4 min

    The time that is left follows from this process's last steps with their evaluations and checkpoints, so that it
    holds after a resume and follows the phases of an adversary.

    Args:
        slower_from: see `log_line`.
    """

    def __init__(self, slower_from: Iterable[int] = ()):
        self.slower_from = tuple(slower_from)
        self.history: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.start = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = (state.global_step, time.perf_counter())

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.history:  # After what is shown of the untrained model, which comes once.
            self.history.append((state.global_step, time.perf_counter()))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        step, moment = state.global_step, time.perf_counter()
        if "train_runtime" in logs:
            made = f"trained {step - self.start[0]} steps in {duration(moment - self.start[1])}"
            say(f"{share(step, state.max_steps)}  {made}")
        elif any(name.startswith("eval_") for name in logs):
            say("  ".join([share(step, state.max_steps), *numbers(logs)]))
        else:
            self.history.append((step, moment))
            say(log_line(step, state.max_steps, logs, self.history, self.slower_from))
