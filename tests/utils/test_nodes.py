"""Two nodes that share a folder equal one process: two torchrun agents on the loopback interface, each with a working
folder and a temporary folder of its own."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import SMALL_RUN, Run, changed, largest_difference
from tests.helpers.two_processes import skip_without_deepspeed

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.launch


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_on_two_nodes(folder: Path, cache: Path, steps: int, *flags: str) -> Run:
    """One process on each node, with DeepSpeed; both see `folder`/shared and `cache`. Returns the run, in the
    shared folder."""
    skip_without_deepspeed()
    words = ["--cached_dataset", str(cache), "--output_dir", str(folder / "shared"), "--run_name", "nodes"]
    program = [str(ROOT / "pretrain_image_vae.py"), *changed([*SMALL_RUN, *words, "--max_steps", str(steps)], *flags)]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", "test"]
    agents = []
    for node in range(2):
        (working := folder / f"node{node}" / "tmp").mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(working), "PYTHONPATH": str(ROOT)}
        command = [BIN / "torchrun", "--nnodes", "2", "--nproc_per_node", "1", *rendezvous, *program]
        log = (folder / f"node{node}.log").open("w")
        agents.append(
            subprocess.Popen(command, cwd=working.parent, env=environment, stdout=log, stderr=subprocess.STDOUT)
        )
    try:
        statuses = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    logs = [(folder / f"node{node}.log").read_text() for node in range(2)]
    assert statuses == [0, 0], "\n".join(log[-3000:] for log in logs)
    return Run(folder / "shared" / "image_vae" / "nodes", steps)


SHARDED = ["--batch_size", "4", "--use_deepspeed", "--deepspeed_config", str(ROOT / "ds_config_zero-2.json")]


def test_two_nodes_equal_one_process(train, image_cache, tmp_path):
    one = train("one", 6, "--batch_size", "8")
    run = run_on_two_nodes(tmp_path, image_cache, 6, *SHARDED)
    assert run.losses == pytest.approx(one.losses, rel=1e-5)
    kernels = {name for name, value in one.weights().items() if value.ndim == 4}
    for name in ("model", "ema"):
        first, second = ({key: result.weights(name)[key] for key in kernels} for result in (one, run))
        assert largest_difference(first, second) <= 1e-5
    # Nothing of a run lies in the working folders.
    assert not [path for node in range(2) for path in (tmp_path / f"node{node}").iterdir() if path.name != "tmp"]


@pytest.mark.slow
def test_two_nodes_resume_exactly(image_cache, tmp_path):
    run = run_on_two_nodes(tmp_path, image_cache, 6, *SHARDED, "--save_steps", "3")
    weights = run.weights()
    shutil.rmtree(run.folder)
    resumed = run_on_two_nodes(tmp_path, image_cache, 6, *SHARDED, "--resume_from_checkpoint", "latest")
    assert largest_difference(weights, resumed.weights()) == 0
