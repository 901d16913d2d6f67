"""Saving and loading of a trainer's state: checkpoints are complete or absent, and written at once or, with
`--async_save`, by a thread while training goes on."""

import contextlib
import copy
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from model.adapters.lora import adapters_of, is_of_adapter
from utils.checkpoints import (
    COMPLETE,
    EMA,
    LORA,
    STAGE,
    checkpoints_in,
    explained_loading,
    is_complete,
    mark_complete,
    step_of,
    without_copies,
    write_card,
    write_json,
)
from utils.distributed import barrier, rank, world_size
from utils.optimizer_hooks import NonFiniteGuard, WeightEMA

logger = logging.getLogger(__name__)

PATIENCE = 300  # Seconds that a run which ends with an error waits for what other processes still write.


def snapshot(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples that shares nothing with the original; tensors are in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # Of the same class, with its attributes.
        copied.update((name, snapshot(item)) for name, item in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    return copy.deepcopy(value)


@contextlib.contextmanager
def whole_or_absent(folder: Path) -> Iterator[None]:
    """Around the writing of a checkpoint: what cannot be written whole is removed.

    Raises: OSError: it could not be written; names the folder and the remedy.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"could not write {folder}: {error}. The half-written folder is removed and earlier checkpoints are "
            "kept; free disk space and go on with --resume_from_checkpoint latest"
        ) from error


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread.

    A step adds jobs, which write what is in host memory, and starts them; the checkpoint before must be written by
    then, so that at most one waits in memory. The error of a job is raised by the next `check` or `wait`. As a context
    it waits for the last checkpoint at the end.

    Attributes: deadline: `time.monotonic()` after which other processes are no longer waited for; None: no limit.
    """

    def __init__(self):
        self.pool = ThreadPoolExecutor(1, "checkpoint")  # Python's exit waits for its thread, too.
        self.jobs: list[Callable[[], object]] = []
        self.written: Future | None = None
        self.deadline: float | None = None

    def add(self, write: Callable[..., object], *args: Any) -> None:
        """Add a job: `write(*args)`, which nothing else may change any more."""
        self.jobs.append(functools.partial(write, *args))

    def start(self, folder: Path, *, n_ranks: int, number: int, limit: int) -> None:
        """Write the jobs' files, mark the folder once all processes have written theirs, and rotate the checkpoints.

        Args:
            n_ranks, number: of processes, and of this one; the first one marks.
            limit: checkpoints to keep; 0: all.
        """
        jobs, self.jobs = self.jobs, []
        self.written = self.pool.submit(self.write, folder, jobs, n_ranks=n_ranks, number=number, limit=limit)

    def write(self, folder: Path, jobs: list[Callable[[], object]], *, n_ranks: int, number: int, limit: int) -> None:
        """What the thread does, see `start`."""
        with whole_or_absent(folder):
            while jobs:
                jobs.pop(0)()  # Its memory is free once it is written.
            # Files tell each other, since collective operations belong to the training's thread.
            signs = [folder / f".written-{i}" for i in range(n_ranks)]
            signs[number].touch()
            if number == 0:
                self.await_others(folder, signs)
                for sign in signs:
                    sign.unlink()
                mark_complete(folder)
        if number == 0 and limit:
            rotate(folder.parent, limit)

    def await_others(self, folder: Path, signs: list[Path]) -> None:
        """Wait until every process has written its files.

        Raises: OSError: one of them has removed the folder, or the deadline is over.
        """
        while not all(sign.exists() for sign in signs):
            if not folder.is_dir():
                raise OSError("another process could not write its files")
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OSError("another process has ended before its files were written")
            time.sleep(0.05)

    def check(self) -> None:
        """Raises: OSError: the last checkpoint could not be written."""
        if self.written is not None and self.written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises: OSError: it could not be."""
        written, self.written, self.jobs = self.written, None, []
        if written is not None:
            written.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.wait()
            return
        # The run ends with another error: what was begun is completed, or discarded with a message.
        self.deadline = time.monotonic() + PATIENCE
        try:
            self.wait()
        except OSError as failure:
            logger.error("%s", failure)


# ---- Checkpoints of a run that make room for new ones.


def rotate(run_dir: Path, limit: int) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, and incomplete folders older than the newest complete
    one."""
    folders = checkpoints_in(run_dir)
    complete = [folder for folder in folders if is_complete(folder)]
    # Incomplete and older than a complete one: interrupted. A newer one may still be in progress.
    stale = [
        folder for folder in folders if folder not in complete and complete and step_of(folder) < step_of(complete[-1])
    ]
    for folder in complete[:-limit] + stale:
        logger.info("deleting %s (--save_total_limit %d)", folder, limit)
        # Without its mark the folder is no checkpoint, even if the deletion is cut short.
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def set_aside(run_dir: Path, folders: list[Path]) -> None:
    """Move checkpoints of a run that went another way into a new folder `abandoned-N` of the run, where resuming and
    loading find them only by their own path. Interrupted ones, which have no COMPLETE.json, stay where they are."""
    folders = [folder for folder in folders if (folder / COMPLETE).is_file()]
    if not folders:
        return
    number = 1
    while (run_dir / f"abandoned-{number}").exists():
        number += 1
    target = run_dir / f"abandoned-{number}"
    target.mkdir()
    for folder in folders:
        folder.rename(target / folder.name)
    names = ", ".join(folder.name for folder in folders)
    logger.warning("%s of %s: moved to %s, since the run goes on from an earlier step", names, run_dir, target.name)


# ---- The trainer.


class SavingTrainer(Trainer):
    """The part of `StageTrainer` that writes and reads checkpoints.

    Attributes: background: the thread that writes them with `--async_save`; it is idle without.
    """

    stage_arguments: Any
    stage_record: dict
    guard: NonFiniteGuard
    ema: WeightEMA | None
    saved_step: int
    last_log: tuple[int, float]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.background = BackgroundWriter()

    def before_saving(self) -> None:
        """Called on every process before a checkpoint is written."""

    def extra_state(self) -> dict | None:
        """State of the stage beyond model, optimizer and schedule, equal on all processes; saved as
        `stage_state.pt`."""
        return None

    def load_extra_state(self, state: dict) -> None:
        """Restore the state that `extra_state` returned."""

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged weights as a state dict; None where there are none yet. Every process must call it."""
        if self.ema is None or self.ema.optimizer is None:
            return None
        return self.ema.state_dict_of(self.model, self.model_wrapped if self.is_deepspeed_enabled else None)

    # ---- Writing.

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.saved_step == self.state.global_step:
            return
        is_async = self.stage_arguments.async_save
        self.background.wait()
        # Rank 0 makes room: another run's checkpoint is set aside, an interrupted one removed; the others wait for it.
        if rank() == 0:
            set_aside(folder.parent, [folder])
            if folder.exists():
                shutil.rmtree(folder)
        barrier()
        self.before_saving()
        with whole_or_absent(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Files of transformers and of the stage; the mark comes once every process has written its own.
            super()._save_checkpoint(model, trial)
            self.save_extras(folder)
            if not is_async:
                barrier()
                if rank() == 0:
                    mark_complete(folder)
        self.saved_step = self.state.global_step
        self.guard.mark_saved()
        # Old checkpoints go once the new one is complete.
        # Not while steps are skipped: the checkpoints before may be the ones to go back to.
        limit = 0 if self.guard.in_a_row else self.stage_arguments.save_total_limit
        if is_async:
            self.background.start(folder, n_ranks=world_size(), number=rank(), limit=limit)
        elif rank() == 0 and limit:
            rotate(folder.parent, limit)
        barrier()
        self.last_log = (self.state.global_step, time.perf_counter())

    def write(self, write: Callable[..., object], *args: Any) -> None:
        """Write a file of a checkpoint: `write(*args)`, now or in the thread."""
        if self.stage_arguments.async_save:
            self.background.add(write, *args)
        else:
            write(*args)

    def content(self, state: Any) -> Any:
        """What is written of a state: itself, or a snapshot where training goes on meanwhile."""
        return snapshot(state) if self.stage_arguments.async_save else state

    def _save(self, output_dir=None, state_dict=None) -> None:
        # DeepSpeed hands over copies, in which transformers does not see that tied weights are the same.
        state = state_dict and without_copies(self.model, state_dict)
        # An empty state is that of sharded weights that no process gathers: transformers removes its file at once.
        if not self.stage_arguments.async_save or state == {}:
            super()._save(output_dir, state)
            return
        state = without_copies(self.model, self.model.state_dict()) if state is None else state
        self.background.add(super()._save, output_dir, snapshot(state))

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if not self.stage_arguments.async_save:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.is_deepspeed_enabled:
            # Each process writes its part through the engine's writer, which takes a state and a path.
            writer = self.model_wrapped.checkpoint_engine
            write = writer.save
            writer.save = lambda state_dict, path: self.background.add(write, snapshot(state_dict), path)
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            finally:
                writer.save = write
        elif self.args.should_save:
            folder = Path(output_dir)
            self.background.add(torch.save, snapshot(self.optimizer.state_dict()), folder / "optimizer.pt")
            self.background.add(torch.save, snapshot(self.lr_scheduler.state_dict()), folder / "scheduler.pt")

    def save_extras(self, folder: Path) -> None:
        """Averaged weights, the stage's own state and its record."""
        # Gathering shards is collective, so every process takes part; rank 0 alone writes.
        averaged = self.averaged_weights()
        state = {"guard": self.guard.state_dict(), **(self.extra_state() or {})}
        if rank() == 0:
            if adapters := adapters_of(self.model):
                self.write(write_json, folder / LORA, adapters)
            if averaged is not None:
                if adapters:  # The other weights are frozen.
                    averaged = {name: tensor for name, tensor in averaged.items() if is_of_adapter(name)}
                averaged = self.content(without_copies(self.model, averaged))
                averaged = {name: tensor.cpu().contiguous() for name, tensor in averaged.items()}
                self.write(save_file, averaged, folder / EMA, {"format": "pt"})
            self.write(torch.save, self.content(state), folder / "stage_state.pt")
            skipped = {"total": self.guard.skipped, "at_the_end": self.guard.in_a_row}
            self.write(write_json, folder / STAGE, {**self.stage_record, "skipped_steps": skipped})
            self.write(write_card, folder, type(self.model), self.stage_record.get("stage", ""))

    # ---- Reading.

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if not checkpoint:
            return
        with explained_loading(Path(checkpoint), "the state of the optimizer or of its schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint) / "stage_state.pt"
        if file.is_file():  # Older checkpoints have none where the stage has no state of its own.
            with explained_loading(file):
                state = torch.load(file, map_location=self.args.device, weights_only=True)
                if guard := state.pop("guard", None):  # Older checkpoints do not count skipped steps.
                    self.guard.load_state_dict(guard)
                if state or self.extra_state() is not None:
                    self.load_extra_state(state)

    def _load_rng_state(self, checkpoint) -> None:
        with explained_loading(Path(checkpoint), "the states of the random number generators (rng_state*.pth)"):
            super()._load_rng_state(checkpoint)
