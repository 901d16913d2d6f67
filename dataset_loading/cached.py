"""Preprocessed samples on disk: one file of tensors per sample, and a manifest that describes them all.

    <folder>/manifest.json           schema, stage, settings, fingerprint, command, totals, broken files, entries
    <folder>/train/<key>.pt          one dict of tensors
    <folder>/validation/<key>.pt
    <folder>/progress.jsonl          only while preprocessing has not finished: its settings and the entries so far

`cache_writer.py` writes such a folder; the manifest comes last, so a folder with a manifest is complete.
"""

import os
import pickle
import shlex
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset_loading.files import read_manifest

MMAP_BYTES = 4 << 20  # Reading is faster than mapping below this size.
IN_MEMORY_BYTES = 256 << 20  # A split whose files have fewer bytes together stays in memory once it is read.


class CachedDataset(Dataset):
    """The samples of one split of a preprocessed folder; an item is the sample's dict of tensors and its `index`.

    Args:
        folder: the preprocessed folder.
        split: `"train"` or `"validation"`.
    Attributes:
        manifest: the manifest as a dict.
        fingerprint: identifies the settings and the source that shaped the tensors.
        entries: one dict per sample in the order of the items: `key`, `source`, `copy`, `caption`, `length`, ...
    Raises:
        FileNotFoundError: the folder is missing, empty, incomplete, lacks the split, or lacks files.
        ValueError: the folder is of another stage or of another version of the layout.
    """

    stage: str | None = None  # The only stage whose folders are accepted; None accepts all.

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder, self.stage)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.entries: list[dict[str, Any]] = self.manifest["entries"].get(split, [])
        if not self.entries:
            counts = {name: len(entries) for name, entries in self.manifest["entries"].items()}
            raise FileNotFoundError(
                f"{self.folder} has no samples in split {split!r} (it has {counts}); a validation split comes from "
                f"--validation_fraction or --validation_dataset: {self.command()}"
            )
        # One listing of the folder instead of a call per file: there may be millions.
        files = os.scandir(self.folder / split) if (self.folder / split).is_dir() else ()
        present = {file.name: file.stat().st_size for file in files}
        missing = [entry["key"] for entry in self.entries if f"{entry['key']}.pt" not in present]
        if missing:
            raise FileNotFoundError(
                f"{self.folder / split} lacks {len(missing)} of {len(self.entries)} files, the first is "
                f"{missing[0]}.pt; this adds them: {self.command()}"
            )

        # Samples that stay in memory once they are read, by index; None: the split is too large for it.
        self.in_memory: dict[int, dict[str, Tensor]] | None = {} if sum(present.values()) < IN_MEMORY_BYTES else None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Raises: ValueError: the file cannot be read; the message names it and the command that writes it again."""
        index = range(len(self.entries))[index]  # Negative ones from the end; IndexError beyond it.
        if self.in_memory is not None and index in self.in_memory:
            return dict(self.in_memory[index])  # A copy of the dict, so that callers may change it.
        path = self.folder / self.split / f"{self.entries[index]['key']}.pt"
        try:
            mmap = os.path.getsize(path) >= MMAP_BYTES
            sample = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run: {self.command()}") from error
        sample = {**sample, "index": torch.tensor(index)}
        if self.in_memory is not None:
            self.in_memory[index] = sample
        return dict(sample)

    def expect(self, **settings: Any) -> Self:
        """Compare settings that shaped the tensors, such as `image_size=64`, with those that a model needs.

        Returns: this dataset.
        Raises: ValueError: a setting differs; the message shows both values and the command that makes what is needed.
        """
        for name, value in settings.items():
            assert name in self.manifest["settings"], f"{name} is not among {sorted(self.manifest['settings'])}"
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

    def command(self, **changes: Any) -> str:
        """The command that made the folder, with some flags replaced."""
        words = list(self.manifest["command"])
        for name, value in changes.items():
            flag = f"--{name}"
            # Drop the flag with all its values, up to the next flag, then append it with the new value.
            if flag in words:
                start = words.index(flag)
                stop = next((n for n in range(start + 1, len(words)) if words[n].startswith("--")), len(words))
                del words[start:stop]
            words += [f"--no_{name}" if value is False else flag] if isinstance(value, bool) else [flag, str(value)]
        return shlex.join(["python", *words])


def evenly_spaced(n_total: int, n: int) -> list[int]:
    """`n` indices at even distances in `range(n_total)`, or all of them where there are fewer."""
    n = min(n, n_total)
    return [i * n_total // n for i in range(n)]
