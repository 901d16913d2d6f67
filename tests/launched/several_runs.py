"""Runs of stages, one after another, in processes that start once and wait for more.

    torchrun --standalone --nproc_per_node=2 tests/launched/several_runs.py FOLDER

FOLDER gets the work: 0.json, 1.json, ... each name a script, such as pretrain_image_vae, and command lines for it. The
file 0.done says that all processes have done 0.json; `null` instead of work ends them. DeepSpeed's settings outlive a
run: processes that had it are not for runs without.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.command_line import parse_arguments
from utils.distributed import ending_together
from utils.training.stage import Stage


def jobs(folder: Path) -> Iterator[dict[str, Any]]:
    """What is to be done, until the end."""
    number = 0
    while True:
        file = folder / f"{number}.json"
        if not file.exists():
            time.sleep(0.05)
            continue
        if (job := json.loads(file.read_text())) is None:
            return
        yield job
        dist.barrier()
        file.with_suffix(".done").touch()
        number += 1


if __name__ == "__main__":
    with ending_together():
        for job in jobs(Path(sys.argv[1])):
            members = vars(importlib.import_module(job["script"])).values()
            (stage,) = (item for item in members if isinstance(item, type) and item.__module__ == job["script"])
            assert issubclass(stage, Stage)
            for words in job["commands"]:
                AcceleratorState._reset_state(True)  # The last run may have had another engine.
                stage(parse_arguments(stage.arguments_class, words, "", complete=stage.complete_arguments)).run()
