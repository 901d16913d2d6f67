"""Worker processes of the preprocessing driver: tasks go out in chunks, results come back in order."""

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from typing import Any

import torch

from utils.devices import usable_cpus

CHUNK = 8  # Tasks that a worker gets at once.


def map_in_workers(
    function: Callable[[Any], Any], tasks: Iterable[Any], n_workers: int, *, chunk: int = CHUNK
) -> Iterator[Any]:
    """`map(function, tasks)` by worker processes; results come in the order of the tasks.

    Args:
        function: picklable; its results too.
        n_workers: processes; 0: this process does the work; -1: one per CPU.
        chunk: tasks that a worker gets at once.
    Raises: ChildProcessError: a worker died. What the function raises is raised here.
    """
    n_workers = usable_cpus() if n_workers < 0 else n_workers
    if n_workers == 0:
        yield from map(function, tasks)
        return
    # About two chunks per worker are pending: workers never wait, and the source is not read far ahead.
    tasks, pool = iter(tasks), ProcessPoolExecutor(n_workers, initializer=start_worker)
    pending: deque[Future] = deque()
    try:
        while tasks_of_chunk := list(itertools.islice(tasks, chunk)):
            pending.append(pool.submit(map_chunk, function, tasks_of_chunk))
            if len(pending) > 2 * n_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory; run the same command with fewer --num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """A worker has one thread, leaves Ctrl-C to the main process, and ends when that dies."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # A killed main process cannot end its workers; each watches for that itself.
    parent = parent_process()
    assert parent is not None, "start_worker runs in a worker process"

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def map_chunk(function: Callable[[Any], Any], tasks: list[Any]) -> list[Any]:
    """Several tasks in one worker."""
    return [function(task) for task in tasks]
