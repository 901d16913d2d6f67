"""Preprocessed samples on disk: one file of tensors per sample, and a manifest that describes them all.

    <folder>/manifest.json           schema, stage, settings, fingerprint, command, totals, broken files, entries
    <folder>/train/<key>.pt          one dict of tensors
    <folder>/validation/<key>.pt
    <folder>/progress.jsonl          only while preprocessing has not finished: its settings and the entries so far

or many samples per file, see `packs.py`; both are read alike.

`cache_writer.py` writes such a folder; the manifest comes last, so a folder with a manifest is complete. It may be
read while samples are added to it: the manifest names those that are whole.
"""

import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset_loading.columns import EntryColumns, EntryRow
from dataset_loading.entry_lines import EntryLines, read_lines, rows_of
from dataset_loading.files import MANIFEST, Record, read_manifest, read_record, shorten
from dataset_loading.integrity import TensorKinds, changed_bytes, is_out_of_memory, wrong_content
from dataset_loading.left_out import why_empty
from dataset_loading.packs import PACKS, Packs, entries_of, is_packed

logger = logging.getLogger(__name__)

MMAP_BYTES = 4 << 20  # Reading is faster than mapping below this size.
IN_MEMORY_BYTES = 256 << 20  # A split whose files have fewer bytes together stays in memory once it is read.


class CachedDataset(Dataset):
    """The samples of one split of a preprocessed folder; an item is the sample's dict of tensors and its `index`.

    Args:
        folder: the preprocessed folder.
        split: `"train"` or `"validation"`.
    Attributes:
        manifest: the manifest as a dict.
        fingerprint: identifies the settings that shaped the tensors, and the raw files.
        settings_fingerprint: identifies the settings alone; equal to `fingerprint` in folders of earlier versions.
        entries: one dict per sample in the order of the items: `key`, `source`, `copy`, `caption`, `length`, ...
        places: of the items in the manifest.
    Raises:
        FileNotFoundError: the folder is missing, empty, incomplete, lacks the split, or lacks files.
        ValueError: the folder is of another stage or of another version of the layout, or its manifest is damaged.
    """

    stage: str | None = None  # The only stage whose folders are accepted; None accepts all.
    entry_types: ClassVar[dict[str, Any]] = {"key": str, "caption": str}  # What every entry of the manifest must have.

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder, self.stage, read=read_lines)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.settings_fingerprint: str = self.manifest.get("settings_fingerprint", self.fingerprint)
        if shard := self.manifest.get("shard"):
            raise ValueError(
                f"{self.folder} is shard {shard['index']}/{shard['count']} of a cache, not all of it; join the shards "
                f"with: python preprocess_{self.manifest['stage']}_dataset.py --merge <folders of all shards> "
                "--output_dir <folder>"
            )
        self.check_kind()
        warn_of_former_source(self.folder, self.manifest["settings"].get("made_from"))
        self.manifest.expect_types({"command": list})
        self.manifest["entries"] = entries_of(self.folder, self.manifest, f"run: {self.repair()}")
        for name, entries in self.manifest["entries"].items():
            self.check_entries(name, entries)
        self.entries: Sequence[dict[str, Any]] = self.manifest["entries"].get(split, [])
        if not self.entries:
            counts = {name: len(entries) for name, entries in self.manifest["entries"].items()}
            reason = why_empty(self.manifest, split)
            raise FileNotFoundError(
                f"{self.folder} has no samples in split {split!r} (it has {counts}): {reason}. It was "
                f"made with: {self.command()}"
            )
        # The files: those of a packed cache, or one of each sample.
        self.packs: Packs | None = None
        if isinstance(self.entries, EntryColumns):
            remedy = self.repair()
            self.packs = Packs(self.folder, split, self.manifest, entries=self.entries, remedy=remedy)
        n_bytes = self.packs.total_bytes if self.packs else self.check_files()
        # Samples that stay in memory once they are read, by index; None: the split is too large for it.
        self.in_memory: dict[int, dict[str, Tensor]] | None = {} if n_bytes < IN_MEMORY_BYTES else None
        self.places: Sequence[int] = range(len(self.entries))
        # For each place whether this process has checked the sample.
        self.checked = bytearray(len(self.entries))

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all samples but those."""
        self.entries = [self.entries[index] for index in indices]
        self.places = [self.places[index] for index in indices]
        self.in_memory = None if self.in_memory is None else {}

    def check_files(self) -> int:
        """Whether every sample has its file. Returns: bytes of all files.

        Raises: FileNotFoundError: files are missing.
        """
        # One listing of the folder instead of a call per file: there may be millions. Sizes are those that were
        # written; each is compared when the sample is read.
        files = list(os.scandir(self.folder / self.split)) if (self.folder / self.split).is_dir() else []
        names, missing, sizes = {file.name for file in files}, [], []
        for entry in rows_of(self.entries):
            if f"{entry['key']}.pt" not in names:
                missing.append(entry["key"])
            sizes.append(entry.get("bytes"))
        if missing:
            raise FileNotFoundError(
                f"{self.folder / self.split} lacks {len(missing)} of {len(self.entries)} files, the first is "
                f"{missing[0]}.pt; this adds them: {self.repair()}"
            )
        # Entries of earlier versions have no sizes.
        return sum(file.stat().st_size for file in files) if None in sizes else sum(sizes)

    def check_kind(self) -> None:
        """Raises: ValueError: the folder holds other data than this class reads."""

    def check_entries(self, split: str, entries: Any) -> None:
        """Raises: ValueError: the entries of a split are no list of objects, or lack a key."""
        if isinstance(entries, EntryColumns):
            return entries.check_types(self.entry_types, f"entries.{split}")
        if not isinstance(entries, list | EntryLines):
            raise self.manifest.damaged(f"entries.{split}={shorten(entries)} must be list")
        for number, row in enumerate(rows_of(entries)):
            # Entries of earlier versions have no digest.
            is_entry = isinstance(row, dict)
            has_digest = is_entry and "crc32" in row
            types = {**self.entry_types, "bytes": int, "crc32": str} if has_digest else self.entry_types
            if is_entry and all(isinstance(row.get(name), kinds) for name, kinds in types.items()):
                continue
            if not isinstance(entry := entries[number], Record):
                raise self.manifest.damaged(f"entries.{split}[{number}]={shorten(entry)} must be an object")
            entry.expect_types(types, f"entries.{split}[{number}]")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Raises: ValueError: the file is damaged; the message names it and the command that writes it again."""
        index = range(len(self.entries))[index]  # Negative ones from the end; IndexError beyond it.
        if self.in_memory is not None and index in self.in_memory:
            return dict(self.in_memory[index])  # A copy of the dict, so that callers may change it.
        sample = {**self.read(index), "index": torch.tensor(index)}
        if self.in_memory is not None:
            self.in_memory[index] = sample
        return dict(sample)

    def window(self, index: int, windows: Mapping[str, slice]) -> dict[str, Tensor]:
        """An item of which some tensors are cut along their last axis: copies, so that nothing holds the rest of a
        long sample in memory, unless the whole split stays there.

        Args: windows: what is left of a tensor's last axis, by name.
        """
        index = range(len(self.entries))[index]
        place = self.places[index]
        # Of a sample that is not checked any more, only the window is read; a file of its own is mapped.
        if self.packs and self.in_memory is None and self.checked[place]:
            return {**self.packs.read(place, check=False, windows=windows), "index": torch.tensor(index)}
        sample = CachedDataset.__getitem__(self, index)
        return {
            name: tensor[..., windows[name]].clone() if name in windows else tensor for name, tensor in sample.items()
        }

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors in a sample's file, which is checked when this process reads it for the first time."""
        place = self.places[index]
        is_checked = bool(self.checked[place])
        if self.packs:
            kinds = None if is_checked else self.tensor_kinds(EntryRow(self.packs.entries, place))
            sample = read_packed(self.packs, place, kinds=kinds)
        else:
            entry = self.entries[index]
            kinds = None if is_checked else self.tensor_kinds(entry)
            sample = read_sample(self.path_of(entry), entry, kinds=kinds, repair=self.repair())
        self.checked[place] = True
        return sample

    def value(self, index: int, name: str, default: Any = None) -> Any:
        """A field of an entry, without reading the others; the default where it has none."""
        if isinstance(self.entries, EntryColumns):
            return self.entries.value(index, name, default)
        return self.entries[index].get(name, default)

    def numbers(self, name: str) -> list[Any]:
        """A field of all entries that is a number."""
        if isinstance(self.entries, EntryColumns):
            return self.entries.numbers(name).tolist()
        return [entry[name] for entry in self.entries]

    def distinct(self, name: str) -> list[Any]:
        """The different values of a field in both splits, sorted."""
        splits = self.manifest["entries"]
        if not self.packs:
            return sorted({entry[name] for entries in splits.values() for entry in entries if name in entry})
        tables = [self.manifest[PACKS]["splits"][split] for split, entries in splits.items() if entries]
        return sorted(set().union(*(table["distinct"].get(name, []) for table in tables)))

    def n_empty_captions(self) -> int:
        """Number of samples without a caption."""
        if isinstance(self.entries, EntryColumns):
            return self.manifest[PACKS]["splits"][self.split]["empty_captions"]
        return sum(not entry["caption"].strip() for entry in self.entries)

    def path_of(self, entry: Mapping[str, Any]) -> Path:
        """The file of a sample in a cache with a file per sample."""
        return self.folder / self.split / f"{entry['key']}.pt"

    def file_of(self, index: int) -> Path:
        """The file of a sample, or the pack that holds it."""
        return self.packs.path_of(self.places[index]) if self.packs else self.path_of(self.entries[index])

    def tensor_kinds(self, entry: Mapping[str, Any]) -> TensorKinds:
        """The tensors that a sample must have; further ones are allowed."""
        return {}

    def expect(self, **settings: Any) -> Self:
        """Compare settings that shaped the tensors, such as `image_size=64`, with those that a model needs.

        Returns: this dataset.
        Raises: ValueError: a setting differs; the message shows both values and the command that makes what is needed.
        """
        for name, value in settings.items():
            value_of_folder = self.manifest["settings"][name]
            if value_of_folder != value:
                raise ValueError(
                    f"{self.folder} was made with {name}={value_of_folder!r}, but {name}={value!r} is needed; "
                    f"this makes it: {self.command(**self.remedy(name, value))}"
                )
        return self

    def remedy(self, name: str, value: Any) -> dict[str, Any]:
        """The flags of the command that makes a folder with another value of a setting."""
        return {name: value, "output_dir": f"{str(self.folder).rstrip('/')}_{name}_{value}"}

    def repair(self) -> str:
        """The command that writes missing samples again. The folder may have been moved since it was made."""
        pack = {"pack": self.manifest[PACKS]["samples_per_pack"]} if is_packed(self.manifest) else {}
        return self.command(output_dir=self.folder, **pack)

    def command(self, **changes: Any) -> str:
        """The command that made the folder, with some flags replaced, or left out where their value is None."""
        words = list(map(str, self.manifest["command"]))
        for name, value in changes.items():
            flag = f"--{name}"
            # Drop the flag with all its values, up to the next flag, then append it with the new value.
            if flag in words:
                start = words.index(flag)
                stop = next((n for n in range(start + 1, len(words)) if words[n].startswith("--")), len(words))
                del words[start:stop]
            if value is None:
                continue
            words += [f"--no_{name}" if value is False else flag] if isinstance(value, bool) else [flag, str(value)]
        return shlex.join(["python", *words])


def warn_of_former_source(folder: Path, made_from: Mapping[str, str] | None) -> None:
    """Log that the cache from which another one was made holds other files now.

    Args: made_from: folder and fingerprint of the former; None: the samples come from raw files.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # It need not be there any more.
        fingerprint = made_from and read_record(Path(made_from["folder"]) / MANIFEST, "").get("fingerprint")
        if made_from and fingerprint != made_from["fingerprint"]:
            logger.warning(
                "%s was made from a former content of %s (fingerprint %s, now %s); the command that made it brings it "
                "up to date",
                *(folder, made_from["folder"], made_from["fingerprint"], fingerprint),
            )


def read_sample(
    path: Path, entry: Mapping[str, Any], *, kinds: TensorKinds | None, repair: str, index: int | None = None
) -> dict[str, Tensor]:
    """The tensors in a sample's file.

    Args:
        entry: of the manifest.
        kinds: the tensors that it must have; None: neither they nor the digest are checked.
        repair: the command that writes the file again.
        index: of the sample in its split, where the file is a pack.
    Raises: ValueError: the file is damaged or cannot be read; names it and the command.
    """
    if index is not None:
        return read_packed(packs_at(path.parent.parent, path.parent.name, repair), index, kinds=kinds)
    sample, problem = None, ""
    try:
        try:
            mmap = os.path.getsize(path) >= MMAP_BYTES
            sample = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except OSError:
            raise
        except Exception as error:  # A damaged file raises errors of many types.
            problem = changed_bytes(path, entry)
            if not problem and is_out_of_memory(error):
                raise
            problem = problem or f"{type(error).__name__}: {error}".partition("\n")[0]
        # What is wrong with the content says more than a digest.
        if not problem and kinds is not None:
            problem = wrong_content(sample, kinds) or changed_bytes(path, entry)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); if it is gone, run: {repair}") from error
    if problem:
        raise ValueError(f"{path} is damaged ({problem}); delete it and run: {repair}")
    assert sample is not None
    return sample


def read_packed(packs: Packs, index: int, *, kinds: TensorKinds | None) -> dict[str, Tensor]:
    """As `read_sample`, from a packed cache."""
    sample = packs.read(index, check=kinds is not None)
    problem = "" if kinds is None else wrong_content(sample, kinds)
    if problem:
        file = packs.path_of(index)
        raise ValueError(f"{file} is damaged (sample {index}: {problem}); delete it and run: {packs.remedy}")
    return sample


@functools.lru_cache(maxsize=4)
def packs_at(folder: Path, split: str, repair: str) -> Packs:
    """The packs of a split, opened once in a process."""
    manifest = read_manifest(folder, None)
    entries = entries_of(folder, manifest, f"run: {repair}")[split]
    assert isinstance(entries, EntryColumns), "a cache with a file per sample has no packs"
    return Packs(folder, split, manifest, entries=entries, remedy=repair)


def evenly_spaced(n_total: int, n: int) -> list[int]:
    """`n` indices at even distances in `range(n_total)`, or all of them where there are fewer."""
    n = min(n, n_total)
    return [i * n_total // n for i in range(n)]
