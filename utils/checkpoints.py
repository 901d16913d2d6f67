"""Checkpoints that are complete or ignored, and how the next stage finds and loads them.

A folder `checkpoint-STEP` counts as a checkpoint once `COMPLETE.json`, written last, lists its files with their
sizes and SHA-256. A run that is killed while it writes leaves a folder without it, which resuming and loading ignore.
Looking for checkpoints compares sizes; what is loaded is compared with its digest first, so that a damaged file is
named. Checkpoints of older versions have no digests: of those, the form of the files is checked.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dataset_loading.files import MANIFEST, Record, digest_file, read_record, replace_file, sync_to_disk
from model.adapters.lora import merge_adapters
from utils.flags.choices import WeightsKind

logger = logging.getLogger(__name__)

# Files of a checkpoint: its mark, the configuration, the record of its run, the averaged weights, what its adapters
# are, what they all are.
COMPLETE = "COMPLETE.json"
CONFIG = "config.json"
STAGE = "stage.json"
EMA = "ema.safetensors"
LORA = "lora.json"
CARD = "README.md"
# Types of what a record holds, where it holds it.
EXPORTED = "exported"  # In the record of a folder that inference/export_model.py wrote.
RECORD_TYPES = {"stage": str, "preset": str, "arguments": dict, "data": dict, "latents": dict, EXPORTED: dict}


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically and flush it to the disk."""
    replace_file(file, json.dumps(content, indent=2, sort_keys=True).encode(), sync=True)


def mark_complete(folder: Path) -> None:
    """Flush all files of a checkpoint to the disk, then list them with their sizes and SHA-256 in COMPLETE.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)

    def describe(file: Path) -> tuple[int, str]:
        sync_to_disk(file)
        return file.stat().st_size, digest_file(file).hex()

    # Threads, as hashing and flushing run in parallel; the files were just written, so they are read from memory.
    with ThreadPoolExecutor(n_threads()) as pool:
        descriptions = dict(zip([file.relative_to(folder).as_posix() for file in files], pool.map(describe, files)))
    # The list is written last: a folder that has it is whole.
    sizes = {name: size for name, (size, _) in descriptions.items()}
    write_json(folder / COMPLETE, {"files": sizes, "sha256": {name: hex for name, (_, hex) in descriptions.items()}})


def n_threads() -> int:
    """Threads that hash files."""
    return min(8, os.cpu_count() or 1)


def read_mark(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and SHA-256 of a checkpoint's files, by name, from COMPLETE.json; older ones have no digests.

    Raises: FileNotFoundError, ValueError: it is missing or damaged; names the file.
    """
    mark = read_record(folder / COMPLETE, remedy(folder))
    mark.expect_types({"files": dict, **({"sha256": dict} if "sha256" in mark else {})})
    sizes, digests = mark["files"], mark.get("sha256", {})
    for fields, form in ((sizes, r"\d+"), (digests, "[0-9a-f]{64}")):
        wrong = [name for name, value in fields.items() if not re.fullmatch(form, str(value))]
        if wrong:
            raise mark.damaged(f"{wrong[0]} has {fields[wrong[0]]!r}")
    # Without a digest, a file would only be checked by its form.
    odd = sorted((mark.keys() - {"files", "sha256"}) or (sizes.keys() ^ digests.keys() if digests else ()))
    if odd:
        raise mark.damaged(f"{odd[0]!r} is not in both lists")
    return sizes, digests


# ---- Whole or damaged.


def incompleteness(folder: Path) -> str:
    """What is missing from a checkpoint, in words that name the file; "" if every listed file has its size."""
    try:
        sizes, _ = read_mark(folder)
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    # A file of another size was cut short.
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, {COMPLETE} lists {size:,}"
    return ""


def is_complete(folder: Path) -> bool:
    """Whether COMPLETE.json is there and every file it lists has the listed size; no file is read."""
    return not incompleteness(folder)


def damage_of(folder: Path, names: Iterable[str] = ()) -> str:
    """What is wrong with the files of a complete checkpoint, in words that name the file; "" if nothing is.

    Args: names: files that are read; empty: all that COMPLETE.json lists.
    """
    sizes, digests = read_mark(folder)
    files = {name: folder / name for name in names or sizes}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        return f"{missing[0]} is missing"
    # The state of a file now: it is read once as long as that stays.
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files.values()]
    with ThreadPoolExecutor(n_threads()) as pool:
        problems = pool.map(damage_of_file, files.values(), [digests.get(name, "") for name in files], states)
        return next(filter(None, problems), "")


@functools.lru_cache(maxsize=4096)
def damage_of_file(file: Path, expected: str, state: tuple[int, int]) -> str:
    """What is wrong with a file, "" if nothing is; its form is checked where no SHA-256 is `expected`.

    Args: state: size and time of the last change, under which the answer is kept.
    """
    if expected:
        digest = digest_file(file).hex()
        return "" if digest == expected else f"{file} is damaged: its SHA-256 is {digest}, {COMPLETE} has {expected}"
    # Without a digest: JSON, the header of safetensors, and the checksums within what torch.save wrote.
    try:
        if file.suffix == ".json":
            read_record(file, "")
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            return f"{file} is damaged: the checksum of {damaged} in it does not fit" if damaged else ""
    except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{file} is damaged ({error})"
    return ""


def digest_in(folder: Path, name: str) -> bytes:
    """SHA-256 of a file of a complete checkpoint, as listed in COMPLETE.json; computed for older checkpoints."""
    _, digests = read_mark(folder)
    return bytes.fromhex(digests[name]) if name in digests else digest_file(folder / name)


def check_files(folder: Path, names: Iterable[str] = ()) -> None:
    """Raises: ValueError: a file of a complete checkpoint is damaged, see `damage_of`; names file and remedy."""
    if damage := damage_of(folder, names):
        raise ValueError(f"{damage}; {remedy(folder)}")


def remedy(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    others = [path.name for path in checkpoints_in(folder.parent) if path != folder and (path / COMPLETE).is_file()]
    intact = f"use another checkpoint of the run ({', '.join(others)}), or " if others else ""
    return f"{intact}copy the folder again from where it is whole"


@contextlib.contextmanager
def explained_loading(file: Path, subject: str = "") -> Iterator[None]:
    """Around the loading of a checkpoint's file or folder: errors that its content causes name it.

    Args: subject: what is read of a folder.
    Raises: ValueError: something in it has another form than this code writes, or does not fit this run.
    """
    try:
        yield
    except OSError:  # It names the file.
        raise
    except Exception as error:  # What libraries raise on damaged files depends on their bytes.
        if isinstance(error, ValueError) and str(file) in str(error):  # It is explained already.
            raise
        reason = "; ".join(str(error).strip().splitlines()[:3])
        folder = file if file.is_dir() else file.parent
        name = f"{file}: {subject}" if subject else file
        raise ValueError(f"{name} cannot be loaded ({type(error).__name__}: {reason}); {remedy(folder)}") from error


# ---- Which checkpoint.


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name, -1 for other names."""
    prefix, _, digits = folder.name.partition("-")
    return int(digits) if prefix == "checkpoint" and digits.isdigit() else -1


def log_folder(folder: str | Path) -> Path:
    """Where TensorBoard's files of a run lie: in its folder, after which the page names it; in its subfolder
    `tensorboard` where an earlier version began to write there."""
    former = Path(folder) / "tensorboard"
    return former if former.is_dir() else Path(folder)


def event_files(run_dir: Path) -> list[Path]:
    """The files of a run that TensorBoard reads, the oldest first: their names begin with the time."""
    return sorted(file for file in log_folder(run_dir).glob("events.out.tfevents.*") if file.is_file())


def checkpoints_in(run_dir: Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, by step."""
    return sorted((path for path in run_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def newest_complete(run_dir: Path, *, check: bool = False) -> Path | None:
    """The newest complete checkpoint of a run; incomplete ones are named in a warning.

    Args: check: read all files, and pass over checkpoints that are damaged with a warning, too.
    Raises: ValueError: there are complete checkpoints, and all are damaged; names a file.
    """
    damages = []
    for folder in reversed(checkpoints_in(run_dir)):
        if problem := incompleteness(folder):
            logger.warning("ignoring %s: it was not written completely (%s)", folder, problem)
        elif check and (damage := damage_of(folder)):
            damages.append(damage)
        else:
            for damage in damages:
                logger.warning("%s; the steps after %s are made again", damage, folder)
            return folder
    if damages:
        raise ValueError(
            f"{damages[0]}, and no checkpoint of {run_dir} is whole; copy one again from where it is whole, or start "
            "a new run with another --run_name"
        )
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest complete checkpoint) or a checkpoint folder, whatever
    its name is now.

    Raises:
        FileNotFoundError: nothing there, or nothing complete.
    """
    folder = Path(path)
    if not folder.is_dir():
        others = [path.name for path in checkpoints_in(folder.parent)] if step_of(folder) >= 0 else []
        there = f"; {folder.parent} has {', '.join(others)}" if others else ""
        state = "it is a file" if folder.exists() else "the folder does not exist"
        raise FileNotFoundError(f"no checkpoint at {folder}: {state}{there}")
    # A checkpoint folder stands for itself.
    if step_of(folder) >= 0 or (folder / COMPLETE).is_file():
        if problem := incompleteness(folder):
            raise FileNotFoundError(f"{folder} was not written completely ({problem}); {remedy(folder)}")
        return folder
    # A run folder stands for its newest complete checkpoint.
    newest = newest_complete(folder)
    if newest is None and (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has {CONFIG} but no {COMPLETE}: it is no checkpoint of this repository. Folders of diffusers "
            "(AutoencoderKL, UNet2DConditionModel) and Llamas are taken by --init_from of the image VAE, of "
            "text-to-image and of the language model"
        )
    if newest is None:
        raise FileNotFoundError(
            f"no complete checkpoint under {folder}; train that stage first, or name a checkpoint-STEP folder"
        )
    return newest


def read_stage(path: str | Path, stage: str = "") -> Record:
    """The record `stage.json` of a checkpoint: stage, preset, arguments, commit, package versions, data, processes.

    Args: stage: the only stage that is accepted; "" accepts all.
    Raises:
        FileNotFoundError: no complete checkpoint, or none of a stage.
        ValueError: the record is damaged, or of another stage.
    """
    folder = resolve_checkpoint(path)
    if not (folder / STAGE).is_file():
        raise FileNotFoundError(f"{folder} has no {STAGE}: it was not written by a stage of this repository")
    check_files(folder, [STAGE])
    record = read_record(folder / STAGE, remedy(folder))
    record.expect_types({name: kind for name, kind in RECORD_TYPES.items() if name in record})
    if stage and record["stage"] != stage:
        raise ValueError(f"{folder} is of stage {record['stage']!r}; one of stage {stage!r} is needed")
    return record


# ---- Folders that records name, and that may have moved.


def lasting_name(name: str) -> str:
    """What a record keeps of a path or hub name: the absolute path where there is such a folder, else the name."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def places(recorded: str | Path, near: Path, start: str = "") -> Iterator[Path]:
    """Where a folder that a record names may be now: at that path, which may be relative to `start`, or under its
    last names in a folder above `near`.

    A run or a project that has moved keeps its inner order, so `runs/image_vae/demo` is found from
    `/new/runs/image_diffusion/demo`, in whatever folder the program was started.
    """
    names = [name for name in Path(recorded).parts if name != Path(recorded).anchor]
    yield Path(recorded)
    yield Path(start, recorded)
    for above in near.absolute().parents:
        yield from (above.joinpath(*names[first:]) for first in range(len(names)))


def data_of(checkpoint: Path) -> Path:
    """The preprocessed folder that a run trained on, also where folders have moved since; the recorded path where it
    is not found."""
    record = read_stage(checkpoint)
    recorded, fingerprint = Path(record["data"]["folder"]), record["data"]["fingerprint"].partition("+")[0]
    for place in places(recorded, checkpoint, record.get("working_directory", "")):
        with contextlib.suppress(OSError, ValueError):
            manifest = read_record(place / MANIFEST, "")
            # Earlier versions recorded the settings of a cache alone.
            if fingerprint in (manifest.get("fingerprint"), manifest.get("settings_fingerprint")):
                return place
    return recorded


def warn_of_former_data(checkpoint: Path) -> None:
    """Log that the data set on which a run was trained holds other files now: what was held out may be trained on."""
    recorded = read_stage(checkpoint).get("data") or {}
    if not {"folder", "fingerprint"} <= recorded.keys():
        return
    with contextlib.suppress(OSError, ValueError):  # The data set is not there, or not one of this version.
        folder, former = data_of(checkpoint), recorded["fingerprint"].partition("+")[0]
        manifest = read_record(folder / MANIFEST, "")
        if former not in (manifest["fingerprint"], manifest.get("settings_fingerprint")):
            logger.warning(
                "%s was trained on a former content of %s (fingerprint %s, now %s); train it again if it is to know "
                "the present one",
                *(checkpoint, folder, former, manifest["fingerprint"]),
            )


# ---- Loading.


def without_copies(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict without the further names of tied weights, which safetensors does not write twice and
    `load_model` gives back."""
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}


def load_model(model_class: type, path: str | Path, weights: WeightsKind = "ema"):
    """A stage's model from a checkpoint or run folder, in fp32 and eval mode; averaged weights where there are some,
    adapters merged into the weights that they adapt.

    The model is whole on every process, also under ZeRO-3, where `from_pretrained` would shard its weights.
    Random number generators keep their states.
    """
    folder = resolve_checkpoint(path)
    files = weight_files(folder, weights)
    adapters = [LORA] if (folder / LORA).is_file() else []
    check_files(folder, [*(file.name for file in files), *adapters])
    with torch.random.fork_rng():  # Initial weights are overwritten at once.
        model = model_class(load_config(model_class.config_class, folder))
    with explained_loading(files[0] if len(files) == 1 else folder):
        state = {name: value for file in files for name, value in load_file(file).items()}
        if adapters:
            state = merge_adapters(state, read_record(folder / LORA, remedy(folder)))
        # Tied weights are saved under one name.
        tied = {name: source for name, source in model.all_tied_weights_keys.items() if name not in state}
        state |= {name: state[source] for name, source in tied.items()}
        # fp32, whatever precision the weights were saved in; integers and booleans stay as they are.
        model.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        )
    return model.eval()


def weight_files(folder: Path, weights: WeightsKind = "ema") -> list[Path]:
    """The files of a checkpoint's weights, averaged ones where they are asked for and there are some. What several of
    them hold is that of the last one.

    Raises: FileNotFoundError: there are none.
    """
    averaged = [folder / EMA] if weights == "ema" and (folder / EMA).is_file() else []
    if averaged and not (folder / LORA).is_file():
        return averaged
    # transformers splits large raw weights into several files.
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model.safetensors; it is no checkpoint of a model")
    # Averages of adapters come without the weights that they adapt.
    return [*files, *averaged]


def load_config(config_class: Any, path: str | Path) -> Any:
    """The configuration of a model from a checkpoint or run folder.

    Raises:
        FileNotFoundError: no complete checkpoint.
        ValueError: config.json is damaged, or of another model; names the file.
    """
    folder = resolve_checkpoint(path)
    check_files(folder, [CONFIG])
    read_record(folder / CONFIG, remedy(folder))
    with explained_loading(folder / CONFIG):
        return config_class.from_pretrained(folder)


def write_card(folder: Path, model_class: type, stage: str, path: Path | None = None) -> None:
    """Write README.md into a checkpoint: which file holds which weights, and the line that loads them.

    Args: path: where the folder will be; None: where it is.
    """
    # Averaged weights are in a file of their own, which `from_pretrained` does not read.
    averaged, is_adapted = (folder / EMA).is_file(), (folder / LORA).is_file()
    kinds = "`model.safetensors` holds the raw weights, as the optimizer left them"
    if is_adapted:
        kinds = (
            "`model.safetensors` holds the frozen weights that the run started from and its adapters (`lora_A`, "
            f"`lora_B`)\nas the optimizer left them; `{LORA}` has their rank and alpha"
            + (f", `{EMA}` the moving average of the adapters" if averaged else "")
            + ".\n`inference/export_model.py` writes a folder with merged weights, which `from_pretrained` opens"
        )
    elif averaged and not list(folder.glob("model*.safetensors")):
        kinds = f"`{EMA}` holds the averaged weights"
    elif averaged:
        kinds += (
            f"; `{EMA}` holds their moving average, which evaluation, inference and the next stage use.\n"
            "`from_pretrained` of transformers reads the raw ones"
        )
    line = (
        f"from {model_class.__module__} import {model_class.__name__}; from utils.checkpoints import load_model; "
        f'model = load_model({model_class.__name__}, "{path or folder}")'
    )
    loaded = ("averaged weights" if averaged else "raw weights") + (", adapters merged" if is_adapted else "")
    text = (
        f"# {stage}, {folder.name}\n\n{kinds}. This line, run in the repository's folder, loads the {loaded}, "
        f"in fp32 and eval mode:\n\n```python\n{line}\n```\n\n"
        f"`{CONFIG}`: the model's configuration. `{STAGE}`: arguments, data, commit and versions of the run. "
        f"`{COMPLETE}`: sizes and SHA-256 of all files.\nThe other files are the state of training, which "
        "`--resume_from_checkpoint` reads.\n"
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def chosen_weights(checkpoint: Path, args: Any) -> WeightsKind:
    """Which weights of a checkpoint folder the flag `--weights` means; averaged ones only where there are some.

    Raises: ValueError: `--weights ema` was given and there are none.
    """
    # An exported folder holds either kind, as model.safetensors.
    if exported := (checkpoint / STAGE).is_file() and read_stage(checkpoint).get(EXPORTED):
        if args.weights != exported["weights"] and "weights" in args.given:
            raise ValueError(f"{checkpoint} holds its {exported['weights']} weights alone; leave --weights out")
        return exported["weights"]
    averaged = (checkpoint / EMA).is_file()
    if not averaged and args.weights == "ema" and "weights" in args.given:
        raise ValueError(f"{checkpoint} has no averaged weights ({EMA}); use --weights raw")
    return args.weights if averaged else "raw"


def provenance() -> dict:
    """Commit of the code, versions of the packages that a run depends on, and the folder of relative paths."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("git") else ""
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    with contextlib.suppress(PackageNotFoundError):  # It is optional.
        packages["deepspeed"] = version("deepspeed")
    return {
        "git_commit": commit.strip() or None,
        "packages": {"python": platform.python_version(), **packages},
        "working_directory": os.getcwd(),
    }
