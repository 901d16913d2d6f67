"""What runs write for TensorBoard, read as it grows: each byte once, for a limited time per look."""

import array
import math
import struct
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from utils.checkpoints import event_files
from utils.training.log_lines import WINDOW

LENGTH, CHECKSUM = struct.Struct("<Q"), 4  # A record: length of the event, its checksum, event, checksum.
IMAGES, TRAINING = "images/", "train/"  # Groups of tags, see `utils.training.callbacks`.
N_LOGS = 8  # runs whose curves are kept in memory


class Curve:
    """A scalar over the steps."""

    def __init__(self) -> None:
        self.steps, self.values = array.array("q"), array.array("d")

    def append(self, step: int, value: float) -> None:
        """Add a point."""
        self.steps.append(step)
        self.values.append(value)

    def forget_from(self, step: int) -> None:
        """Drop the points of this step and later ones."""
        if self.steps and max(self.steps) >= step:
            kept = np.array(self.steps) < step
            self.steps = array.array("q", np.array(self.steps)[kept].tobytes())
            self.values = array.array("d", np.array(self.values)[kept].tobytes())

    def points(self, most: int) -> list[list[float]]:
        """At most so many finite points [step, value]: of stretches of equal length the lowest and the highest, so
        that no peak is lost, and the last one."""
        steps, values = np.array(self.steps), np.array(self.values)
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if len(steps) > most:
            edges = np.linspace(0, len(steps), (most - 1) // 2 + 1).astype(int)
            pairs = [(np.argmin(values[a:b]) + a, np.argmax(values[a:b]) + a) for a, b in zip(edges, edges[1:])]
            kept = np.unique([*np.ravel(pairs), len(steps) - 1])
            steps, values = steps[kept], values[kept]
        return [[int(step), float(value)] for step, value in zip(steps, values)]


class EventLog:
    """The events of a run, as far as they were read.

    Attributes:
        curves: by tag.
        images: tag in the group `images/` -> step and file content of the last one.
        flags: of the run, as texts; of the last one that went on in its folder.
        history: the last logging steps of the training process with their times in seconds, as
            `utils.training.log_lines.seconds_left` takes them.
        moment: of the newest event, in seconds since 1970.
        n_read, n_bytes: how much of the files was read, and their sizes at the last look.
        is_behind: whether the last look ended before it had read all.
        damaged: files whose remaining events cannot be read.
    """

    def __init__(self, run: Path):
        self.run, self.lock = run, threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.offsets: dict[Path, int] = {}
        self.curves: dict[str, Curve] = {}
        self.images: dict[str, tuple[int, bytes]] = {}
        self.flags: dict[str, str] = {}
        self.history: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.training_file: Path | None = None
        self.moment, self.n_read, self.n_bytes, self.is_behind = 0.0, 0, 0, False
        self.damaged: list[str] = []

    def read(self, seconds: float) -> None:
        """Read what is new, for about so many seconds; the next call goes on. To be called with `lock` held."""
        until = time.monotonic() + seconds
        folder = self.run.resolve()
        # A link to other places is not followed.
        files = [file for file in event_files(self.run) if file.resolve().parent.is_relative_to(folder)]
        sizes = {file: file.stat().st_size for file in files}
        if any(sizes.get(file, -1) < offset for file, offset in self.offsets.items()):
            self.clear()  # Another run has replaced this one.
        for file, size in sizes.items():
            if size > self.offsets.get(file, 0) and file.name not in self.damaged:
                self.read_file(file, size, until)
        self.n_read, self.n_bytes = sum(self.offsets.values()), sum(sizes.values())
        self.is_behind = time.monotonic() >= until and self.n_read < self.n_bytes

    def read_file(self, file: Path, size: int, until: float) -> None:
        """Read the new whole records of a file."""
        with file.open("rb") as stream:
            stream.seek(offset := self.offsets.get(file, 0))
            while time.monotonic() < until:
                head = stream.read(LENGTH.size + CHECKSUM)
                end = offset + len(head) + CHECKSUM + (LENGTH.unpack_from(head)[0] if len(head) >= LENGTH.size else 0)
                if len(head) < LENGTH.size + CHECKSUM or end > size:
                    break  # The rest is not written yet.
                content = stream.read(end - offset - len(head))[:-CHECKSUM]
                try:
                    self.take(Event.FromString(content), file)
                except DecodeError:
                    self.damaged.append(file.name)
                    break
                offset = end
        self.offsets[file] = offset

    def take(self, event: Any, file: Path) -> None:
        """Keep what an event holds."""
        self.moment = max(self.moment, event.wall_time)
        # A run goes on from this step: what an interrupted one logged later counts no more.
        if event.session_log.status == SessionLog.START and event.step > 0:
            for curve in self.curves.values():
                curve.forget_from(event.step)
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                self.curves.setdefault(value.tag, Curve()).append(event.step, value.simple_value)
                if value.tag.startswith(TRAINING):
                    self.note_step(event.step, event.wall_time, file)
            elif kind == "image" and value.tag.startswith(IMAGES):
                self.images[value.tag] = (event.step, value.image.encoded_image_string)
            elif kind == "tensor" and value.tag == "flags/text_summary":
                lines = value.tensor.string_val[0].decode().splitlines()[2:]  # below the head of the table
                rows = [line.strip("| ").split(" | ", 1) for line in lines]
                self.flags = {row[0]: row[1] if len(row) > 1 else "" for row in rows}

    def note_step(self, step: int, moment: float, file: Path) -> None:
        """Keep when a step was logged, in the file that the training process writes now."""
        if file != self.training_file:
            self.training_file = file
            self.history.clear()
        if not self.history or step > self.history[-1][0]:
            self.history.append((step, moment))

    def tags(self) -> list[str]:
        """The tags of the curves, losses first."""
        first = ("train/loss", "eval/loss")
        return sorted(self.curves, key=lambda tag: (tag not in first, tag))

    def last_values(self, step: int) -> dict[str, float]:
        """What a step has logged of the training, by the names that the trainer gave it."""
        groups = (TRAINING, "loss/")
        at_step = {tag: curve.values[-1] for tag, curve in self.curves.items() if curve.steps[-1:].tolist() == [step]}
        return {tag.removeprefix(TRAINING): value for tag, value in at_step.items() if tag.startswith(groups)}

    def n_steps(self) -> int | None:
        """The steps that the run is to make, by its flags; None: they and its epochs do not tell yet."""
        if (given := number_of(self.flags.get("max_steps"))) and given > 0:
            return int(given)
        epochs, curve = number_of(self.flags.get("num_train_epochs")), self.curves.get("train/epoch")
        if not epochs or curve is None or not curve.values or curve.values[-1] <= 0:
            return None
        # Epochs are stored with 7 digits.
        return math.ceil(epochs * curve.steps[-1] / curve.values[-1] * (1 - 1e-6))


def number_of(text: str | None) -> float:
    """A number as a flag has it; 0 for anything else."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


class EventLogs:
    """The events of the runs that were looked at last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.logs: OrderedDict[Path, EventLog] = OrderedDict()

    def of(self, run: Path) -> EventLog:
        """The events of a run, which are yet to be read."""
        with self.lock:
            log = self.logs.setdefault(run.resolve(), EventLog(run))
            self.logs.move_to_end(run.resolve())
            while len(self.logs) > N_LOGS:
                self.logs.popitem(last=False)
        return log
