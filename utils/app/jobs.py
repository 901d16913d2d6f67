"""Jobs of the page: one computes at a time, shows what it has so far, and stops where it is cancelled."""

import contextlib
import html
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from utils.command_line import explanation_of

logger = logging.getLogger(__name__)

QUEUE = "models"  # The queue of the page that all jobs wait in.
UNCHANGED = object()  # An output that keeps its value.
POLL_SECONDS = 0.1

Report = Callable[..., None]


class Cancelled(Exception):
    """The visitor has stopped the job, or has left."""


class Job:
    """One run of a function in a thread of its own, and what it has reported so far.

    Args:
        work: called with `Job.report` and `values`; returns its last outputs.
        lock: held while it computes.
    """

    def __init__(self, work: Callable[..., Sequence[Any]], values: Sequence[Any], lock: threading.Lock):
        self.work, self.values, self.lock = work, values, lock
        self.changed = threading.Condition()
        self.is_cancelled, self.is_done = False, False
        self.pending: list[Any] | None = None  # The latest outputs that were not shown yet.
        self.warnings: list[str] = []
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def report(self, *outputs: Any) -> None:
        """Show outputs, of which `UNCHANGED` ones stay as they are; where nobody looked since, they replace earlier
        ones. Raises: Cancelled: the job was cancelled."""
        with self.changed:
            if self.is_cancelled:
                raise Cancelled
            earlier = self.pending or [UNCHANGED] * len(outputs)
            self.pending = [old if new is UNCHANGED else new for old, new in zip(earlier, outputs, strict=True)]
            self.changed.notify()

    def run(self) -> None:
        """Wait for the others, compute, and keep the outputs or the error."""
        try:
            while not self.lock.acquire(timeout=POLL_SECONDS):
                if self.is_cancelled:
                    raise Cancelled
            with contextlib.ExitStack() as stack:
                stack.callback(self.lock.release)
                stack.enter_context(warnings_of_thread(self.warnings))
                self.report(*self.work(self.report, *self.values))
        except Cancelled:
            pass
        except Exception as error:
            self.error = error
        with self.changed:
            self.is_done = True
            self.changed.notify()

    def outputs(self) -> Iterator[list[Any]]:
        """Outputs as they come. Closing it cancels the job. Raises: what the job raises."""
        self.thread.start()
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.pending is not None or self.is_done)
                    outputs, self.pending, is_last = self.pending, None, self.is_done
                if outputs is not None:
                    yield outputs
                elif is_last:
                    break
            if self.error is not None:
                raise self.error
        finally:
            self.is_cancelled = True


@contextlib.contextmanager
def warnings_of_thread(messages: list[str]) -> Iterator[None]:
    """Append what this thread logs as a warning to `messages`."""
    handler, thread = logging.Handler(logging.WARNING), threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class Jobs:
    """Runs the jobs of all tabs, one at a time.

    Args: gr: the package gradio.
    """

    def __init__(self, gr: Any):
        self.gr, self.lock = gr, threading.Lock()

    def attach(
        self,
        button: Any,
        stop: Any,
        work: Callable[..., Sequence[Any]],
        *,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
    ) -> Any:
        """Start a job by a button.

        Args:
            button: starts it; a component with `click`.
            stop: cancels it, also while it waits.
            work: `work(report, *values of inputs)` computes, calls `report(*outputs)` at least once per step, and
                returns its last outputs. `report` ends it where it was cancelled. It runs in a thread of its own.
            inputs, outputs: components; an output may be `UNCHANGED`.
            api_name: under which clients call it.
        Returns: the event, for what follows the job.
        """

        # Gradio takes the number of inputs from the caller, and waits for each of its outputs.
        def run(*values: Any) -> Iterator[list[Any]]:
            yield from self.run(work, *values)

        event = button.click(
            run,
            inputs=list(inputs),
            outputs=list(outputs),
            api_name=api_name,
            show_progress="minimal",
            concurrency_limit=1,
            concurrency_id=QUEUE,
        )
        stop.click(None, cancels=[event], api_visibility="private")
        return event

    def run(self, work: Callable[..., Sequence[Any]], *values: Any) -> Iterator[list[Any]]:
        """The outputs of a job as Gradio takes them. Raises: gradio.Error: what went wrong, in our words."""
        job = Job(work, values, self.lock)
        try:
            for outputs in job.outputs():
                yield [self.gr.skip() if output is UNCHANGED else output for output in outputs]
        except Exception as error:
            self.show_warnings(job)
            raise self.error_of(error) from None
        self.show_warnings(job)

    def show_warnings(self, job: Job) -> None:
        """Show what a job has warned of, each once."""
        for message in dict.fromkeys(job.warnings):
            self.gr.Warning(html.escape(message, quote=False))

    def error_of(self, error: Exception) -> Exception:
        """What the page shows of an error; a mistake of ours is logged with its traceback."""
        message = explanation_of(error)
        if message is None:
            logger.error("a job of the page failed", exc_info=error)
            message = f"internal error ({type(error).__name__}); the terminal of the page shows it"
        # The page renders messages as HTML.
        return self.gr.Error(html.escape(message, quote=False), duration=None, print_exception=False)


class Clock:
    """Says how far a job is."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def progress(self, n_done: int, n_total: int, unit: str = "step") -> str:
        """Such as "step 3 of 20, 1.2 s"."""
        return f"{unit} {n_done} of {n_total}, {self.seconds()}"

    def seconds(self) -> str:
        """Such as "1.2 s"."""
        return f"{time.perf_counter() - self.start:.1f} s"

    def rate(self, n_done: int, unit: str) -> str:
        """Such as "30 tokens in 1.2 s, 25.0 per second"."""
        per_second = n_done / (time.perf_counter() - self.start)
        return f"{n_done} {unit}{'s' * (n_done != 1)} in {self.seconds()}, {per_second:.1f} per second"
