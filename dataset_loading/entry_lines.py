"""Entries of a large manifest where they are: a line of its text each, parsed when it is asked for.

As dicts a million entries fill 1.4 GB in every process; their lines are mapped from the manifest, which all processes
share, and 8 bytes a sample say where they begin.
"""

import itertools
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_loading.files import Record, read_record, wrong_digest

MIN_BYTES = 32 << 20  # Smaller manifests are read at once, which makes single entries faster.
CHUNK = 4096  # Lines that are parsed at once.
START = b',\n"entries": {'  # A line break is nowhere else but between the manifest's fields and its entries.
SPLIT = re.compile(rb'"(\w+)": \[\n')


class EntryLines(Sequence):
    """Entries of one split; `entries[i]` is parsed anew each time.

    Args:
        file: the manifest.
        remedy: what to do if it is damaged, for messages.
        content: of the manifest.
        begins: where each line begins, and after the last one where a next one would.
    """

    def __init__(self, file: Path, remedy: str, content: mmap.mmap | bytes, begins: np.ndarray):
        self.file, self.remedy, self.content, self.begins = file, remedy, content, begins
        self.decoder = json.JSONDecoder(object_hook=lambda values: Record(values, file, remedy))

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]
        return self.parse(int(self.begins[index]), int(self.begins[index + 1]))

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), CHUNK):
            yield from itertools.starmap(
                self.parse, itertools.pairwise(self.begins[first : first + CHUNK + 1].tolist())
            )

    def rows(self) -> Iterator[Any]:
        """All entries as plain dicts, many lines at once: a third of the time."""
        for first in range(0, len(self), CHUNK):
            begin, end = int(self.begins[first]), int(self.begins[min(first + CHUNK, len(self))])
            try:
                yield from json.loads(b"[" + self.content[begin:end].rstrip(b",\n") + b"]")
            except ValueError as error:
                raise ValueError(f"{self.file} is damaged ({error!r}); {self.remedy}") from error

    def parse(self, begin: int, end: int) -> Any:
        """The entry in a line. Raises: ValueError: it is damaged."""
        try:
            return self.decoder.decode(self.content[begin:end].rstrip(b",\n").decode())
        except ValueError as error:
            raise ValueError(f"{self.file} is damaged ({error!r}); {self.remedy}") from error

    def __getstate__(self) -> dict[str, Any]:
        """The lines themselves: the manifest may be another one by the time another process reads it."""
        start = int(self.begins[0])
        lines = self.content[start : int(self.begins[-1])]
        return {"file": self.file, "remedy": self.remedy, "content": lines, "begins": self.begins - start}

    def __setstate__(self, state: dict[str, Any]):
        self.__init__(**state)


def rows_of(entries: Iterable[Any]) -> Iterable[Any]:
    """Entries to be gone through once, as plain dicts where that is faster."""
    return entries.rows() if isinstance(entries, EntryLines) else entries


def read_lines(file: Path, remedy: str) -> Record:
    """As `read_record`, but a large manifest keeps the lines of its entries as `EntryLines`.

    Raises: FileNotFoundError, ValueError: as `read_record`.
    """
    if not file.is_file() or file.stat().st_size < MIN_BYTES:
        return read_record(file, remedy)
    with open(file, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    splits, begin, place = {}, content.find(START), content.find(START) + len(START)
    # Splits one after the other, as `write_manifest` writes them; others are read at once.
    while begin >= 0 and (match := SPLIT.match(content, place)):
        end = content.find(b"\n]", match.end() - 1)
        if end < 0:
            break
        # The line breaks after each entry; a split without any has one.
        text = np.frombuffer(content, np.uint8, max(end + 1 - match.end(), 0), match.end())
        breaks = np.flatnonzero(text == ord("\n")) if end > match.end() else []
        begins = np.concatenate([[0], np.asarray(breaks) + 1]).astype(np.int64)
        splits[match[1].decode()] = EntryLines(file, remedy, content, begins + match.end())
        place = end + len(b"\n]")
        if content[place : place + 2] == b",\n":
            place += 2
            continue
        if content[place : place + 1] != b"}" or wrong_digest(content[:]):
            break
        head = content[:begin] + START + b"}" + content[place + 1 :]
        manifest = json.loads(head, object_hook=lambda values: Record(values, file, remedy))
        manifest["entries"] = Record(splits, file, remedy)
        return manifest
    return read_record(file, remedy)
