"""Processes that tests start in order to stop them at work, and what those of inference write."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_until(is_reached: Callable[[], bool], number: int, *, target: Callable[..., Any], args: tuple) -> int | None:
    """Call `target(*args)` in a new process, and send it a signal as soon as `is_reached()`; returns its exit code.

    The process is a fresh interpreter, since a forked one cannot use CUDA where its parent has used it.
    Raises: AssertionError: the process ended by itself before, or took more than five minutes.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    deadline = time.monotonic() + 300
    try:
        while not is_reached():
            assert process.is_alive(), f"the process ended too early, with exit code {process.exitcode}"
            assert time.monotonic() < deadline, "the process did not get far enough in five minutes"
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(20)
    finally:
        process.kill()  # Where an assertion failed, or where the signal was ignored.
    return process.exitcode


def has_files(folder: Path, n_files: int) -> Callable[[], bool]:
    """Whether a folder has that many sample files by now, as a condition for `run_until`."""
    return lambda: len(list(folder.glob("*.pt"))) >= n_files


def newest_results(folder):
    """The folder that the last run with `--output_dir folder` wrote into: `folder`, `folder`_2, ..."""
    folders = [folder, *folder.parent.glob(f"{folder.name}_[0-9]*")]
    return max(folders, key=lambda path: int(path.name[len(folder.name) + 1 :] or 1))
