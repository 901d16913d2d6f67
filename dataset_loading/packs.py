"""Packed caches: the tensors of many samples in one safetensors file, and the entries as columns.

    <folder>/manifest.json               as of a cache with a file per sample, with `packs` in place of `entries`
    <folder>/<split>.arrow               the entries, and where the tensors are, see `columns.py`
    <folder>/<split>/00000.safetensors   the tensors of the first samples: a tensor of each name for all of them

Samples lie in the order of the entries. Where all tensors of a name in a pack have the same shape they are stacked,
else they are flat, one after the other; the columns `@name` (bytes from the first sample's tensor) and `@name.axis`
(sizes) say where one is. A pack is mapped, not read: a sample costs its own bytes, whose CRC (`@crc32`) is compared
when a process reads it for the first time. `pack.py` writes such a folder.
"""

import json
import math
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset_loading.columns import EntryColumns
from dataset_loading.files import Record, digest_file, read_manifest
from dataset_loading.remote import RemotePacks

PACKS = "packs"  # The manifest's key, in place of "entries".
CRC = "@crc32"
MAX_OPEN = 1024  # Packs that are mapped at the same time by a process.
MAX_FETCHED = 8  # The same of a cache elsewhere: a mapped pack fills the disk, also where it was deleted.
CHECKED_BYTES = 64 << 20  # The digest of an index is compared when it is opened, unless it is larger.


def is_packed(manifest: Record) -> bool:
    """Whether a manifest is that of a packed cache."""
    return PACKS in manifest


def pack_name(number: int) -> str:
    """The file of a pack."""
    return f"{number:05d}.safetensors"


def entries_of(folder: Path, manifest: Record, remedy: str) -> dict[str, Sequence[Any]]:
    """The entries of a cache by split, of either form.

    Args: remedy: what to do about a damaged index.
    Raises: FileNotFoundError, ValueError: an index is missing or damaged.
    """
    if not is_packed(manifest):
        manifest.expect_types({"entries": Record})
        return dict(manifest["entries"])
    manifest.expect_types({PACKS: Record})
    manifest[PACKS].expect_types({"samples_per_pack": int, "splits": Record}, PACKS)
    tables = manifest[PACKS]["splits"]
    # A split without samples has no file.
    return {
        split: open_columns(folder / f"{split}.arrow", table, remedy) if table["samples"] else []
        for split, table in tables.items()
        if split in ("train", "validation")
    }


def splits_of(folder: Path, stage: str | None = None) -> list[str]:
    """The splits of a cache that have samples.

    Raises: FileNotFoundError, ValueError: no complete cache, or of another stage than that one.
    """
    manifest = read_manifest(folder, stage)
    return [split for split, entries in entries_of(folder, manifest, "make it again").items() if entries]


def open_columns(file: Path, table: Record, remedy: str) -> EntryColumns:
    """The index of a split. Its size is compared, and its digest where it is small.

    Raises: FileNotFoundError, ValueError: it is missing, or not what was written.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {remedy}")
    size = file.stat().st_size
    problem = f"it has {size} bytes, {table['bytes']} were written" if size != table["bytes"] else ""
    if not problem and size <= CHECKED_BYTES and (digest := digest_file(file).hex()) != table["sha256"]:
        problem = f"its SHA-256 is {digest}, {table['sha256']} was written"
    if problem:
        raise ValueError(f"{file} is damaged ({problem}); {remedy}")
    return EntryColumns(file, remedy)


class TensorSpec:
    """Where the tensors of one name are.

    Args:
        name: of the tensor.
        dtype: as torch names it.
        shape: sizes; None: another one in each sample.
        is_everywhere: whether every sample has it.
    """

    def __init__(self, name: str, dtype: str, shape: Sequence[int | None], *, is_everywhere: bool):
        self.name, self.dtype, self.shape = name, getattr(torch, dtype), tuple(shape)
        self.axes = [(axis, f"@{name}.{axis}") for axis, size in enumerate(shape) if size is None]
        self.n_bytes = math.prod(size or 0 for size in shape) * self.dtype.itemsize
        # The same distance from one sample to the next, or a column.
        self.offset = "" if is_everywhere and not self.axes else f"@{name}"


class Packs:
    """The tensors of one split of a packed cache.

    Args:
        folder: of the cache.
        split: name of the split.
        manifest: of the cache.
        entries: of the split.
        remedy: the command that writes what is missing or damaged.
        is_repair: whether packs may be missing or damaged; reading a sample of theirs is then an error.
    Raises: FileNotFoundError, ValueError: see `check_files`.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: Record,
        *,
        entries: EntryColumns,
        remedy: str,
        is_repair: bool = False,
    ):
        table = manifest[PACKS]["splits"][split]
        self.folder, self.entries, self.remedy = folder / split, entries, remedy
        self.samples_per_pack: int = manifest[PACKS]["samples_per_pack"]
        self.specs = [
            TensorSpec(name, dtype, shape, is_everywhere=is_everywhere)
            for name, dtype, shape, is_everywhere in table["tensors"]
        ]
        self.sizes: list[int] = table["files"]
        self.opened: OrderedDict[int, tuple[mmap.mmap, dict[str, int]]] = OrderedDict()
        self.remote = RemotePacks.of(self.folder)
        if not is_repair:
            self.check_files()

    def check_files(self) -> None:
        """Raises: FileNotFoundError, ValueError: packs are missing, or have other sizes than were written."""
        # One listing of the folder for all packs.
        files = os.scandir(self.folder) if self.folder.is_dir() and not self.remote else ()
        present = self.remote.sizes if self.remote else {file.name: file.stat().st_size for file in files}
        missing = [number for number in range(len(self.sizes)) if pack_name(number) not in present]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(missing)} of {len(self.sizes)} packs, the first is "
                f"{pack_name(missing[0])}; this writes them again: {self.remedy}"
            )
        for number, size in enumerate(self.sizes):
            if present[pack_name(number)] != size:
                raise ValueError(
                    f"{self.folder / pack_name(number)} is damaged (it has {present[pack_name(number)]} bytes, {size} "
                    f"were written); delete it and run: {self.remedy}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped packs, which every process maps itself."""
        return {**vars(self), "opened": OrderedDict()}

    @property
    def total_bytes(self) -> int:
        """Bytes of all packs."""
        return sum(self.sizes)

    def path_of(self, index: int) -> Path:
        """The pack with a sample."""
        return self.folder / pack_name(index // self.samples_per_pack)

    def open_pack(self, number: int) -> tuple[mmap.mmap, dict[str, int]]:
        """A mapped pack, and the place of the first byte of each tensor in it.

        Raises: ValueError: it cannot be read.
        """
        if number in self.opened:
            self.opened.move_to_end(number)
            return self.opened[number]
        file = self.folder / pack_name(number)
        try:
            with self.remote.open(file.name) if self.remote else open(file, "rb") as stream:
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            # safetensors: the length of a JSON header, the header with the place of each tensor, the tensors.
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            begins = {
                spec.name: start + header[spec.name]["data_offsets"][0] for spec in self.specs if spec.name in header
            }
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error}); if it is gone, run: {self.remedy}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged (no safetensors: {error!r}); delete it and run: {self.remedy}"
            ) from error
        self.opened[number] = content, begins
        if len(self.opened) > (MAX_FETCHED if self.remote else MAX_OPEN):
            self.opened.popitem(last=False)
        return content, begins

    def read(self, index: int, *, check: bool, windows: Mapping[str, slice] | None = None) -> dict[str, Tensor]:
        """The tensors of a sample, copied out of the pack.

        Args:
            check: whether to compare the CRC.
            windows: the part of a tensor's last axis that is read, by name; the others are read whole. Not with
                `check`, which needs all bytes.
        Raises: ValueError: the pack is damaged or cannot be read; names it and the command.
        """
        assert not (check and windows), "a CRC is that of whole tensors"
        number, position = divmod(index, self.samples_per_pack)
        content, begins = self.open_pack(number)
        sample, crc = {}, 0
        for spec in self.specs:
            shape, n_bytes = spec.shape, spec.n_bytes
            if spec.axes:
                sizes = list(shape)
                for axis, column in spec.axes:
                    sizes[axis] = self.entries.number(column, index)
                shape, n_bytes = tuple(sizes), math.prod(sizes) * spec.dtype.itemsize
            offset = self.entries.number(spec.offset, index) if spec.offset else position * n_bytes
            if offset < 0:  # This sample has no such tensor.
                continue
            if spec.name not in begins:
                raise ValueError(
                    f"{self.path_of(index)} is damaged (no {spec.name!r}); delete it and run: {self.remedy}"
                )
            start = begins[spec.name] + offset
            if windows and spec.name in windows:
                sample[spec.name] = read_window(content, start, shape, spec.dtype, windows[spec.name])
                continue
            with memoryview(content)[start : start + n_bytes] as view:
                data = bytearray(view)
            crc = zlib.crc32(data, crc) if check else 0
            if len(data) == n_bytes:
                flat = torch.frombuffer(data, dtype=spec.dtype) if n_bytes else torch.empty(0, dtype=spec.dtype)
                sample[spec.name] = flat.reshape(shape)
        if check and crc != (expected := self.entries.number(CRC, index)):
            raise ValueError(
                f"{self.path_of(index)} is damaged (sample {self.entries.value(index, 'key')}: its CRC-32 is "
                f"{crc:08x}, {expected:08x} was written); delete it and run: {self.remedy}"
            )
        return sample


def read_window(content: mmap.mmap, start: int, shape: Sequence[int], dtype: torch.dtype, window: slice) -> Tensor:
    """A copy of a part of a mapped tensor; only the pages with it are read.

    Args:
        start: place of its first byte.
        shape: of the whole tensor.
        window: of its last axis.
    """
    # As bytes, since a tensor may begin at any of them.
    size = dtype.itemsize
    rows = np.frombuffer(content, np.uint8, math.prod(shape) * size, start).reshape(*shape[:-1], shape[-1] * size)
    first, stop, _ = window.indices(shape[-1])
    return torch.from_numpy(rows[..., first * size : stop * size].copy()).view(dtype)
