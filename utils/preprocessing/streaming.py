"""Rows of streams that earlier runs have read: noted beside the samples, so that reading goes on after them.

    <folder>/.rows.jsonl   a header that says of which files and flags the notes are; then lines
        ["row", split, name, place, number]     a raw sample in the order of its source, as it was planned
        ["done", split, index, {...}]           its outcome, with the keys of its samples
        ["point", split, {...}]                 a place to go on from, and the number of rows before it

A kill costs the reading of a few rows. Samples themselves are in the journal and the manifest, as always.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from dataset_loading.cache_writer import crc_of, journal_line
from dataset_loading.sources import Source
from utils.preprocessing.samples import Naming, Outcome
from utils.preprocessing.shards import Shard

logger = logging.getLogger(__name__)

ROWS = ".rows.jsonl"
# Flags that change nothing of what was noted.
FREE_FLAGS = ("limit", "output_dir", "num_workers", "max_broken_fraction", "keep_duplicates", "batch_size")
NOTED_FIELDS = ("split", "name", "has_text", "broken", "skipped")


@dataclasses.dataclass
class Note:
    """A raw sample that an earlier run has read, in the order of its source.

    Attributes:
        name: of the raw sample.
        place: among the samples of its row.
        first_number: the number that it has at least.
        outcome: None where it is of another shard.
    """

    name: str
    place: int
    first_number: int
    outcome: Outcome | None = None

    def number_after(self, number: int) -> int:
        """Its number in this run, by that of the raw sample before it."""
        return max(number + 1, self.first_number)


class RowLog:
    """The notes about the rows of a folder's streams; a context manager.

    Args:
        file: of the notes; None: there is no stream.
        head: of this run; notes of another one are not used.
    """

    def __init__(self, file: Path | None = None, head: dict[str, Any] | None = None):
        self.file, self.head, self.opened = file, head, None
        self.lines: dict[str, list[list[Any]]] = {}  # Of earlier runs, by split of the source.
        self.n_samples: dict[str, int] = {}
        self.pending: dict[int, tuple[str, int]] = {}  # By number: split of the source, and place in it.

    @classmethod
    def open(cls, folder: Path, header: dict[str, Any], sources: dict[str, Source], *, shard: Shard) -> Self:
        """The notes of a folder, those of earlier runs included if they are of the same files and flags."""
        file = folder / ROWS
        streams = {split: source for split, source in sources.items() if source.is_stream}
        if not streams:
            file.unlink(missing_ok=True)  # Samples are about to change.
            return cls()
        limit, flags = header["arguments"]["limit"], header["arguments"]
        head = {
            "fingerprint": header["fingerprint"],
            "content": {split: source.rows.content for split, source in streams.items()},
            "flags": {name: value for name, value in flags.items() if name not in FREE_FLAGS},
            "shard": [str(shard), 0 if shard.is_whole else limit],
        }
        log = cls(file, json.loads(json.dumps(head)))
        lines = read_lines(file) if file.is_file() else iter(())
        if next(lines, None) == log.head:
            for line in lines:
                log.lines.setdefault(line[1], []).append(line)
        n_files = 0
        for split, source in streams.items():
            source.rows.limit, source.rows.max_broken_fraction = limit, flags["max_broken_fraction"]
            source.rows.base, n_files = n_files, n_files + source.rows.n_files
            if source.rows.has_shares and not shard.is_whole:
                source.rows.share = shard.index, shard.count
                shard.add_files(source.rows.listing)
            source.rows.at_point = lambda split=split, source=source: log.note_point(split, source, shard)
        return log

    def __enter__(self) -> Self:
        if self.file:
            self.opened = open(self.file, "a" if self.lines else "w", encoding="utf-8")
            self.write(self.head) if not self.lines else self.opened.write("\n")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.opened:
            self.opened.close()

    def write(self, value: Any) -> None:
        """Append a line."""
        if self.opened:
            self.opened.write(journal_line(value))
            self.opened.flush()

    def add(self, split: str, number: int, name: str, *, place: int, is_taken: bool) -> None:
        """Note a raw sample of a source, whose outcome follows if this shard takes it."""
        if not self.file:
            return
        index = self.n_samples.get(split, 0)
        self.n_samples[split] = index + 1
        if is_taken:
            self.pending[number] = split, index
        self.write(["row", split, index, {"name": name, "place": place, "first": number, "is_taken": is_taken}])

    def note_point(self, split: str, source: Source, shard: Shard) -> None:
        """Note a place to go on from."""
        stream = source.rows
        state = {"n_rows": stream.n_rows, "state": stream.state(), "listing": shard.listing.hex()}
        self.write(["point", split, self.n_samples.get(split, 0), state])

    def noted(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """The outcomes as they come, which are noted."""
        for outcome in outcomes:
            yield outcome
            if place := self.pending.pop(outcome.number, None):
                fields = {name: getattr(outcome, name) for name in NOTED_FIELDS}
                self.write(["done", *place, {**fields, "keys": [entry["key"] for entry in outcome.entries]}])

    def replay(
        self,
        split: str,
        source: Source,
        naming: Naming,
        *,
        shard: Shard,
        find: Callable[[str, str], dict[str, Any] | None],
    ) -> list[Note]:
        """The raw samples of a source that need not be read again; the source goes on after them.

        Args:
            split: of the source.
            naming: of its raw samples; it is brought to the same place.
            find: the entry of a split and key, None where its file is not what was written.
        """
        if not source.is_stream:
            return []
        lines = self.lines.pop(split, [])
        rows = {line[2]: line[3] for line in lines if line[0] == "row"}
        done = {line[2]: line[3] for line in lines if line[0] == "done"}
        points = [(line[2], line[3]) for line in lines if line[0] == "point"]
        limit = source.rows.limit
        points = [(n, point) for n, point in points if limit < 0 or point["n_rows"] <= limit]
        last = max((n for n, _ in points), default=0)
        # All from the first one on whose splits and samples are those of now.
        trial, notes = copy.deepcopy(naming), []
        for index in range(last):
            note = note_of(rows.get(index), done.get(index), trial, find)
            if note is None:
                break
            notes.append(note)
        usable = [(n, point) for n, point in points if n <= len(notes)]
        n_samples, point = max(usable, key=lambda pair: (pair[0], pair[1]["n_rows"]), default=(0, None))
        if point is None:
            return []
        for note in notes[:n_samples]:
            naming.assign(note.name)
        source.rows.go_to(point["state"], point["n_rows"])
        shard.listing = bytes.fromhex(point["listing"])
        self.n_samples[split] = n_samples
        logger.info("%s: %d rows were read by earlier runs", source.identity, point["n_rows"])
        return notes[:n_samples]


def note_of(
    row: dict[str, Any] | None,
    done: dict[str, Any] | None,
    naming: Naming,
    find: Callable[[str, str], dict[str, Any] | None],
) -> Note | None:
    """A raw sample as noted; None where it was not finished, or now belongs to another split, or its files are gone.

    Args:
        row: that it was planned.
        done: its outcome.
        naming: of the raw samples up to this one.
        find: see `RowLog.replay`.
    """
    if row is None or (row["is_taken"] and done is None):
        return None
    split, keys = naming.assign(row["name"])
    note = Note(row["name"], row["place"], row["first"])
    if not row["is_taken"]:
        return note
    assert done is not None, "checked above"
    entries = [find(done["split"], key) for key in done["keys"]]
    is_whole = set(keys.values()) <= set(done["keys"]) or done["broken"] or done["skipped"]
    if done["split"] != split or None in entries or not is_whole:
        return None
    fields = {name: done[name] for name in NOTED_FIELDS}
    return dataclasses.replace(note, outcome=Outcome(0, entries=[entry for entry in entries if entry], **fields))


def read_lines(file: Path) -> Iterator[Any]:
    """The lines of the notes up to the first damaged one: a kill or a loss of power cuts their end."""
    with open(file, encoding="utf-8", errors="replace") as opened:
        for line in opened:
            text, _, crc = line.rstrip("\n").partition("\t")
            if text and crc != crc_of(text):
                return
            if text:
                yield json.loads(text)


def beginning(source: Source, n_rows: int) -> Source:
    """A source whose first rows are to be read beforehand; those of a stream are read anew for that, at most
    `n_rows`."""
    return dataclasses.replace(source, rows=source.rows.beginning(n_rows)) if source.is_stream else source
