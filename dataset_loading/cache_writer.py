"""The writing side of a preprocessed folder: atomic files, a journal to continue from, the manifest last."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_loading.files import JOURNAL, MANIFEST, fingerprint_of_bytes, read_manifest, replace_file


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a sample's file atomically; equal tensors give equal bytes."""
    # `clone`: a view would be written with the whole storage that it lies in.
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, buffer)
    replace_file(path, buffer.getvalue())


def read_entries(folder: Path, header: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries by (split, key) that earlier runs with the same settings left in the folder.

    Raises:
        ValueError: the folder was made with other settings (the message names both fingerprints, the differing
            settings and what to do), holds something else, or has a damaged manifest.
    """
    manifest_file, journal_file = folder / MANIFEST, folder / JOURNAL
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    if folder.exists() and not manifest_file.exists() and not journal_file.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder} is not empty and no preprocessed folder; choose another one")
    entries_by_key = {}
    # A complete folder, to which samples may be added.
    if manifest_file.exists():
        manifest = read_manifest(folder, None)
        check_same(folder, manifest, header)
        rows = ((split, entry) for split, entries in manifest["entries"].items() for entry in entries)
        entries_by_key = {(split, entry["key"]): entry for split, entry in rows}
    # An interrupted run: what it wrote since the manifest, if there is one.
    for value in read_journal(journal_file) if journal_file.exists() else ():
        if isinstance(value, dict):
            check_same(folder, value, header)
        else:
            split, entry = value
            entries_by_key[split, entry["key"]] = entry
    return entries_by_key


def read_journal(file: Path) -> Iterator[Any]:
    """The lines of a journal: headers (dicts) and entries ([split, entry]); a line cut off by a kill is left out."""
    for line in file.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def check_same(folder: Path, old_header: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises: ValueError: the folder's fingerprint is another one."""
    if old_header["fingerprint"] == header["fingerprint"]:
        return
    pairs = {}
    for name in ("schema", "stage", *old_header["settings"].keys() | header["settings"].keys()):
        old, new = ({**side, **side["settings"]}.get(name) for side in (old_header, header))
        if old != new:
            pairs[name] = f"{name}={old!r} there, {new!r} now"
    raise ValueError(
        f"{folder} has fingerprint {old_header['fingerprint']}, this run has {header['fingerprint']}: "
        f"{'; '.join(pairs[name] for name in sorted(pairs))}. Choose another --output_dir, or delete the folder first"
    )


def open_journal(folder: Path, header: dict[str, Any]) -> io.TextIOWrapper:
    """Prepare the folder for writing and open its journal for appending, with the header of this run."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / split).glob(".*.tmp"):
            leftover.unlink()
    # A line break first: the last line of a killed run may be cut off.
    journal = open(folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115
    journal.write(f"\n{json.dumps(header)}\n")
    journal.flush()
    return journal


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, one line per sample, and remove the journal."""
    # By hand, since json.dumps gives either one line for everything or a line for every single value.
    fields = []
    for name, value in manifest.items():
        if name == "entries":
            rows = {split: ",\n".join(map(dump, entries)) for split, entries in value.items()}
            text = "{" + ",\n".join(f'"{split}": [\n{lines}\n]' for split, lines in rows.items()) + "}"
        else:
            text = dump(value)
        fields.append(f'"{name}": {text}')
    content = ("{" + ",\n".join(fields) + "}\n").encode("utf-8", "backslashreplace")
    replace_file(folder / MANIFEST, content, sync=True)
    (folder / JOURNAL).unlink()


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
