"""How long the steps of a recipe took: the table that `recipes/demo/steps.sh` writes."""

import dataclasses
import shlex
from pathlib import Path

STEPS = "steps.tsv"
UNFINISHED = "-"  # state of the output of a command that was interrupted


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of a recipe.

    Attributes:
        stage: heading above it.
        output: file or folder that it makes.
        seconds: by the clock, over all calls of the recipe that worked on it; of a command that ran beside others,
            those for which the recipe waited for its end.
        is_complete: whether it came to its end.
        command: as a shell takes it.
    """

    stage: str
    output: str
    seconds: float
    is_complete: bool
    command: str


def read_steps(folder: Path) -> list[Step]:
    """The steps of the recipe that writes into a folder, in the order in which they were first made. The last row of
    an output counts; lines of another form, as of a half-written table, are left out."""
    try:
        lines = (folder / STEPS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    steps: dict[str, Step] = {}
    for line in lines:
        cells = line.split("\t")
        if len(cells) == 5 and cells[2].isdigit():
            stage, output, seconds, state, command = cells
            is_complete = state.partition("+")[0] != UNFINISHED
            steps[output] = Step(stage, output, float(seconds), is_complete, readable(command))
    return list(steps.values())


def readable(command: str) -> str:
    """A command whose words the shell has quoted, in the shortest quotes."""
    try:
        return shlex.join(shlex.split(command))
    except ValueError:
        return command


def by_stage(steps: list[Step]) -> dict[str, float]:
    """Seconds of each stage, in the order in which they began."""
    seconds: dict[str, float] = {}
    for step in steps:
        seconds[step.stage] = seconds.get(step.stage, 0.0) + step.seconds
    return seconds


def duration(seconds: float) -> str:
    """`1 h 04 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
