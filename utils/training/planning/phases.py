"""When the adversary and the perceptual distance act, as steps and shares of a run, and what is wrong with that."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of a run in which the same networks train.

    Attributes:
        name: what trains, in words.
        start, end: the first step, and the one after the last; both may lie beyond the end of the run.
    """

    name: str
    start: int
    end: int

    def describe(self, n_steps: int) -> str:
        """Steps, and their share of a run of `n_steps`."""
        if self.start >= n_steps:
            return f"{self.name}: from step {self.start:,} on, beyond the end of the run"
        share = max(0, min(self.end, n_steps) - self.start) / n_steps
        return f"{self.name}: steps {self.start:,} to {self.end:,}, {share:.1%} of the run"


def adversary_phases(args: Any, n_steps: int) -> list[Phase]:
    """The phases of a run against an adversary, in order; none without one.

    Args:
        args: flags of `AdversaryArguments`, or of a stage without them.
        n_steps: optimizer steps of the run.
    """
    if not getattr(args, "gan_weight", 0):
        return []
    start = args.gan_start_step
    warm = start + args.gan_warmup_steps
    risen = warm + args.gan_ramp_steps
    return [
        Phase("reconstruction alone", 0, start),
        Phase("discriminator warms up", start, warm),
        Phase("adversarial weight rises", warm, risen),
        Phase("full adversarial weight", risen, max(risen, n_steps)),
    ]


def first_steps(flags: Mapping[str, Any]) -> dict[str, int]:
    """Name -> first step of what a run trains with besides its model, and what makes its steps slower from there on.

    Args:
        flags: values by name, of any stage.
    """
    parts = {"the adversary": "gan", "the perceptual distance": "perceptual"}
    return {
        name: int(flags[f"{flag}_start_step"])
        for name, flag in parts.items()
        if flags.get(f"{flag}_weight") and f"{flag}_start_step" in flags
    }


def check_perceptual_start(args: Any, n_steps: int) -> None:
    """Raises: ValueError: the perceptual distance never acts in a run of `n_steps`."""
    start = getattr(args, "perceptual_start_step", 0)
    if start and args.perceptual_weight and start >= n_steps:
        raise ValueError(
            f"--perceptual_start_step={start} is not reached in {n_steps} steps; give an earlier one, more steps, or "
            "--perceptual_weight 0"
        )


def check_phases(args: Any, n_steps: int) -> str:
    """What of the adversary's schedule lies beyond the end of the run, and the flags that help; "" for nothing.

    Raises: ValueError: `--gan_start_step` was given, and is not reached.
    """
    phases = adversary_phases(args, n_steps)
    if not phases:
        return ""
    _, warm_up, ramp, full = phases
    remedy = f"give {shorter_schedule(args, n_steps)}, more steps, or --gan_weight 0"
    if warm_up.start >= n_steps:
        problem = (
            f"--gan_start_step={warm_up.start} is not reached in {n_steps} steps, so that the discriminator never"
        )
        problem = f"{problem} plays; {remedy}"
        if "gan_start_step" in getattr(args, "given", ()):
            raise ValueError(problem)
        return problem
    if ramp.start >= n_steps:
        return f"the discriminator warms up until step {ramp.start} of {n_steps}, and never guides; {remedy}"
    if full.start > n_steps:
        return f"the adversarial weight rises until step {full.start}, beyond the run's {n_steps}; {remedy}"
    return ""


def shorter_schedule(args: Any, n_steps: int) -> str:
    """Flags with which the adversary starts after half of the run at the latest, and acts fully for a fifth of it."""
    limits = {"gan_start_step": n_steps // 2, "gan_warmup_steps": n_steps // 10, "gan_ramp_steps": n_steps // 5}
    return " ".join(f"--{name} {limit}" for name, limit in limits.items() if getattr(args, name) > limit)
