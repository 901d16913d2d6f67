"""Runs in a folder of runs, also those that have only begun: what can be watched."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dataset_loading.locks import LOCK
from utils.app.runs import MAX_DEPTH, TRAINED_BY, Runs, subfolders
from utils.checkpoints import COMPLETE, checkpoints_in, event_files


def is_run(folder: Path) -> bool:
    """Whether a run writes, or has written, in a folder."""
    return (folder / LOCK).is_file() or bool(event_files(folder)) or bool(checkpoints_in(folder))


def run_names(runs: Runs) -> list[str]:
    """The runs by their paths relative to the folder of runs; the one that logged last is the first."""
    dated = []
    for folder in folders(runs.root, MAX_DEPTH, runs.root):
        # A run may be deleted at any time.
        with contextlib.suppress(OSError):
            if runs.is_inside(folder):
                moment = max((file.stat().st_mtime_ns for file in event_files(folder)), default=0)
                dated.append((-moment, folder.relative_to(runs.root).as_posix()))
    return [name for _, name in sorted(dated)]


def choose_run(runs: Runs, name: str | None) -> Path:
    """The folder of a run of `run_names`; no other path leads anywhere.

    Raises: ValueError: there is none of this name; says what to do.
    """
    names = run_names(runs)
    if name in names:
        return runs.root / str(name)
    if not names:
        way = ", then ".join(f"`{line}`" for line in TRAINED_BY["image_vae"])
        raise ValueError(f"{runs.root} has no run; begin one, such as by {way}")
    raise ValueError(f"{name!r} is no run in {runs.root}; choose one of the list, such as {names[0]}")


def folders(folder: Path, depth: int, root: Path) -> Iterator[Path]:
    """Runs in a folder, which are not looked into. Args: root: see `utils.app.runs.subfolders`."""
    for child in subfolders(folder, root):
        with contextlib.suppress(OSError):  # It is gone since, or cannot be read.
            if (child / COMPLETE).is_file():
                continue
            if is_run(child):
                yield child
            elif depth > 1:
                yield from folders(child, depth - 1, root)
