"""What a resume reads of a checkpoint: every file is there and of its kind, and fits this run's model and engine."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerState

from dataset_loading.files import read_record
from utils.checkpoints import STAGE, step_of, without_copies
from utils.options import check_type, declared_fields, type_name
from utils.strict_config import StrictConfig

logger = logging.getLogger(__name__)


def new_run(folder: Path) -> str:
    """The way to change what a resumed run cannot."""
    return f"start a new run from its weights with --init_from {folder} and another --run_name"


def remedy(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"Resume from another checkpoint of {folder.parent}, or {new_run(folder)}"


def read_run(folder: Path, stage: str) -> dict[str, Any]:
    """The record of a checkpoint's run.

    Raises: ValueError: it is of another stage, damaged, or lacks what a resume needs.
    """
    file = folder / STAGE
    record = read_record(file, remedy(folder))
    if record.get("stage") != stage:
        raise ValueError(
            f"{folder} is of stage {record.get('stage')!r}, this run goes on from checkpoints of stage {stage!r}: "
            "name one of them, or leave --resume_from_checkpoint out"
        )
    # Entries and their types; `data.fingerprint` is an entry of the entry `data`.
    needed = {"arguments": dict, "data": dict, "zero_stage": int, "n_ranks": int, "data.fingerprint": str}
    for name, kind in needed.items():
        outer, _, inner = name.partition(".")
        value = record.get(outer) if not inner else record[outer].get(inner)
        if not isinstance(value, kind):
            raise ValueError(
                f"{file}: {name}={value!r} must be {kind.__name__}; it was written by another version, or is damaged. "
                f"{remedy(folder)}"
            )
    lengths = record.get("run_lengths", [])
    if not check_type(lengths, list[list]) or not all(
        check_type(pair, list[int]) and len(pair) == 2 for pair in lengths
    ):
        raise ValueError(f"{file}: run_lengths={lengths!r} must be pairs of steps. {remedy(folder)}")
    if not check_type(record.get("changes", []), list[dict]):
        raise ValueError(f"{file}: changes={record['changes']!r} must be a list of objects. {remedy(folder)}")
    return record


def read_state(folder: Path) -> TrainerState:
    """Transformers' record of the training: step, length, logged numbers.

    Raises: ValueError: it is damaged or not of this checkpoint.
    """
    file = folder / "trainer_state.json"
    content = read_record(file, remedy(folder))
    for name, kind in {"global_step": int, "max_steps": int, "log_history": list[dict]}.items():
        if not check_type(content.get(name), kind):
            raise ValueError(f"{file}: {name}={content.get(name)!r} must be {type_name(kind)}. {remedy(folder)}")
    if content["global_step"] != step_of(folder):
        raise ValueError(
            f"{file}: global_step={content['global_step']} is not that of {folder.name}. {remedy(folder)}"
        )
    try:
        return TrainerState.load_from_json(str(file))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}. {remedy(folder)}") from error


def check_states(folder: Path, record: dict[str, Any], config_class: type[StrictConfig]) -> None:
    """Check that a checkpoint has what a resume reads, each file of its kind.

    transformers would begin with a new optimizer where its file is missing.
    Raises: ValueError: names the file.
    """
    read_state(folder)
    read_configuration(folder, config_class)
    # States of the optimizer: one file, or those of the DeepSpeed engine.
    states = [folder / "scheduler.pt"]
    if record["zero_stage"] < 0:
        states.append(folder / "optimizer.pt")
    else:
        engine = sorted(folder.glob("global_step*/*.pt"))
        if not engine:
            raise ValueError(f"{folder}/global_step{step_of(folder)} holds no states of the engine. {remedy(folder)}")
        states += engine
    # The discriminator.
    if record["arguments"].get("gan_weight") or (folder / "stage_state.pt").exists():
        states.append(folder / "stage_state.pt")
    if record["zero_stage"] >= 0 and (origin := foreign_origin(folder, record)):
        logger.warning(
            "%s %s: DeepSpeed's files in it are pickles, which can run any code when they are read. Resume it only if "
            "you trust who wrote it; --init_from with another --run_name reads its weights alone, which are none",
            *(folder, origin),
        )
    for file in states:
        # Only the index of a file is read. The engine's files hold objects of DeepSpeed, which loads them likewise.
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=file.parent == folder)
        except Exception as error:  # Whatever a file without a state makes torch and pickle raise.
            raise ValueError(f"{file} cannot be read: {error}. {remedy(folder)}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds a {type(content).__name__}, not a state. {remedy(folder)}")


def foreign_origin(folder: Path, record: dict[str, Any]) -> str:
    """Why a checkpoint may be someone else's, in words; "" where it was written here."""
    owner = (folder / STAGE).stat().st_uid
    if hasattr(os, "getuid") and owner != os.getuid():  # On Windows files have no such number.
        return f"belongs to another user (uid {owner})"
    place = record.get("working_directory", "")
    return f"was written in {place or 'an unknown folder'}, not in {os.getcwd()}" if place != os.getcwd() else ""


def read_configuration(folder: Path, config_class: type[StrictConfig]) -> StrictConfig:
    """The configuration of a checkpoint's model.

    Raises: ValueError: names the file.
    """
    read_record(folder / "config.json", remedy(folder))
    try:
        return config_class.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}. {remedy(folder)}") from error


def check_model(folder: Path, model: nn.Module) -> None:
    """Raises: ValueError: the checkpoint has another configuration than the model, or other weights."""
    config = model.config
    saved = read_configuration(folder, type(config))
    names = [f.name for f in declared_fields(config) if getattr(config, f.name) != getattr(saved, f.name)]
    if names:
        pairs = {name: (getattr(saved, name), getattr(config, name)) for name in names}
        raise ValueError(
            f"{folder} has another model: (checkpoint, this run) differ in {pairs}. Give the same --config and "
            "--override, or leave them out: they are taken from the checkpoint. Another model is a new run: give "
            "another --run_name and leave --resume_from_checkpoint out"
        )
    # transformers would leave weights that the file lacks as they are.
    shapes = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}. {remedy(folder)}") from error
    expected = {name: tuple(value.shape) for name, value in without_copies(model, model.state_dict()).items()}
    for name in expected:
        if shapes.get(name) != expected[name]:
            raise ValueError(
                f"{folder}/model.safetensors: {name} has shape {shapes.get(name)}, the model's is {expected[name]}. "
                f"{remedy(folder)}"
            )


def check_engine(folder: Path, record: dict[str, Any], *, zero_stage: int, n_ranks: int) -> None:
    """Raises: ValueError: each ZeRO stage saves optimizer states in its own form, one shard per process from stage 1
    on, and this run has another stage or number of processes."""
    written_zero, written_ranks = record["zero_stage"], record["n_ranks"]
    if written_zero != zero_stage:
        names = [
            "without DeepSpeed" if stage < 0 else f"under ZeRO stage {stage}" for stage in (written_zero, zero_stage)
        ]
        raise ValueError(
            f"{folder} was written {names[0]}, this run trains {names[1]}: optimizer states differ. Resume with the "
            f"same engine, or {new_run(folder)}"
        )
    if zero_stage > 0 and written_ranks != n_ranks:
        raise ValueError(
            f"{folder} holds optimizer shards of {written_ranks} processes, this run has {n_ranks}. Resume with "
            f"{written_ranks} processes, or {new_run(folder)}"
        )
