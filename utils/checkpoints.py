"""Checkpoints that are complete or ignored, and how the next stage finds and loads them.

A folder `checkpoint-STEP` counts as a checkpoint once `COMPLETE.json`, written last, lists its files with their
sizes. A run that is killed while it writes leaves a folder without it, which resuming and loading ignore.
"""

import json
import logging
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dataset_loading.files import replace_file, sync_to_disk

logger = logging.getLogger(__name__)

# Files of a checkpoint: its mark, the record of its run, the averaged weights.
COMPLETE = "COMPLETE.json"
STAGE = "stage.json"
EMA = "ema.safetensors"
# Averaged weights, where a checkpoint has them, or those that were trained.
WeightsKind = Literal["ema", "raw"]


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically and flush it to the disk."""
    replace_file(file, json.dumps(content, indent=2, sort_keys=True).encode(), sync=True)


def mark_complete(folder: Path) -> None:
    """Flush all files of a checkpoint to the disk, then list them with their sizes in COMPLETE.json."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE):
        sync_to_disk(file)
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    # The list is written last: a folder that has it is whole.
    write_json(folder / COMPLETE, {"files": sizes})


def is_complete(folder: Path) -> bool:
    """Whether COMPLETE.json is there and every file it lists has the listed size."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    # A file of another size was cut short.
    files = {name: folder / name for name in sizes}
    return all(file.is_file() and file.stat().st_size == sizes[name] for name, file in files.items())


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name, -1 for other names."""
    prefix, _, digits = folder.name.partition("-")
    return int(digits) if prefix == "checkpoint" and digits.isdigit() else -1


def checkpoints_in(run_dir: Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, by step."""
    return sorted((path for path in run_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def newest_complete(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; incomplete ones are named in a warning."""
    for folder in reversed(checkpoints_in(run_dir)):
        if is_complete(folder):
            return folder
        logger.warning("ignoring %s: it was not written completely", folder)
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest complete checkpoint) or a checkpoint folder.

    Raises:
        FileNotFoundError: nothing there, or nothing complete.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}: the folder does not exist")
    # A checkpoint folder stands for itself.
    if step_of(folder) >= 0:
        if not is_complete(folder):
            raise FileNotFoundError(
                f"{folder} was not written completely ({COMPLETE} is missing or does not fit); use an older one"
            )
        return folder
    # A run folder stands for its newest complete checkpoint.
    newest = newest_complete(folder)
    if newest is None:
        raise FileNotFoundError(
            f"no complete checkpoint under {folder}; train that stage first, or name a checkpoint-STEP folder"
        )
    return newest


def read_stage(path: str | Path) -> dict:
    """The record `stage.json` of a checkpoint: stage, preset, arguments, commit, package versions, data, processes."""
    folder = resolve_checkpoint(path)
    if not (folder / STAGE).is_file():
        raise FileNotFoundError(f"{folder} has no {STAGE}: it was not written by a stage of this repository")
    return json.loads((folder / STAGE).read_text())


def without_copies(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict without the further names of tied weights, which safetensors does not write twice and
    `load_model` gives back."""
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}


def load_model(model_class: type, path: str | Path, weights: WeightsKind = "ema"):
    """A stage's model from a checkpoint or run folder, in fp32 and eval mode; averaged weights where there are some.

    The model is whole on every process, also under ZeRO-3, where `from_pretrained` would shard its weights.
    Random number generators keep their states.
    """
    folder = resolve_checkpoint(path)
    # Averaged weights are one file; transformers splits large raw weights into several.
    files = (
        [folder / EMA] if weights == "ema" and (folder / EMA).is_file() else sorted(folder.glob("model*.safetensors"))
    )
    if not files:
        raise FileNotFoundError(f"{folder} has no model.safetensors; it is no checkpoint of a model")
    with torch.random.fork_rng():  # Initial weights are overwritten at once.
        model = model_class(model_class.config_class.from_pretrained(folder))
    state = {name: value for file in files for name, value in load_file(file).items()}
    # Tied weights are saved under one name.
    state |= {name: state[source] for name, source in model.all_tied_weights_keys.items() if name not in state}
    # fp32, whatever precision the weights were saved in; integers and booleans stay as they are.
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return model.eval()


def chosen_weights(checkpoint: Path, args: Any) -> WeightsKind:
    """Which weights of a checkpoint folder the flag `--weights` means; averaged ones only where there are some.

    Raises: ValueError: `--weights ema` was given and there are none.
    """
    averaged = (checkpoint / EMA).is_file()
    if not averaged and args.weights == "ema" and "weights" in args.given:
        raise ValueError(f"{checkpoint} has no averaged weights ({EMA}); use --weights raw")
    return args.weights if averaged else "raw"


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


def provenance() -> dict:
    """Commit of the code, and versions of the packages that a run depends on."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    return {"git_commit": git.stdout.strip() or None, "packages": {"python": platform.python_version(), **packages}}
