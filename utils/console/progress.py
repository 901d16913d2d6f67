"""Progress of preprocessing and evaluation, on a terminal and in logs; on standard error."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class ProgressReport:
    """A progress bar on a terminal, a log line every half minute elsewhere.

    Args:
        total: items; None where their number is not known.
        unit: what an item is, in the plural.
    """

    def __init__(self, name: str, total: int | None, unit: str = "rows"):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # No refreshing thread: worker processes are forked later, and a forked process has the locks of its parent's
        # threads, but not the threads.
        self.bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self.task = self.bar.add_task(name, total=total)
        self.name, self.total, self.done, self.unit = name, total, 0, unit
        self.started = self.shown = time.monotonic()
        self.interval = 0.2 if console.is_terminal else 30.0  # seconds between redraws, or log lines

    def __enter__(self) -> "ProgressReport":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.show()
        self.bar.stop()

    def advance(self, count: int = 1) -> None:
        """Count one item, or several."""
        self.done += count
        if time.monotonic() > self.shown + self.interval:
            self.show()
            self.log()

    def show(self) -> None:
        """Redraw the bar."""
        self.shown = time.monotonic()
        # Items per second since the start, or seconds per item.
        seconds = max(self.shown - self.started, 1e-3)
        is_fast = self.done >= seconds or not self.done
        speed = f"{self.done / seconds:.0f}/s" if is_fast else f"{seconds / self.done:.1f} s each"
        self.bar.update(self.task, completed=self.done, description=f"{self.name} {speed}", refresh=True)

    def log(self) -> None:
        """A log line, where there is no terminal."""
        if self.bar.disable:
            of_total = f" of {self.total}" if self.total is not None else ""
            seconds = time.monotonic() - self.started
            logger.info("%s: %d%s %s in %.0f s", self.name, self.done, of_total, self.unit, seconds)


# Whether loops over `reported` show their progress: one at a time, and none of a training's evaluations.
IS_SHOWN = [False]


@contextlib.contextmanager
def progress_shown(is_shown: bool = True) -> Iterator[None]:
    """Show the progress of the loops over `reported` within; False: of none of them."""
    before, IS_SHOWN[0] = IS_SHOWN[0], is_shown
    try:
        yield
    finally:
        IS_SHOWN[0] = before


def reported(
    items: Iterable[Item], name: str, total: int, unit: str, *, size: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """The items; within `progress_shown`, how many of them the loop has done, but for loops inside another such one.

    Args:
        name: of the loop: a row of a table, or what is measured.
        total: sum of the sizes.
        unit: what is counted, in the plural.
        size: number of what is counted in an item, such as the samples of a batch.
    """
    if not IS_SHOWN[0]:
        yield from items
        return
    with progress_shown(False), ProgressReport(name, total, unit) as report:
        report.log()  # The first item may take minutes.
        for item in items:
            yield item
            report.advance(size(item))
        report.log()
