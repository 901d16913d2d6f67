"""Progress of preprocessing, on a terminal and in logs."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class ProgressReport:
    """A progress bar on a terminal, a log line every half minute elsewhere.

    Args: total: rows; None where their number is not known.
    """

    def __init__(self, name: str, total: int | None):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # No refreshing thread: worker processes are forked later, and a forked process has the locks of its parent's
        # threads, but not the threads.
        self.bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self.task = self.bar.add_task(name, total=total)
        self.name, self.total, self.done = name, total, 0
        self.started = self.shown = time.monotonic()
        self.interval = 0.2 if console.is_terminal else 30.0  # seconds between redraws, or log lines

    def __enter__(self) -> "ProgressReport":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.show()
        self.bar.stop()

    def advance(self) -> None:
        """Count one row."""
        self.done += 1
        if time.monotonic() > self.shown + self.interval:
            self.show()
            if self.bar.disable:
                of_total = f" of {self.total}" if self.total is not None else ""
                logger.info("%s: %d%s rows", self.name, self.done, of_total)

    def show(self) -> None:
        """Redraw the bar."""
        self.shown = time.monotonic()
        # Rows per second since the start.
        speed = f"{self.name} {self.done / max(self.shown - self.started, 1e-3):.0f}/s"
        self.bar.update(self.task, completed=self.done, description=speed, refresh=True)
