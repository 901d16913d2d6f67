"""Several runs of a stage, one after another, in processes that start once.

    python tests/launched/several_runs.py SCRIPT COMMANDS

SCRIPT is a module such as pretrain_image_vae, COMMANDS a JSON list of command lines. Runs without DeepSpeed come
first: its settings outlive a run.
"""

import importlib
import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.command_line import parse_arguments
from utils.distributed import ending_together
from utils.training.stage import Stage

if __name__ == "__main__":
    _, script, commands = sys.argv
    members = vars(importlib.import_module(script)).values()
    (stage,) = (member for member in members if isinstance(member, type) and member.__module__ == script)
    assert issubclass(stage, Stage)
    with ending_together():
        for words in json.loads(commands):
            AcceleratorState._reset_state(True)  # The last run may have had another engine.
            stage(parse_arguments(stage.arguments_class, words, "", complete=stage.complete_arguments)).run()
