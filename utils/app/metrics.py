"""Metrics that `evaluate.py` has written in a folder of runs, and the comparison of two of them."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from utils.app.commands import command
from utils.app.runs import MAX_DEPTH, Runs, subfolders
from utils.checkpoints import COMPLETE, checkpoints_in, newest_complete, read_stage, step_of
from utils.evaluation import (
    audio,
    audio_diffusion_report,
    captioned_sounds_report,
    image_diffusion_report,
    image_vae,
    text,
)
from utils.evaluation.arguments.every_stage import EvaluateArguments
from utils.evaluation.multimodal import report as multimodal_report
from utils.evaluation.tables import FEATURE_COLUMNS, Column
from utils.exporting.card import evaluation_command
from utils.exporting.stages import MODELS
from utils.training.log_lines import number

METRICS, SHEETS = "metrics.json", "contact_sheet*.png"
MAX_BYTES = 10_000_000  # of metrics.json
MAX_SHEET = 2048  # pixels of the longer side, as it is shown
MODEL_ROWS = ("model", "generated")  # All other rows of scores are references.
MAX_SHEETS = 4  # A multimodal model has one per direction.
# What says under which conditions was measured, or is no metric.
CONDITIONS = ("data", "sampling", "weights", "precision", "device", "threads", "features", "recognizer")
NO_METRICS = (*CONDITIONS, "definitions", "packages", "seconds", "step", "latents", "n_clips_defined", "arguments")
# Flags that change no metric, or that the conditions above say.
NO_CONDITIONS = ("checkpoint", "output_dir", "contact_sheet", "batch_size", "num_workers", "remote_cache_gb")
NO_CONDITIONS += ("cached_dataset", "split", "max_samples", "weights", "bf16")
COUNTS = ("n_clips", "n_clips_all")  # They stand beside the metrics that are means of so many.
TEXT_COLUMNS = {
    name: dataclasses.replace(text.COLUMNS[name], better=better)
    for name, better in {"loss": "low", "perplexity": "low", "accuracy": "high"}.items()
}
COLUMNS: dict[str, dict[str, Column]] = {  # stage -> metrics in the order of its tables
    "image_vae": image_vae.COLUMNS,
    "recurrent_vae": image_vae.COLUMNS,
    "image_diffusion": {**image_diffusion_report.COLUMNS, **FEATURE_COLUMNS},
    "vocoder": audio.COLUMNS,
    "audio_vae": audio.COLUMNS,
    "audio_diffusion": {**captioned_sounds_report.COLUMNS, **audio_diffusion_report.COLUMNS},
    "multimodal": {**multimodal_report.LOSS_COLUMNS, **TEXT_COLUMNS, **multimodal_report.COLUMNS},
}


@dataclasses.dataclass
class Evaluated:
    """A run or a checkpoint with its metrics.

    Attributes:
        name: its path relative to the folder of runs.
        stage: that trained it.
        folder: of its metrics; None: it has none.
        metrics: content of metrics.json; empty where it has none.
        command: has made its metrics; where it has none, or they do not say: makes them.
    """

    name: str
    stage: str
    folder: Path | None
    metrics: dict[str, Any]
    command: str


def measured_folders(folder: Path, depth: int, root: Path) -> Iterator[Path]:
    """Folders that have a metrics.json. Args: root: see `utils.app.runs.subfolders`."""
    for child in subfolders(folder, root):
        with contextlib.suppress(OSError):  # It is gone since, or cannot be read.
            if (child / METRICS).is_file():
                yield child
            if depth > 1 and not (child / COMPLETE).is_file():
                yield from measured_folders(child, depth - 1, root)


def names(runs: Runs) -> list[str]:
    """What can be compared: folders with metrics, the newest first, then runs and checkpoints."""
    measured = []
    for folder in measured_folders(runs.root, MAX_DEPTH, runs.root):
        with contextlib.suppress(OSError):
            if runs.is_inside(folder / METRICS):
                name = folder.relative_to(runs.root).as_posix()
                measured.append((-(folder / METRICS).stat().st_mtime_ns, name))
    paths = [name for _, name in sorted(measured)]
    checkpoints = [checkpoint for checkpoint in runs.checkpoints(*MODELS) if checkpoint.name != "."]
    paths += [Path(checkpoint.name).parent.as_posix() for checkpoint in checkpoints if step_of(checkpoint.folder) >= 0]
    paths = [name for name in paths if name != "."]
    return list(dict.fromkeys([*paths, *(checkpoint.name for checkpoint in checkpoints)]))


def evaluated(runs: Runs, name: str | None) -> Evaluated:
    """The metrics of a name of `names`; no other path leads anywhere.

    Raises: ValueError, OSError: there is no such name, or its metrics.json is damaged.
    """
    known = names(runs)
    if name is None or name not in known:
        example = f", such as {known[0]}" if known else f": {runs.root} has none yet"
        raise ValueError(f"{name!r} is neither a run with a checkpoint nor one in {runs.root}; choose one{example}")
    return read_evaluated(runs, name)


def read_evaluated(runs: Runs, name: str) -> Evaluated:
    """The metrics of a name that is known to be one of `names`. Raises: ValueError, OSError: they are damaged."""
    folder, output_dir = runs.root / name, ""
    home, step = folder, step_of(folder)
    if step >= 0 and not (folder / METRICS).is_file():
        # The run's folder holds the metrics of one checkpoint, others have folders of their own.
        home = folder.parent
        if not is_of(home, folder):
            home = folder.parent / f"metrics-{step}"
            output_dir = str(home)
    metrics: dict[str, Any] = {}
    if (home / METRICS).is_file() and runs.is_inside(home / METRICS):
        metrics = read_metrics(home / METRICS)
    # A folder of metrics alone belongs to the checkpoint that they name.
    is_apart = bool(metrics) and step < 0 and not checkpoints_in(folder) and not (folder / COMPLETE).is_file()
    if is_apart:
        output_dir = str(folder)
    evaluated_folder = str(metrics.get("checkpoint") or folder) if is_apart else str(folder)
    call = command("evaluate.py", EvaluateArguments, checkpoint=evaluated_folder, output_dir=output_dir)
    if metrics:
        line = evaluation_command(metrics) if metrics.get("arguments") else str(call)
        return Evaluated(name, metrics["stage"], home, metrics, line)
    checkpoint = folder if step >= 0 or not checkpoints_in(folder) else newest_complete(folder)
    return Evaluated(name, read_stage(checkpoint or folder)["stage"], None, {}, str(call))


def fitting(runs: Runs, name: str | None, known: Sequence[str]) -> list[str]:
    """The names that can be compared with one, which is one of them: the others of its stage. Args: known: all."""
    stage = stage_of(runs, name) if name in known else ""
    return [other for other in known if stage and other != name and stage_of(runs, other) == stage]


def stage_of(runs: Runs, name: str) -> str:
    """The stage of one of `names`; empty where it is damaged."""
    try:
        return read_evaluated(runs, name).stage
    except (OSError, ValueError, KeyError):
        return ""


def next_measured(runs: Runs, name: str, others: Sequence[str]) -> str | None:
    """The first of `others` that has metrics and is of another run, else one of this run with metrics of its own;
    None: there is none."""
    own = read_evaluated(runs, name).folder
    measured = [other for other in others if read_evaluated(runs, other).folder not in (None, own)]
    return next((other for other in measured if run_of(other) != run_of(name)), next(iter(measured), None))


def run_of(name: str) -> str:
    """The name without that of a checkpoint, or of its metrics."""
    return re.sub(r"/(checkpoint|metrics)-\d+$", "", name)


def is_of(run: Path, checkpoint: Path) -> bool:
    """Whether the metrics in a run's folder are those of one of its checkpoints."""
    try:
        metrics = read_metrics(run / METRICS)
    except (OSError, ValueError):
        return False
    return Path(str(metrics.get("checkpoint"))).name == checkpoint.name


def read_metrics(file: Path) -> dict[str, Any]:
    """The content of a metrics.json. Raises: ValueError, OSError: it is none."""
    remedy = "evaluate the checkpoint again"
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has more than {MAX_BYTES // 10**6} MB; {remedy}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); {remedy}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise ValueError(f"{file} has no field stage; {remedy}")
    for name in ("scores", "definitions", "arguments"):
        if not isinstance(content.get(name, {}), dict):
            raise ValueError(f"{file}: {name} is no table; {remedy}")
    return content


def sheets_of(runs: Runs, *sides: Evaluated) -> list[tuple[str, list[Image.Image | None]]]:
    """The contact sheets beside the metrics: name, and the image of each side, None where there is none."""
    names = {file.stem for one in sides if one.folder for file in one.folder.glob(SHEETS)}
    return [(name, [sheet_of(runs, one, f"{name}.png") for one in sides]) for name in sorted(names)[:MAX_SHEETS]]


def sheet_of(runs: Runs, one: Evaluated, name: str) -> Image.Image | None:
    """A contact sheet, made smaller where it is large."""
    file = one.folder and one.folder / name
    if not file or not file.is_file() or not runs.is_inside(file):
        return None
    try:
        with Image.open(file) as image:
            image.thumbnail((MAX_SHEET, MAX_SHEET))
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def numbers_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of nested tables by their paths."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers_in(item, (*path, str(name)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def table(first: Evaluated, *others: Evaluated) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a comparison: scores of the model, those of references, then what else differs; without
    another, of one alone, with its other metrics.

    Args: others: one at most.
    Raises: ValueError: they are of different stages.
    """
    sides = (first, *others)
    for second in others:
        if first.stage != second.stage:
            raise ValueError(
                f"{first.name} is of stage {first.stage} and {second.name} of stage {second.stage}, which have "
                "different metrics; choose two of one stage"
            )
    values = []
    for one in sides:
        measured = {name: value for name, value in one.metrics.items() if name not in NO_METRICS}
        values.append(dict(numbers_in(measured)))
    columns = COLUMNS.get(first.stage, {})
    paths = sorted(
        dict.fromkeys(path for side in values for path in side), key=lambda path: order_of(path, list(columns))
    )
    errors = {column.error for column in columns.values() if column.error}
    rows = []
    for path in paths:
        found = [side.get(path) for side in values]
        if path[-1] in (*errors, *COUNTS) or not (path[0] == "scores" or is_told(path, found, columns)):
            continue
        column = columns.get(path[-1])
        error_path = (*path[:-1], column.error if column else "")
        row = row_of(path, found, [side.get(error_path) for side in values], column)
        rows.append([*row, " and ".join(dict.fromkeys(n_samples(one.metrics, path) for one in sides if one.metrics))])
    heads = [f"{one.name}, step {one.metrics.get('step', '-')}" for one in sides]
    return ["row", "metric", *heads, *(["difference", "better"] if others else ["good"]), "samples"], rows


def is_told(path: tuple[str, ...], found: Sequence[float | None], columns: dict[str, Column]) -> bool:
    """Whether a number beside the scores is shown: of one alone metrics, of two what differs; what is equal is a
    setting."""
    if len(found) == 1:
        return path == ("model", "parameters") or (path[0] != "model" and path[-1] in columns)
    return None not in found and found[0] != found[1]


def n_samples(metrics: dict[str, Any], path: tuple[str, ...]) -> str:
    """The number of clips, images or texts that a score is of; empty where metrics.json does not say."""
    if path[0] not in ("scores", "losses"):
        return ""
    *rows, name = path[1:]
    if "n_clips_defined" in metrics:
        count = value_at(metrics["n_clips_defined"], [*rows, name])
        if count is None and name.removesuffix("_all") in ("wer", "cer"):
            count = value_at(metrics["scores"], [*rows, "n_clips_all" if name.endswith("_all") else "n_clips"])
    elif "n_items" in metrics:
        count = value_at(metrics["n_items"], rows[:1])
    else:
        count = value_at(metrics, ["data", "n_samples"])
    return "" if count is None else str(count)


def value_at(tables: Any, path: Sequence[str]) -> Any:
    """The value of nested tables at a path, None where there is none."""
    for name in path:
        tables = tables.get(name) if isinstance(tables, dict) else None
    return tables


def order_of(path: tuple[str, ...], columns: list[str]) -> tuple[Any, ...]:
    """Scores of the model, then those of references, then others; metrics in the order of these columns."""
    is_model = len(path) > 1 and path[-2] in MODEL_ROWS
    place = columns.index(path[-1]) if path[-1] in columns else len(columns)
    return path[0] != "scores", not is_model, path[:-1], place, path[-1]


def row_of(
    path: tuple[str, ...], found: list[float | None], errors: list[float | None], column: Column | None
) -> list[str]:
    """A row of the table: names, values with their standard errors; of two the difference and which is better, of one
    which values are good."""
    template = column.template if column else ""
    is_reference = path[0] == "scores" and path[-2] not in MODEL_ROWS

    def cell(value: float | None, error: float | None = None) -> str:
        if value is None:
            return "-"
        shown = template.format(value) if "f}" in template else number(value)
        return shown if error is None else f"{shown} ± {template.format(error)}"

    label = " ".join(path[1:-1] if path[0] == "scores" else path[:-1])
    texts = [f"{label} (reference)" if is_reference else label, column.title if column else path[-1]]
    texts += [cell(value, error) for value, error in zip(found, errors)]
    if len(found) == 1:
        return [*texts, column.better if column else ""]
    first, second = found
    if first is None or second is None:
        return [*texts, "", ""]
    difference = second - first
    better = ""
    if column and column.better and difference and not is_reference:
        # Two standard errors of the difference.
        if difference**2 <= 4 * sum((error or 0) ** 2 for error in errors):
            better = "within the error"
        elif math.isfinite(difference):
            better = "second" if (difference > 0) == (column.better == "high") else "first"
    return [*texts, f"{'+' if difference > 0 else ''}{cell(difference)}", better]


def conditions(first: Evaluated, second: Evaluated) -> list[str]:
    """What differs between how two were measured, a line each."""
    sides = [dict(leaves({name: one.metrics.get(name) for name in CONDITIONS})) for one in (first, second)]
    given = [one.metrics.get("arguments") or {} for one in (first, second)]
    if all(given):  # Earlier versions did not record them.
        for side, arguments in zip(sides, given):
            side |= {f"--{name}": str(value) for name, value in arguments.items() if name not in NO_CONDITIONS}
    found = dict.fromkeys([*sides[0], *sides[1]])
    return [f"{name}: {a} and {b}" for name in found if (a := sides[0].get(name)) != (b := sides[1].get(name))]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested tables as texts, by their names joined with a dot."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)
