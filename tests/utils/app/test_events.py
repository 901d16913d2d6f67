"""What runs write for TensorBoard: read once as it grows, without what an interrupted run has logged in vain."""

import time

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from utils.app.events import EventLog, EventLogs
from utils.training.trackers import write_flags


@pytest.fixture
def log(tmp_path):
    return EventLog(tmp_path)


def read(log):
    log.read(60)
    return {tag: list(zip(curve.steps, np.float32(curve.values).tolist())) for tag, curve in log.curves.items()}


def test_what_grows_is_read_once_and_half_a_record_later(log, tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("train/loss", 2, 10)
    writer.flush()
    assert read(log) == {"train/loss": [(10, 2.0)]}
    writer.add_scalar("train/loss", 1, 20)
    writer.add_image("images/x", np.zeros((3, 8, 8), np.uint8), 20)
    writer.add_image("images/x", np.zeros((3, 8, 8), np.uint8), 30)
    writer.close()
    assert read(log) == read(log) == {"train/loss": [(10, 2.0), (20, 1.0)]} and log.n_read == log.n_bytes
    assert {tag: step for tag, (step, _) in log.images.items()} == {"images/x": 30}
    (file,) = tmp_path.glob("events*")
    content, half = file.read_bytes(), EventLog(tmp_path)
    for size in range(0, len(content) + 1, 7):
        file.write_bytes(content[:size])
        half.read(60)
    file.write_bytes(content)
    assert read(half) == read(log) and not half.damaged


def test_a_resumed_run_forgets_the_steps_that_are_made_again(log, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20, 30):
            writer.add_scalar("train/loss", step, step)
    time.sleep(1.1)  # The names of the files begin with the second.
    with SummaryWriter(str(tmp_path), purge_step=21) as writer:
        writer.add_scalar("train/loss", 5, 30)
    assert read(log) == {"train/loss": [(10, 10.0), (20, 20.0), (30, 5.0)]}
    assert [step for step, _ in log.history] == [30]  # The speed is that of the process that runs now.


def test_a_replaced_run_and_a_damaged_file(log, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/loss", 1, 1)
    read(log)
    (file,) = tmp_path.glob("events*")
    content = bytearray(file.read_bytes())
    file.unlink()
    assert read(log) == {}
    content[12:20] = b"\xff" * 8  # in the first event
    file.write_bytes(content)
    assert read(log) == {} and log.damaged == [file.name]


def test_links_to_other_places_are_not_read(log, tmp_path):
    outside = tmp_path / "outside"
    with SummaryWriter(str(outside)) as writer:
        writer.add_scalar("secret", 1, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.out.tfevents.1").symlink_to(next(outside.glob("events*")))
    assert read(EventLog(tmp_path / "run")) == {}


def test_long_curves_are_read_in_several_looks_and_keep_their_peaks(log, tmp_path):
    n_points = 100_000
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("x", float("nan"), 0)
        for step in range(1, 2_000):
            writer.add_scalar("x", 100 if step == 777 else step % 5, step)
    log.read(1e-4)
    assert log.is_behind and log.n_read < log.n_bytes
    read(log)
    assert not log.is_behind
    curve = log.curves["x"]
    for step in range(2_000, n_points):
        curve.append(step, step % 5)
    start = time.monotonic()
    points = curve.points(400)
    assert time.monotonic() - start < 1 and len(points) <= 400
    assert [777, 100.0] in points and points[-1][0] == n_points - 1 and points == sorted(points)
    assert min(value for _, value in points) == 0 and len(curve.points(10**6)) == n_points - 1


@pytest.mark.parametrize(
    ("flags", "n_steps"),
    [
        ({"max_steps": 1200}, 1200),
        ({"max_steps": -1, "num_train_epochs": 3.0}, 75),
        ({"max_steps": -1}, None),
        ({}, None),
    ],
)
def test_the_length_of_a_run_follows_from_its_flags(log, tmp_path, flags, n_steps):
    with SummaryWriter(str(tmp_path)) as writer:
        write_flags(writer, flags)
        writer.add_scalar("train/epoch", 2 / 5, 10)
    read(log)
    assert log.n_steps() == n_steps and log.flags == {name: str(value) for name, value in flags.items()}


def test_the_last_runs_are_kept(tmp_path):
    logs = EventLogs()
    first = logs.of(tmp_path / "0")
    assert logs.of(tmp_path / "0") is first
    for number in range(1, 9):
        logs.of(tmp_path / str(number))
    assert len(logs.logs) == 8 and logs.of(tmp_path / "0") is not first
