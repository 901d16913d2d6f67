"""Where texts lie in common layouts of images and recordings: in files beside them, in transcripts of a folder, in
tables of their own form. `docs/data.md` draws each.

    a.png with a.txt                      sidecars, also .caption, .lab and .normalized.txt
    84/121123/84-121123-0000.flac         LibriSpeech: lines `id text` in 84/121123/84-121123.trans.txt
    wav48/p225/p225_001.wav               VCTK: txt/p225/p225_001.txt
    wavs/LJ001-0001.wav                   LJSpeech: lines `id|text|normalised text` in metadata.csv, without a header
    clips/a.mp3                           Common Voice: train.tsv, ... with columns path, sentence, client_id
    anywhere.wav                          NeMo: lines with audio_filepath; Whisper: lines with audio.path and sentence
"""

import itertools
import json
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from dataset_loading.tables import FILE_COLUMNS, iterate_table, read_table, read_text

logger = logging.getLogger(__name__)

SIDECARS = (".txt", ".caption", ".lab", ".normalized.txt")  # The first that is there counts.
TRANSCRIPTS = ".trans.txt"  # LibriSpeech: one such file per folder.


# ---- Tables.


def read_records(index: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of an index as dicts, the file's name in the column `file_name` or in that of the kind.

    Raises: ValueError: a row cannot be read; names file, line and remedy.
    """
    rows = read_ljspeech(index) or read_table(index)
    columns = dict.fromkeys(name for row in rows for name in row)
    # Other names of the column, such as those of NeMo and Common Voice.
    if "file_name" not in columns and kind not in columns:
        other = next((name for name in FILE_COLUMNS if name in columns), "")
        for row in rows:
            if other in row:
                row["file_name"] = row.pop(other)
    for row in rows:
        if isinstance(row.get(kind), dict):  # Whisper: {"audio": {"path": ...}}.
            row[kind] = row[kind].get("path")
    return rows


def lists_files(index: Path, kind: str) -> bool:
    """Whether a table is an index of files: one of its first rows has a column of them. Tables that cannot be read are
    taken for one, so that their mistake is named, and so are those called metadata; JSON objects, such as COCO's, are
    none."""
    if index.stem.lower() == "metadata" and index.suffix.lower() != ".json":
        return True
    try:
        if read_ljspeech(index):
            return True
        rows = [row for _, row in itertools.islice(iterate_table(index), 1000)]
        if rows and isinstance(rows[0], ValueError):
            lists = index.suffix.lower() != ".json" or not isinstance(json.loads(read_text(index)), dict)
        else:
            lists = not rows or any({*FILE_COLUMNS, kind}.intersection(row) for row in rows if isinstance(row, dict))
    except (OSError, ValueError, RecursionError):
        return True
    if not lists:
        logger.warning("%s is passed over: it has no column 'file_name' or %r, and is no index of files", index, kind)
    return lists


def read_ljspeech(index: Path) -> list[dict[str, Any]]:
    """The rows of an LJSpeech metadata.csv next to its folder wavs/, none for any other index.

    Returns: `file_name`, `text` (the normalised text where there is one), `original_text`. Quotes mean nothing there.
    Raises: ValueError: a line has no text, or more fields than three.
    """
    if index.name != "metadata.csv" or not (index.parent / "wavs").is_dir():
        return []
    # Fields between bars, without a header; a table of the usual kind has the name of a column in its first line.
    lines = read_words(index).split("\n")
    first = next((line for line in lines if line.strip()), "")
    if "|" not in first or {cell.strip().lower() for cell in first.split("|")} & set(FILE_COLUMNS):
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *texts = line.rstrip("\r").split("|")
        if not 1 <= len(texts) <= 2:
            raise ValueError(
                f"{index}: line {number} must read id|text or id|text|normalised text, without further bars: "
                f"{line[:60]!r}"
            )
        file_name = f"wavs/{name}" if Path(name).suffix == ".wav" else f"wavs/{name}.wav"
        rows.append({"file_name": file_name, "text": texts[-1] or texts[0], "original_text": texts[0]})
    return rows


def check_file_name(row: dict[str, Any], column: str, place: str) -> None:
    """Raises: ValueError: a row names no single file; `place` is its file and number."""
    value = row.get(column)
    if column not in row:
        columns = ", ".join(map(str, row))
        remedy = "name the column of the files so, in the first line of a table"
        raise ValueError(f"{place} has no 'file_name'; its columns: {columns}; {remedy}")
    if is_missing(value):
        raise ValueError(f"{place} has no 'file_name', its cell is empty; name its file, or remove the row")
    if not isinstance(value, str):
        raise ValueError(f"{place} has no 'file_name' but {repr(value)[:60]}; write the name of one file as a text")
    if "://" in value:
        raise ValueError(f"{place} names a URL, {value[:100]}; download the file, and name it by its path")


def is_missing(value: Any) -> bool:
    """Whether a cell of a table is empty: nothing, blanks, or the NaN of data frames."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def find_file(folder: Path, name: str, listings: dict[Path, dict[str, str]]) -> str:
    """The path of a file that an index names: as it is written, with composed or decomposed letters, without blanks
    around it, with the backslashes of Windows, or in `clips/`, where Common Voice keeps what its tables name. As it is
    written where there is none.

    Args: listings: names in folders, kept from call to call; {} at first.
    """
    path = os.path.normpath(folder / name)
    if os.path.exists(path):
        return path
    name = name.strip()
    candidates = (folder / name, folder / name.replace("\\", "/"), folder / "clips" / name)
    for candidate in candidates:
        if (same := on_disk(Path(os.path.normpath(candidate)), listings)) is not None:
            return str(same)
    return path


def on_disk(path: Path, listings: dict[Path, dict[str, str]]) -> Path | None:
    """A path whose names equal this one's but for composed and decomposed letters; None where there is none."""
    if os.path.exists(path):  # Unlike Path.exists, for names of any length.
        return path
    parent = on_disk(path.parent, listings) if path.parent != path else None
    if parent is None:
        return None
    if parent not in listings:
        listings[parent] = names_in(parent)
    name = listings[parent].get(unicodedata.normalize("NFC", path.name))
    return parent / name if name else None


def names_in(folder: Path) -> dict[str, str]:
    """Names in a folder by their composed form; none where it is no folder that can be read."""
    try:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder)}
    except OSError:
        return {}


# ---- Texts beside the files.


class SideTexts:
    """Texts and speakers that lie beside files, and which files hold them.

    Args:
        root: folder of the split.
        files: images or recordings below it.
    Attributes:
        used: files that a text was read from.
    """

    def __init__(self, root: Path, files: Collection[Path]):
        self.root = root
        self.used: set[Path] = set()
        self.transcripts: dict[Path, str] = {}
        self.librispeech: set[Path] = set()  # Folders with transcripts.
        for folder in sorted({file.parent for file in files}):
            for transcripts in sorted(folder.glob(f"*{TRANSCRIPTS}")):
                self.used.add(transcripts)
                self.librispeech.add(folder)
                self.transcripts |= read_transcripts(transcripts)
        self.is_vctk = (root / "txt").is_dir()
        self.listings: dict[Path, dict[str, Path]] = {}

    def without_file(self, files: Iterable[Path]) -> list[str]:
        """Names in LibriSpeech's transcripts that no file has, below the root."""
        missing = set(self.transcripts) - {file.with_suffix("") for file in files}
        return sorted(path.relative_to(self.root).as_posix() for path in missing)

    def row_of(self, file: Path) -> dict[str, Any]:
        """`text` and `speaker` of a file, as far as they are known."""
        plain = file.with_suffix("")
        if plain in self.transcripts:
            return {"text": self.transcripts[plain], "speaker": speaker_of_name(plain)}
        if self.is_vctk and (text := self.vctk_text(file)):
            return {"text": self.read(text), "speaker": file.parent.name}
        for suffix in SIDECARS:
            if sidecar := self.sidecar(plain, suffix):
                return {"text": self.read(sidecar)}
        return {"speaker": speaker_of_name(plain)} if file.parent in self.librispeech else {}

    def sidecar(self, plain: Path, suffix: str) -> Path | None:
        """The file of a text beside another file, whose ending may have capitals; None where there is none."""
        folder = plain.parent
        if folder not in self.listings:
            self.listings[folder] = {f"{path.stem}{path.suffix.lower()}": path for path in sorted(folder.iterdir())}
        path = self.listings[folder].get(f"{plain.name}{suffix}")
        return path if path is not None and path.is_file() else None

    def vctk_text(self, file: Path) -> Path | None:
        """VCTK's file of the text of an utterance: txt/p225/p225_001.txt of wav48/p225/p225_001_mic1.flac."""
        stem = re.sub(r"_mic[12]$", "", file.stem)
        text = self.root / "txt" / file.parent.name / f"{stem}.txt"
        return text if os.path.isfile(text) else None

    def read(self, file: Path) -> str:
        """A text without white space around it."""
        self.used.add(file)
        return read_words(file).strip()


def read_words(file: Path) -> str:
    """A file of text. Raises: ValueError: it cannot be read, or has NUL bytes; names file, line and remedy."""
    text = read_text(file)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}: line {line} has a NUL byte; remove it, such as with tr -d '\\000'")
    return text


def speaker_of_name(file: Path) -> str:
    """The speaker of a recording of LibriSpeech: 84 of 84-121123-0000."""
    return file.name.partition("-")[0]


def read_transcripts(file: Path) -> dict[Path, str]:
    """The texts of LibriSpeech's lines `id text`, by the path of the recording without its ending."""
    lines = (line.strip().partition(" ") for line in read_words(file).split("\n") if line.strip())
    return {file.parent / name: text.strip() for name, _, text in lines}


def without_second_microphone(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Files, and those of VCTK's second microphone whose utterance the first one recorded, too.

    Otherwise one of both could be held out while the other is trained on.
    """
    files = list(files)
    names = {file.with_suffix("") for file in files}
    second = [file for file in files if file.stem.endswith("_mic2") and file.with_name(f"{file.stem[:-1]}1") in names]
    dropped = set(second)
    return [file for file in files if file not in dropped], second
