"""Two processes that start once and train many runs, one after another: most of a launch is imports."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LIMIT = 400  # seconds that a run may take
TWO_PROCESSES = [BIN / "torchrun", "--standalone", "--nproc_per_node=2"]


def environment() -> dict[str, str]:
    """Variables of a launch."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def skip_without_deepspeed() -> None:
    """Skip the test where DeepSpeed, which is optional, could not be built."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("requirements-deepspeed.txt is not installed")


def deepspeed_launcher() -> list:
    """The command of DeepSpeed's launcher for two processes, at a port of this test process. Skips without it."""
    skip_without_deepspeed()
    return [BIN / "deepspeed", "--num_gpus=2", "--master_port", str(20000 + os.getpid() % 20000)]


class WaitingProcesses:
    """Two processes of torchrun that wait for runs, see tests/launched/several_runs.py.

    Args: make_folder: gives an empty folder for what they are told and what they print.
    """

    def __init__(self, make_folder: Callable[[], Path]):
        self.make_folder, self.process = make_folder, None

    def run(self, script: str, commands: list[list[str]]) -> None:
        """Run the command lines. Raises: AssertionError: one fails, or takes too long; has what was printed."""
        if self.process is None:
            self.folder, self.n_jobs = self.make_folder(), 0
            with open(self.folder / "printed.txt", "w") as printed:
                command: list[Any] = [*TWO_PROCESSES, "tests/launched/several_runs.py", self.folder]
                self.process = subprocess.Popen(
                    command, cwd=ROOT, env=environment(), stdout=printed, stderr=subprocess.STDOUT
                )
        done = self.tell({"script": script, "commands": commands}).with_suffix(".done")
        deadline = time.monotonic() + LIMIT
        while not done.exists():
            is_late, has_ended = time.monotonic() > deadline, self.process.poll() is not None
            if is_late or has_ended:
                self.process.kill()
                self.process.wait()
                self.process = None
                words = f"no result within {LIMIT} s" if is_late else "the processes have ended"
                raise AssertionError(f"{words}: {(self.folder / 'printed.txt').read_text()[-4000:]}")
            time.sleep(0.05)

    def tell(self, job: dict[str, Any] | None) -> Path:
        """Hand out the next job; returns its file."""
        file = self.folder / f"{self.n_jobs}.json"
        file.with_suffix(".part").write_text(json.dumps(job))
        file.with_suffix(".part").rename(file)
        self.n_jobs += 1
        return file

    def end(self) -> None:
        """Let them leave together. Raises: AssertionError: they don't, or not with status 0."""
        if self.process is not None:
            self.tell(None)
            try:
                status = self.process.wait(60)
            finally:
                self.process.kill()
            assert status == 0, (self.folder / "printed.txt").read_text()[-4000:]
