import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from dataset_loading import locks
from dataset_loading.locks import LOCK, only_writer, owner_of

context = multiprocessing.get_context("fork")


def hold(folder, ready, has_worker=False):
    """A process that holds the lock until it is killed, and a worker that outlives it."""
    with only_writer(folder, "wait"):
        if has_worker:
            context.Process(target=time.sleep, args=(20,)).start()
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """holder(**kwargs): a process that holds the lock of tmp_path / "set"."""
    processes = []

    def start(**kwargs):
        ready = context.Event()
        processes.append(context.Process(target=hold, args=(tmp_path / "set", ready), kwargs=kwargs))
        processes[-1].start()
        assert ready.wait(30)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_the_second_writer_is_told_the_owner(tmp_path, holder):
    process = holder()
    for _ in range(2):  # Being refused takes the owner's name from nobody.
        with pytest.raises(OSError, match="try another") as caught, only_writer(tmp_path / "set", "try another"):
            pass
    message = str(caught.value)
    owner = json.loads((tmp_path / "set" / LOCK).read_text())
    assert owner.keys() == {"host", "pid", "command", "since"} and owner["pid"] == process.pid
    for part in (str(tmp_path / "set"), f"process {process.pid} on {socket.gethostname()} since 20", owner["command"]):
        assert part in message


def test_a_killed_owner_blocks_nobody_though_its_workers_live_on(tmp_path, holder):
    process = holder(has_worker=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "set" / LOCK).exists()
    with only_writer(tmp_path / "set", "wait"):
        assert json.loads((tmp_path / "set" / LOCK).read_text())["pid"] == os.getpid()


def test_nothing_is_left_and_the_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        first, second = only_writer(tmp_path / "set", "wait"), only_writer(tmp_path / "set", "wait")
        with first, pytest.raises(OSError, match="wait"), second:  # Twice in one process is twice.
            pass
        assert not (tmp_path / "set").exists() and not locks.held
    with only_writer(tmp_path / "a/b/c", "wait"):
        assert (tmp_path / "a/b/c" / LOCK).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "set").mkdir()
    with only_writer(tmp_path / "set", "wait"):
        (tmp_path / "set/a").touch()
    assert os.listdir(tmp_path / "set") == ["a"]


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    lock, file = fcntl.flock, tmp_path / LOCK

    def flock(descriptor, operation):
        # The last owner ends between opening and locking.
        monkeypatch.undo()
        file.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path, "wait"):
        assert json.loads(file.read_text())["pid"] == os.getpid() and len(locks.held) == 1


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path / "set", "wait"):
        assert "cannot be locked ([Errno" in caplog.text and str(tmp_path / "set" / LOCK) in caplog.text
    assert not (tmp_path / "set").exists()


def test_the_owner_is_known_without_touching_the_lock(tmp_path):
    assert owner_of(tmp_path) is None
    with only_writer(tmp_path, "wait"):
        owner = owner_of(tmp_path)
        assert owner is not None and owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    assert owner_of(tmp_path) is None
    gone = multiprocessing.get_context("spawn").Process(target=int)
    gone.start()
    gone.join()
    for content, is_owned in (
        ({"host": socket.gethostname(), "pid": gone.pid}, False),
        ({"host": "elsewhere", "pid": gone.pid}, True),
        ({"host": socket.gethostname(), "pid": 1}, True),
        ({"host": socket.gethostname(), "pid": "x"}, True),
        ([], False),
    ):
        (tmp_path / LOCK).write_text(json.dumps(content))
        assert (owner_of(tmp_path) is not None) == is_owned
