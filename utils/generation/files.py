"""Files that inference reads, the folder of its results, which no other run writes into, and files that give none."""

import contextlib
import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from dataset_loading.left_out import survey_folder
from dataset_loading.sources import walk
from dataset_loading.tables import decode_text
from utils.checkpoints import provenance, write_json
from utils.options import declared_fields

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"  # Marks a folder as that of one run; replaced by the results at its end.
SHEET = "sheet.png"


def claim_folder(output_dir: str, args: Any) -> Path:
    """The folder of a run's results: `output_dir`, or, where it holds those of an earlier run or of another script,
    the first of `output_dir`_2, _3, ... that does not exist. Marked as this run's by settings.json.

    Args: args: the flags, which are written there.
    Raises: OSError: it cannot be written. ValueError: no folder is named.
    """
    if not output_dir:
        raise ValueError("--output_dir is empty; give a folder")
    flags = {field.name: getattr(args, field.name) for field in declared_fields(args)}
    base = Path(output_dir)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.resolve().name}_{number}")
        try:
            folder.mkdir(parents=True, exist_ok=number == 1)  # Other folders may hold inputs.
        except FileExistsError:
            if number == 1:
                raise FileExistsError(f"--output_dir {base} is a file; give a folder") from None
            continue
        if (folder / SHEET).exists():
            continue
        # Of two runs that begin at once, one creates the file.
        with contextlib.suppress(FileExistsError), open(folder / SETTINGS, "x", encoding="utf-8") as file:
            json.dump({**flags, "is_complete": False}, file, indent=2, sort_keys=True)
            if number > 1:
                logger.warning("%s holds the results of another run; these go to %s", base, folder)
            return folder
    raise AssertionError("there is always a next number")


def read_lines(path: str | Path, flag: str) -> list[str]:
    """The lines of a UTF-8 or UTF-16 file that are not blank; "-" is standard input.

    Args: flag: that names the file, for messages.
    Raises:
        OSError: it cannot be read.
        ValueError: it has no such line, NUL characters, or another encoding; names the line and the remedy.
    """
    name = f"--{flag} {path}"
    if str(path) == "-":
        content = sys.stdin.buffer.read()
    elif Path(path).is_dir():
        raise IsADirectoryError(f"{name} is a folder; give a file with one text a line")
    else:
        content = Path(path).read_bytes()
    try:
        text = decode_text(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    # str.splitlines would also split at characters that prompts may contain, such as U+2028.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ValueError(f"{name}: line {number} has a NUL byte; remove it, such as with tr -d '\\000'")
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{name} has no line with text")
    return lines


def find_inputs(names: Iterable[str], suffixes: Collection[str]) -> dict[str, Path]:
    """Files given directly or in folders, by unique names.

    Raises: FileNotFoundError: a path does not exist, or there are no files.
    """
    inputs: dict[str, Path] = {}
    for name in map(Path, names):
        if not name.exists():
            raise FileNotFoundError(f"{name} does not exist")
        files = list(walk(name, suffixes)) if name.is_dir() else [name]
        if name.is_dir() and (left_out := survey_folder(name, used=files, suffixes=suffixes)):
            logger.warning("left out of %s: %s", name, left_out)
        for file in files:
            # The path within the folder as a name; repeated names are numbered from 2.
            inside = file.relative_to(name) if name.is_dir() else Path(name.name)
            stem = "__".join(inside.with_suffix("").parts)
            numbered = (f"{stem}_{number}" for number in itertools.count(2))
            inputs[next(key for key in itertools.chain([stem], numbered) if key not in inputs)] = file
    if not inputs:
        raise FileNotFoundError(f"no inputs in {', '.join(names)}; known suffixes: {' '.join(sorted(suffixes))}")
    return inputs


def check_unicode(*texts: str) -> None:
    """Raises: ValueError: a text that came from bytes which are no UTF-8, as a shell or standard input may give."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            readable = text[:60].encode("ascii", "backslashreplace").decode()
            raise ValueError(f"the text '{readable}' is not UTF-8; give it in UTF-8") from error


def refuse_overwriting(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raises: ValueError: an output would overwrite an input; names it."""
    protected = {file.resolve() for file in inputs}  # Links count as the files they point to.
    for file in outputs:
        if file.resolve() in protected:
            raise ValueError(f"{file} is an input and would be overwritten; give another folder with --output_dir")


def write_settings(folder: Path, args: Any, **record: Any) -> None:
    """Write what was asked for, the results, and the versions of the code."""
    write_json(folder / SETTINGS, {**dataclasses.asdict(args), **record, **provenance()})


def check_size(size: tuple[int, int], shorter_side: int, max_pixels: int) -> None:
    """Raises: ValueError: the image resized to this shorter side (0: not resized) has more than `max_pixels`."""
    scale = shorter_side / min(size) if shorter_side else 1.0
    width, height = (round(side * scale) for side in size)
    if width * height > max_pixels:
        raise ValueError(
            f"{size[0]}x{size[1]} pixels, {width}x{height} for the model, more than --max_pixels={max_pixels}; crop "
            "it, give a smaller --image_size, or more --max_pixels and memory"
        )


class Failures:
    """Inputs that give no result, so that the others go on.

    Attributes: reasons: by the name of the input.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, Exception] = {}

    @contextlib.contextmanager
    def around(self, name: Any) -> Iterator[None]:
        """Around the work on one input: what is wrong with it is a warning that names it."""
        try:
            yield
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG files.
            logger.warning("%s is left out: %s", name, error)
            self.reasons[str(name)] = error

    def check(self, total: int) -> None:
        """At the end. Raises: ValueError: some of `total` inputs gave no result; names the first five."""
        if self.reasons:
            names = [f"{name} ({reason})" for name, reason in self.reasons.items()]
            more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{len(names)} of {total} files gave no result: {'; '.join(names[:5])}{more}")
