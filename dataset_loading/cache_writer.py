"""The writing side of a preprocessed folder: atomic files, a journal to continue from, the manifest last."""

import contextlib
import io
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dataset_loading.content import CONTENT_FIELDS
from dataset_loading.files import (
    JOURNAL,
    MANIFEST,
    Record,
    fingerprint_of_bytes,
    read_manifest,
    replace_file,
    sync_file_system,
    with_digest,
)
from dataset_loading.integrity import digest_of
from dataset_loading.locks import LOCK

logger = logging.getLogger(__name__)

SYNC_SECONDS = 10.0  # Between flushes of samples and journal to the disk.
# Fields that not every entry of a folder has: those of parts and of several captions, and those that earlier versions
# did not write.
OPTIONAL_FIELDS = {"part", "parts", "bytes", "crc32", "captions", "offset", "duration", *CONTENT_FIELDS}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a sample's file atomically; equal tensors give equal bytes. Returns its digest, for the entry."""
    # `clone`: a view would be written with the whole storage that it lies in.
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, buffer)
    replace_file(path, buffer.getvalue())
    return digest_of(buffer.getvalue())


def check_output(folder: Path) -> None:
    """Raises: ValueError: the output folder is a file, or holds something else than preprocessed samples."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    names = {path.name for path in folder.iterdir()} - {LOCK} if folder.exists() else set()
    if names and not names & {MANIFEST, JOURNAL}:
        raise ValueError(f"--output_dir {folder} is not empty and no preprocessed folder; choose another one")


def read_entries(folder: Path, header: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries by (split, key) that earlier runs with the same settings left in the folder.

    Raises:
        ValueError: the folder was made with other settings (the message names both fingerprints, the differing
            settings and what to do), is complete and has more samples than this run asks for, or has a damaged
            manifest.
    """
    entries_by_key = {}
    # A complete folder, to which samples may be added.
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, None)
        check_same(folder, manifest, header)
        check_no_fewer(folder, manifest, header)
        manifest.expect_types({"entries": Record})
        # Samples that equal some of validation are written, too, and may be trained on another time.
        for split, entries in [*manifest["entries"].items(), ("train", manifest.get("duplicates", []))]:
            if not isinstance(entries, list) or not all(map(is_entry, entries)):
                raise manifest.damaged(f"entries.{split} must be a list of objects with 'key', 'copy' and 'caption'")
            for entry in entries:
                entry.pop("same_as", None)
                entries_by_key[split, entry["key"]] = entry
    # An interrupted run: what it wrote since the manifest, if there is one.
    for value in read_journal(folder / JOURNAL) if (folder / JOURNAL).exists() else ():
        if isinstance(value, dict):
            check_same(folder, value, header)
        else:
            split, entry = value
            entries_by_key[split, entry["key"]] = entry
    # Damaged entries lack what the others have.
    names = set().union(*entries_by_key.values()) - OPTIONAL_FIELDS
    return {name: entry for name, entry in entries_by_key.items() if names <= entry.keys()}


def is_entry(value: Any) -> bool:
    """Whether a JSON value is the entry of a sample."""
    types = {"key": str, "copy": int, "caption": str}
    if not isinstance(value, dict) or not isinstance(value.get("parts", 1), int):
        return False
    return all(isinstance(value.get(name), kind) for name, kind in types.items())


def read_journal(file: Path) -> Iterator[Any]:
    """The lines of a journal: headers (dicts) and entries ([split, entry]).

    Damaged lines are left out, as is a line that a kill has cut off, and entries before the first header, whose
    settings are not known: their samples are written again. A warning says how many there are.
    """
    n_damaged, has_header = 0, False
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        # Lines of earlier versions have no CRC.
        text, tab, crc = line.partition("\t")
        try:
            value = json.loads(text) if text and (not tab or crc == crc_of(text)) else None
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and is_header(value):
            has_header = True
            yield value
        elif has_header and isinstance(value, list) and is_line(value):
            yield value
        elif line:
            n_damaged += 1
    if n_damaged:
        logger.warning("%s: %d damaged lines are left out, their samples are written again", file, n_damaged)


def journal_line(value: Any) -> str:
    """A line of a journal: JSON, in which tabs are escaped, a tab, and the CRC of the JSON."""
    text = json.dumps(value)
    return f"{text}\t{crc_of(text)}\n"


def crc_of(text: str) -> str:
    """The CRC-32 of a text."""
    return f"{zlib.crc32(text.encode()):08x}"


def is_line(value: list[Any]) -> bool:
    """Whether a list of a journal is an entry with its split."""
    return len(value) == 2 and isinstance(value[0], str) and is_entry(value[1])


def is_header(value: dict[str, Any]) -> bool:
    """Whether an object of a journal is the header of a run."""
    types = {"schema": int, "stage": str, "fingerprint": str, "settings": dict}
    return all(isinstance(value.get(name), kind) for name, kind in types.items())


def check_same(folder: Path, old_header: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises: ValueError: the folder's fingerprint is another one."""
    # The fingerprint of a manifest covers the samples as well, except in manifests of earlier versions.
    if header["fingerprint"] in (old_header["fingerprint"], old_header.get("settings_fingerprint")):
        return
    raise ValueError(
        f"{folder} has fingerprint {old_header['fingerprint']}, this run has {header['fingerprint']}: "
        f"{'; '.join(describe_differences(old_header, header))}. Choose another --output_dir, or delete the folder "
        "first"
    )


def describe_differences(old_header: dict[str, Any], header: dict[str, Any]) -> list[str]:
    """The settings in which two manifests differ, each with both values."""
    pairs = []
    for name in sorted({"schema", "stage", *old_header["settings"], *header["settings"]}):
        old, new = ({**side, **side["settings"]}.get(name) for side in (old_header, header))
        if old != new:
            pairs.append(f"{name}={old!r} there, {new!r} now")
    return pairs


def check_no_fewer(folder: Path, manifest: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises: ValueError: this run asks for fewer samples than the folder holds, and would delete the others."""
    old, new = (side.get("arguments", {}) for side in (manifest, header))
    for name, default in (("limit", -1), ("num_augmented_copies", 0)):
        before, now = old.get(name, default), new.get(name, default)
        if (math.inf if before == -1 else before) > (math.inf if now == -1 else now):
            raise ValueError(
                f"{folder} was made with --{name}={before}; --{name}={now} would delete samples: choose another "
                f"--output_dir, or give --{name}={before}"
            )


class Journal:
    """The list of the samples that are written, for the next run to continue from. A context manager.

    Every sample is in it as soon as its file is written, so that a kill costs none. Every few seconds samples and
    journal are flushed to the disk together, so that a loss of power costs seconds of work. What was not flushed may
    then be cut short, which the digests in the entries tell.

    Args:
        folder: of the samples; it is prepared for writing.
        header: of this run.
    """

    def __init__(self, folder: Path, header: dict[str, Any]):
        for split in ("train", "validation"):
            (folder / split).mkdir(parents=True, exist_ok=True)
            for leftover in (folder / split).glob(".*.tmp"):
                leftover.unlink()
        self.folder, self.flushed = folder, time.monotonic()
        # A line break first: the last line of a killed run may be cut off.
        self.file = open(folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115
        self.write(f"\n{journal_line(header)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # Closing tries again to write what could not be written; its error would hide the first one.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.file.close()

    def write(self, lines: str) -> None:
        """Append lines. Raises: OSError: they cannot be written; it names the journal."""
        try:
            self.file.write(lines)
            self.file.flush()
        except OSError as error:  # A full disk gives no name.
            error.filename = self.file.name
            raise

    def add(self, split: str, entries: list[dict[str, Any]]) -> None:
        """List samples whose files are written."""
        self.write("".join(journal_line([split, entry]) for entry in entries))
        if time.monotonic() > self.flushed + SYNC_SECONDS:
            sync_file_system(self.folder)
            self.flushed = time.monotonic()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, one line per sample, and remove the journal. All samples are flushed to the disk before.

    Returns: the manifest as it was written, with its digest.
    """
    sync_file_system(folder)
    # By hand, since json.dumps gives either one line for everything or a line for every single value.
    fields = []
    for name, value in manifest.items():
        if name == "entries":
            rows = {split: ",\n".join(map(dump, entries)) for split, entries in value.items()}
            text = "{" + ",\n".join(f'"{split}": [\n{lines}\n]' for split, lines in rows.items()) + "}"
        else:
            text = dump(value)
        fields.append(f'"{name}": {text}')
    content = ("{" + ",\n".join(fields)).encode("utf-8", "backslashreplace")
    digest = fingerprint_of_bytes([content], n_digits=64)
    replace_file(folder / MANIFEST, with_digest(content), sync=True)
    (folder / JOURNAL).unlink(missing_ok=True)
    return {**manifest, "sha256": digest}


def remove_others(folder: Path, manifest: dict[str, Any]) -> None:
    """Delete samples that the manifest does not name: their raw files are gone. The caller holds the lock."""
    names = {split: {entry["key"] for entry in entries} for split, entries in manifest["entries"].items()}
    names["train"] |= {entry["key"] for entry in manifest["duplicates"]}
    for split, keys in names.items():
        for file in os.scandir(folder / split):
            if file.name.endswith(".pt") and file.is_file() and file.name.removesuffix(".pt") not in keys:
                os.unlink(file)


def dump(value: Any) -> str:
    """JSON on one line, legible in every language."""
    return json.dumps(value, ensure_ascii=False)


def sample_key(name: str, occurrence: int, copy: int) -> str:
    """A legible file name, safe on every file system and unique for (name, occurrence, copy)."""
    # The occurrence tells files of the same name apart, such as those of a table that lists one twice.
    stem = re.sub(r"[^A-Za-z0-9_]+", "_", os.path.splitext(name)[0]).strip("_")[-60:] or "sample"
    digest = fingerprint_of_bytes([f"{name}\n{occurrence}".encode()], n_digits=12)
    return f"{stem}-{digest}" + (f"-copy{copy}" if copy else "")


def part_key(key: str, part: int) -> str:
    """The key of a part of a copy; that of the first is the copy's own."""
    return f"{key}-part{part}" if part else key
