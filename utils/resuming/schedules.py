"""The learning rate of a run whose length was changed on the way: the rest of its schedule is stretched, so that the
rate does not jump.

Lengths are pairs (step, length of the run from this step on), such as `[(0, 100), (60, 200)]`: at step 60 the run was
resumed with 200 steps in place of 100. The schedule is always that of the first length; a step has a position in it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def position(lengths: Sequence[Sequence[int]], step: int) -> float:
    """Where a step is in the schedule of the first length: the step itself, until the length changed; from there to
    the end of the last length evenly over what was left."""
    (_, whole), *changes = lengths
    begin, value, pace = 0, 0, 1
    for start, length in changes:
        if step <= start:
            break
        value, begin = value + (start - begin) * pace, start
        pace = (whole - value) / (length - start)
    return value + (step - begin) * pace


def rate_factor(kind: str, *, n_warmup_steps: int, lengths: Sequence[Sequence[int]]) -> Callable[[int], float]:
    """The factor of the peak learning rate by step, of one of transformers' schedules, stretched where the length
    changed.

    Args: n_warmup_steps: steps of linear warm-up in a run of the first length.
    """
    # transformers has no public function of the factor alone.
    unused = torch.optim.SGD([torch.zeros(1)])
    schedule = get_scheduler(kind, unused, num_warmup_steps=n_warmup_steps, num_training_steps=lengths[0][1])
    (factor,) = schedule.lr_lambdas
    return factor if len(lengths) == 1 else partial(stretched, factor, lengths)


def stretched(factor: Callable[[float], float], lengths: Sequence[Sequence[int]], step: int) -> float:
    """The factor of a schedule at a step of a run whose length changed."""
    return factor(position(lengths, step))


def later_lengths(lengths: Sequence[Sequence[int]], start: int) -> list[tuple[int, int]]:
    """The lengths of a schedule that begins at step `start` of the run, counted from there; at least one step."""
    shifted = [(max(0, step - start), max(1, length - start)) for step, length in lengths]
    # What was changed before the schedule began counts as its first length.
    n_before = sum(step == 0 for step, _ in shifted)
    return shifted[n_before - 1 :]


def apply_settings(
    optimizer: Optimizer, scheduler: LambdaLR, settings: list[dict], factor: Callable[[int], float]
) -> tuple[float, float]:
    """Give an optimizer and its schedule, both restored from a checkpoint, this run's settings and factor.

    Returns: the learning rate of the next step in the checkpoint, and now.
    """
    before = float(optimizer.param_groups[0]["lr"])
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    scheduler.base_lrs = [values["initial_lr"] for values in settings]
    scheduler.lr_lambdas = [factor] * len(settings)
    # As `LambdaLR.step` computes it: equal to the restored rate where nothing has changed.
    rates = [rate * factor(scheduler.last_epoch) for rate in scheduler.base_lrs]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return before, float(rates[0])
