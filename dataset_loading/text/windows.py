r"""Tokenised text on disk, and windows of it.  L sequence, V vocabulary.

    prepare_text("data/books", "cached_datasets/books", "bpe", vocab_size=4096)
    ds = TextDataset("cached_datasets/books", "train", 256)

    <folder>/train.bin              all documents one after the other, uint16, or uint32 where V > 65536
    <folder>/train.offsets.npy      where each document begins, and the end of the last, int64
    <folder>/train.bytes.bin        UTF-8 bytes per token, uint16; only of tokenizers that were not built here
    <folder>/validation.*           the same
    <folder>/tokenizer/             as transformers' AutoTokenizer reads it
    <folder>/manifest.json          settings, fingerprint, totals, broken documents

Every document is its first token (<bos>), its text, its last token (<eos>). The first token is never a target; the
last one is, and stands for no byte, so that bits per byte are honest: the nats of all targets over the UTF-8 bytes of
the text. The folder appears as a whole, by renaming, so there is no half-written one.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dataset_loading.files import crc_of_file
from dataset_loading.text.survey import SPLITS
from dataset_loading.text.tokenizers import byte_lengths, load_tokenizer
from dataset_loading.text.writer import prepare_text, read_text_manifest

CHECKED_BYTES = 1 << 30  # Larger files are not read as a whole when a dataset is opened.

__all__ = ["TextDataset", "bits_per_byte", "prepare_text"]


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Cross-entropy summed over all targets, in nats, as bits per UTF-8 byte that the targets stand for."""
    return nats / (n_bytes * math.log(2))


class TextDataset(Dataset):
    """Windows of L tokens that overlap by one token, so that each token but a document's first is a target once.

    Window i has the tokens from i (L - 1) on; its targets are all but its first, where input and target lie in the
    same document. A document that continues in the next window has one token of context there. The last window is
    padded.

    Args:
        folder: what `prepare_text` returns.
        split: `"train"` or `"validation"`.
        sequence_length: L, at least 2.
    Attributes:
        manifest: the manifest as a dict.
        fingerprint: identifies source, settings and tokenizer.
        vocab_size: V.
        entries: a dict with `key` per window.
        n_documents, n_tokens: of the split.
        n_targets: of all windows, n_tokens - n_documents.
        n_bytes: UTF-8 bytes of all targets, which is those of all documents.
    Raises:
        FileNotFoundError: the folder is missing or none of prepared text, or the split has no documents.
        ValueError: sequence_length is too small, or a file has another size or CRC than the manifest says. Files
            above 1 GiB, and those of earlier versions, are compared by their sizes alone.
    """

    def __init__(self, folder: str | Path, split: str, sequence_length: int):
        if sequence_length < 2:
            raise ValueError(f"sequence_length={sequence_length} must be at least 2, an input and its target")
        self.folder, self.split, self.sequence_length = Path(folder), split, sequence_length
        self.manifest = read_text_manifest(self.folder)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        totals = self.manifest["totals"]
        if split not in SPLITS or not totals[split]["documents"]:
            counts = {name: total["documents"] for name, total in totals.items()}
            raise FileNotFoundError(
                f"{self.folder} has no documents in split {split!r} (it has {counts}); a validation split comes from "
                "validation_fraction or validation_source, in another folder"
            )
        self.n_documents, self.n_tokens, self.n_bytes = (totals[split][n] for n in ("documents", "tokens", "bytes"))
        self.n_targets = self.n_tokens - self.n_documents
        # A file of another size was cut off, or was not copied to its end.
        for name, size in totals[split]["files"].items():
            size_on_disk = (self.folder / name).stat().st_size if (self.folder / name).exists() else 0
            if size_on_disk != size:
                raise ValueError(
                    f"{self.folder / name} has {size_on_disk} bytes, the manifest says {size}; delete "
                    f"{self.folder} and prepare it again"
                )
        self.check_crcs("", totals[split].get("crc32", {}))
        # Like the entries of other datasets, for code that names samples by their keys.
        self.entries = WindowEntries(split, len(self))

    def check_crcs(self, subfolder: str, crcs: dict[str, str]) -> None:
        """Raises: ValueError: a file is missing or has another CRC than was written, which are given by name."""
        for file, written in {self.folder / subfolder / name: crc for name, crc in crcs.items()}.items():
            if not file.is_file():
                raise ValueError(f"{file} is missing; delete {self.folder} and prepare it again")
            crc = crc_of_file(file) if file.stat().st_size <= CHECKED_BYTES else written
            if crc != written:
                problem = f"its CRC-32 is {crc}, {written} was written"
                raise ValueError(f"{file} is damaged ({problem}); delete {self.folder} and prepare it again")

    def __len__(self) -> int:
        # Windows overlap by one token: L of them, then L - 1 new ones each; the last may be short.
        return -(-(self.n_tokens - 1) // (self.sequence_length - 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window.

        Returns:
            `input_ids` (L,) int64; `segment_ids` (L,) int64, equal where two tokens lie in the same document: 0, 1,
            ... in the order of the documents, and -1, -2, ... for padding, each position one of its own, so that
            padding is neither input nor target of anything; `n_bytes` () int64, UTF-8 bytes of the window's targets;
            `index` () int64.
        """
        # The tokens from `start` to `stop` of the split.
        index = range(len(self))[index]
        start = index * (self.sequence_length - 1)
        stop = min(start + self.sequence_length, self.n_tokens)
        # Ids, (L,), padded at the end.
        ids = np.full(self.sequence_length, self.padding, dtype=np.int64)
        ids[: stop - start] = self.tokens[start:stop]
        # Segments, (L,): the document of each token, counted from the window's first; padding positions -1, -2, ...
        documents = np.searchsorted(self.offsets, np.arange(start, stop), side="right")
        segments = -1 - np.arange(self.sequence_length)
        segments[: stop - start] = documents - documents[0]
        segments[stop - start :] += stop - start
        return {
            "input_ids": torch.from_numpy(ids),
            "segment_ids": torch.from_numpy(segments),
            # The first token is no target, so its bytes do not count.
            "n_bytes": torch.tensor(int(self.bytes_of(start + 1, stop).sum())),
            "index": torch.tensor(index),
        }

    def bytes_of(self, start: int, stop: int) -> np.ndarray:
        """UTF-8 bytes that each of the split's tokens from start to stop stands for; first and last tokens have 0."""
        if self.lengths is not None:
            return self.lengths[self.tokens[start:stop]]
        return self.widths[start:stop].astype(np.int64)

    def document(self, number: int) -> Tensor:
        """The ids of a whole document, (its length,) int64."""
        number = range(self.n_documents)[number]
        first, last = self.offsets[number : number + 2]
        return torch.from_numpy(self.tokens[first:last].astype(np.int64))

    def prompts(self, n: int, length: int) -> list[Tensor]:
        """The beginnings of documents, evenly spread over the split, to be continued by a model.

        Args:
            n: maximum of prompts; there are fewer where there are fewer documents.
            length: tokens of a prompt, the document's first token among them.
        Returns: tensors (length,) int64, shorter only where no n documents have so many before their last token.
        Raises: ValueError: n or length is below 1.
        """
        if n < 1 or length < 1:
            raise ValueError(f"n={n} and length={length} must be at least 1")
        sizes = np.diff(self.offsets) - 1  # Without the last token, which ends a document.
        candidates = np.flatnonzero(sizes >= length)
        if len(candidates) < n:  # The n longest documents, in their order.
            candidates = np.sort(np.argsort(-sizes, kind="stable")[:n])
        # At even distances, the first and the last one included.
        chosen = candidates[np.linspace(0, len(candidates) - 1, min(n, len(candidates))).astype(int)]
        return [self.document(int(number))[: min(length, int(sizes[number]))] for number in chosen]

    def expect(self, **settings: Any) -> Self:
        """Compare settings of the manifest, such as `vocab_size=4096`, with those that are needed.

        Returns: this dataset.
        Raises: ValueError: a setting differs; the message shows both values.
        """
        current = {**self.manifest["settings"], **self.manifest["tokenizer"]}
        for name, value in settings.items():
            assert name in current, f"{name} is not among {sorted(current)}"
            if current[name] != value:
                raise ValueError(
                    f"{self.folder} was made with {name}={current[name]!r}, but {name}={value!r} is needed; "
                    "prepare the text into another folder, or delete this one first"
                )
        return self

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the ids."""
        self.check_crcs("tokenizer", self.manifest["tokenizer"].get("crc32", {}))
        return load_tokenizer(str(self.folder / "tokenizer"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, on disk."""
        return np.memmap(self.folder / f"{self.split}.bin", dtype=self.manifest["tokenizer"]["dtype"], mode="r")

    @cached_property
    def widths(self) -> np.ndarray:
        """UTF-8 bytes per token of the split, on disk, where the tokenizer's ids do not tell."""
        return np.memmap(self.folder / f"{self.split}.bytes.bin", dtype=np.uint16, mode="r")

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """UTF-8 bytes per id, (V,) int64, where they tell."""
        return byte_lengths(self.tokenizer) if self.manifest["tokenizer"]["is_byte_level"] else None

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins and the last one ends, (n_documents + 1,) int64, on disk."""
        return np.load(self.folder / f"{self.split}.offsets.npy", mmap_mode="r")

    @property
    def padding(self) -> int:
        """The id that fills up the last window; without a padding token the one that ends a document."""
        names = self.manifest["tokenizer"]
        return names["end"] if names["padding"] is None else names["padding"]

    def __getstate__(self) -> dict[str, Any]:
        """Workers get no open files; each opens its own."""
        opened = ("tokens", "widths", "offsets", "tokenizer")
        return {name: value for name, value in self.__dict__.items() if name not in opened}


class WindowEntries(Sequence):
    """A dict with `key` per window, built on access, since there may be millions of windows."""

    def __init__(self, split: str, n_windows: int):
        self.split, self.n_windows = split, n_windows

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(self.n_windows)[index]]
        return {"key": f"{self.split}-{range(self.n_windows)[index]:08d}"}
