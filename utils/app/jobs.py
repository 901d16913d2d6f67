"""Jobs of the page: one computes at a time, shows what it has so far, and stops where it is cancelled."""

import contextlib
import html
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from utils.command_line import explanation_of

logger = logging.getLogger(__name__)

QUEUE = "models"  # The queue of the page that all jobs wait in.
UNCHANGED = object()  # An output that keeps its value.
POLL_SECONDS = 0.1
SILENCE_SECONDS = 1.0  # After so long without a report, the page looks whether the visitor is still there.
END_SECONDS = 30.0  # So long is waited for a job that was cancelled.
WAITING = "waiting: a cancelled job has not reached its end yet"
CANCELLING = "cancelling: it ends at its next step, or when the checkpoint has been loaded"
CANCELLED = "cancelled"

Report = Callable[..., None]


class Cancelled(Exception):
    """The visitor has stopped the job, or has left."""


class Job:
    """One run of a function in a thread of its own, and what it has reported so far.

    Args:
        work: called with `Job.report` and `values`; returns its last outputs.
        lock: held while it computes.
        waiting: outputs while another job has the lock.
        owner: what `Jobs.cancel` finds it by.
    """

    def __init__(
        self,
        work: Callable[..., Sequence[Any]],
        values: Sequence[Any],
        lock: threading.Lock,
        *,
        waiting: Sequence[Any],
        owner: Hashable = None,
    ):
        self.work, self.values, self.lock, self.waiting, self.owner = work, values, lock, waiting, owner
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
            self.changed.notify_all()

    def cancel(self) -> None:
        """Show nothing more, and end at the next report."""
        with self.changed:
            self.is_cancelled = True
            self.changed.notify_all()

    def run(self) -> None:
        """Wait for the others, compute, and keep the outputs or the error."""
        try:
            self.take_turn()
            with contextlib.ExitStack() as stack:
                stack.callback(self.lock.release)
                stack.enter_context(warnings_of_thread(self.warnings))
                self.report(*self.work(self.report, *self.values))
        except Cancelled:
            pass
        except Exception as error:
            self.error = error
        except BaseException as error:  # Such as SystemExit, which ends a thread without a word.
            self.error = RuntimeError(f"the job was ended by {type(error).__name__}")
        finally:
            with self.changed:
                self.is_done = True
                self.changed.notify_all()

    def take_turn(self) -> None:
        """Take the lock, and say so where that takes a while. Raises: Cancelled: the job was cancelled meanwhile."""
        if self.lock.acquire(timeout=POLL_SECONDS):
            return
        self.report(*self.waiting)
        while not self.lock.acquire(timeout=POLL_SECONDS):
            if self.is_cancelled:
                raise Cancelled

    def outputs(self) -> Iterator[list[Any]]:
        """Outputs as they come; during a long silence unchanged ones, so that who takes them can go. It ends with the
        job, or at once where that is cancelled; closing it cancels the job. Raises: what the job raises."""
        try:
            if not self.is_cancelled:
                self.thread.start()
            while not self.is_cancelled:
                with self.changed:
                    self.changed.wait_for(self.has_news, timeout=SILENCE_SECONDS)
                    outputs, self.pending, is_last = self.pending, None, self.is_done
                if outputs is not None:
                    yield outputs
                elif is_last:
                    break
                else:
                    yield [UNCHANGED] * len(self.waiting)
            if self.error is not None:
                raise self.error
        finally:
            self.cancel()
            self.is_done = self.is_done or not self.thread.is_alive()  # Its thread may not have started.

    def has_news(self) -> bool:
        """Whether there are outputs that were not shown, or the job is over."""
        return self.pending is not None or self.is_done or self.is_cancelled


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
    Attributes:
        started: jobs that have not ended yet, also cancelled ones.
        is_closed: whether no job computes any more.
        cancelled: the last jobs that their owner has cancelled, as long as they were not waited for.
    """

    def __init__(self, gr: Any):
        self.gr, self.lock = gr, threading.Lock()
        self.started: list[Job] = []
        self.is_closed = False
        self.cancelled: dict[Hashable, list[Job]] = {}

    def attach(
        self,
        button: Any,
        stop: Any,
        work: Callable[..., Sequence[Any]],
        *,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        status: Any,
        api_name: str,
    ) -> Any:
        """Start a job by a button.

        Args:
            button: starts it; a component with `click`.
            stop: cancels it, also while it waits.
            work: `work(report, *values of inputs)` computes, calls `report(*outputs)` at least once per step, and
                returns its last outputs. `report` ends it where it was cancelled. It runs in a thread of its own.
            inputs, outputs: components; an output may be `UNCHANGED`.
            status: the one of the outputs that says how far the job is.
            api_name: under which clients call it.
        Returns: the event, for what follows the job.
        """
        waiting = [WAITING if component is status else UNCHANGED for component in outputs]

        # Gradio takes the number of inputs from the caller, and waits for each of its outputs.
        def run(request: Any, *values: Any) -> Iterator[list[Any]]:
            yield from self.run(work, *values, waiting=waiting, owner=(request.session_hash, api_name))

        def cancel(request: Any) -> Any:
            return self.cancel_of((request.session_hash, api_name))

        def end(request: Any) -> Any:
            return self.end_of((request.session_hash, api_name))

        for function in (run, cancel, end):
            function.__annotations__ = {"request": self.gr.Request}  # By which Gradio knows what to pass.
        event = button.click(
            run,
            inputs=list(inputs),
            outputs=list(outputs),
            api_name=api_name,
            show_progress="minimal",
            concurrency_limit=1,
            concurrency_id=QUEUE,
        )
        # Ours is the first, which acts at once; Gradio's own takes out of the queue what has not begun yet.
        quiet = {"outputs": [status], "queue": False, "api_visibility": "private", "show_progress": "hidden"}
        pressed = stop.click(cancel, **quiet)
        pressed.then(None, cancels=[event], api_visibility="private")
        pressed.then(end, **quiet)
        return event

    def run(
        self, work: Callable[..., Sequence[Any]], *values: Any, waiting: Sequence[Any], owner: Hashable
    ) -> Iterator[list[Any]]:
        """The outputs of a job as Gradio takes them.

        Args: waiting, owner: as `Job` takes them.
        Raises: gradio.Error: what went wrong, in our words.
        """
        job = Job(work, values, self.lock, waiting=waiting, owner=owner)
        self.started = [*self.running(), job]
        if self.is_closed:
            job.cancel()
        try:
            for outputs in job.outputs():
                yield [self.gr.skip() if output is UNCHANGED else output for output in outputs]
        except Exception as error:
            self.show_warnings(job)
            raise self.error_of(error) from None
        self.show_warnings(job)

    def running(self, owner: Hashable = None) -> list[Job]:
        """The jobs that have not ended yet. Args: owner: whose; None: all."""
        return [job for job in self.started if not job.is_done and owner in (None, job.owner)]

    def cancel_of(self, owner: Hashable) -> Any:
        """Cancel the jobs of an owner. Returns: what to show of it at once."""
        jobs = self.running(owner)
        if not jobs:
            return self.gr.skip()
        self.cancelled[owner] = jobs
        for job in jobs:
            job.cancel()
        return CANCELLING

    def end_of(self, owner: Hashable) -> Any:
        """Wait for the jobs that `cancel_of` has cancelled. Returns: what to show of it."""
        jobs = self.cancelled.pop(owner, [])
        has_ended = ended(jobs, END_SECONDS)
        # The next job of this owner has words of its own.
        if not jobs or set(self.running(owner)) - set(jobs):
            return self.gr.skip()
        return CANCELLED if has_ended else CANCELLING

    def close(self, seconds: float) -> bool:
        """Cancel all jobs, also those that are yet to come, and wait so long for their threads.

        Returns: whether they have ended.
        """
        self.is_closed = True
        jobs = self.running()
        for job in jobs:
            job.cancel()
        return ended(jobs, seconds)

    def show_warnings(self, job: Job) -> None:
        """Show what a job has warned of, each once."""
        for message in dict.fromkeys(job.warnings):
            self.gr.Warning(html.escape(message, quote=False))

    def error_of(self, error: Exception) -> Exception:
        """What the page shows of an error above everything else; see `message_of`."""
        # The page renders messages as HTML.
        return self.gr.Error(html.escape(message_of(error), quote=False), duration=None, print_exception=False)


def message_of(error: Exception) -> str:
    """What a visitor is told of an error; a mistake of ours is logged with its traceback."""
    message = explanation_of(error)
    if message is None:
        logger.error("a job of the page failed", exc_info=error)
        message = f"internal error ({type(error).__name__}); the terminal of the page shows it"
    return message


def ended(jobs: Sequence[Job], seconds: float) -> bool:
    """Wait so long, in all, for the threads of jobs. Returns: whether they have ended."""
    until = time.monotonic() + seconds
    for job in jobs:
        job.thread.join(max(until - time.monotonic(), 0))
    return not any(job.thread.is_alive() for job in jobs)


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
