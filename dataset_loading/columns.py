"""Entries of a manifest as columns: a memory-mapped Arrow file with a row per sample, of which only what is read is
loaded.

A column holds one field of all entries. Fields that not every entry has are null where they are missing, and the
row's number in `layouts` tells which fields it has, in their order, so that entries come back exactly. Values
of several types are stored as JSON. Columns whose name begins with `@` say where the tensors are, see `packs.py`.
"""

import json
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataset_loading.files import Record, replacing

ROWS = 1 << 16  # Rows of a record batch.
LAYOUT = "@layout"
METADATA = b"entries"
ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
NUMPY_TYPES = {pa.int64(): np.int64, pa.int32(): np.int32, pa.uint32(): np.uint32, pa.float64(): np.float64}
KINDS = {pa.string(): str, pa.int64(): int, pa.float64(): float, pa.bool_(): bool}


class EntryColumns(Sequence):
    """Entries of one split, read row by row; `entries[i]` is a dict as in a manifest that lists them.

    Args:
        file: that `write_columns` wrote.
        remedy: what to do about a damaged file, for messages.
    Raises: ValueError: the file is damaged.
    """

    def __init__(self, file: Path, remedy: str):
        self.file, self.remedy = file, remedy
        self.open()

    def open(self) -> None:
        """Map the file."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.file)))
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            metadata = json.loads(reader.schema.metadata[METADATA])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} is damaged ({type(error).__name__}: {error}); {self.remedy}") from error
        self.schema = reader.schema
        self.layouts: list[list[str]] = metadata["layouts"]
        self.as_json: dict[str, list[str]] = metadata["json"]  # with the names of the types that occur
        self.places = {name: place for place, name in enumerate(self.schema.names)}
        self.length = sum(batch.num_rows for batch in self.batches)
        self.views: dict[str, list[np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to map the file itself."""
        return {"file": self.file, "remedy": self.remedy}

    def __setstate__(self, state: dict[str, Any]):
        self.__init__(**state)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(self.length)[index]]
        batch, row = divmod(range(self.length)[index], ROWS)
        return self.row(self.batches[batch], row)

    def __iter__(self) -> Iterator[Record]:
        for batch in self.batches:
            for row in range(batch.num_rows):
                yield self.row(batch, row)

    def row(self, batch: pa.RecordBatch, row: int) -> Record:
        """The entry in a row of a batch."""
        names = self.layouts[batch.column(self.places[LAYOUT])[row].as_py()]
        values = {name: self.parse(name, batch.column(self.places[name])[row].as_py()) for name in names}
        return Record(values, self.file, self.remedy)

    def parse(self, name: str, value: Any) -> Any:
        """The value of a field from that of its column."""
        return json.loads(value) if name in self.as_json else value

    def value(self, index: int, name: str, default: Any = None) -> Any:
        """One field of one entry, without the others; the default where the entry has none."""
        batch, row = divmod(index, ROWS)
        if name not in self.places:
            return default
        value = self.batches[batch].column(self.places[name])[row].as_py()
        return default if value is None else self.parse(name, value)

    def number(self, name: str, index: int) -> int:
        """The number in a column without nulls."""
        if name not in self.views:
            self.views[name] = [view_of(batch.column(self.places[name])) for batch in self.batches]
        batch, row = divmod(index, ROWS)
        return int(self.views[name][batch][row])

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, one for each entry."""
        return np.concatenate([view_of(batch.column(self.places[name])) for batch in self.batches])

    def check_types(self, types: Mapping[str, Any], place: str) -> None:
        """As `Record.expect_types` for every entry, at the cost of looking at the columns' types.

        Raises: ValueError: a field is missing in some entry, or of another type.
        """
        for name, kinds in types.items():
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            occurring = self.as_json.get(name, [])
            if name in self.places and name not in self.as_json:
                occurring = [KINDS[self.schema.field(name).type].__name__]
            n_null = sum(batch.column(self.places[name]).null_count for batch in self.batches) if occurring else 0
            if n_null or not occurring or not set(occurring) <= {kind.__name__ for kind in kinds}:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(
                    f"{self.file} is damaged ({place}: {name} must be {names} in every entry); {self.remedy}"
                )


class EntryRow(Mapping):
    """An entry of which only the fields that are asked for are read."""

    def __init__(self, entries: EntryColumns, index: int):
        self.entries, self.index = entries, index

    def __getitem__(self, name: str) -> Any:
        value = self.entries.value(self.index, name)
        return self.entries[self.index][name] if value is None else value  # None, or the error of a missing one.

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries[self.index])

    def __len__(self) -> int:
        return len(self.entries[self.index])


def view_of(column: pa.Array) -> np.ndarray:
    """A column of numbers without nulls as an array over the same memory; `to_numpy` would import pandas."""
    dtype = NUMPY_TYPES[column.type]
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * np.dtype(dtype).itemsize)


def write_columns(
    file: Path, entries: Sequence[Mapping[str, Any]], numbers: Mapping[str, np.ndarray], *, distinct: Collection[str]
) -> dict[str, Any]:
    """Write the entries of a split as columns; they are gone through twice, and never all in memory.

    Args:
        numbers: further columns, `@name` -> numbers (n,).
        distinct: fields whose different values are returned, where entries have them.
    Returns: `distinct`: sorted values by field; `empty_captions`: number of entries without a caption.
    """
    # Fields, their types, and which entry has which.
    layouts: dict[tuple[str, ...], int] = {}
    kinds: dict[str, type | None] = {}
    types: dict[str, set[str]] = {}
    values: dict[str, set[Any]] = {}
    numbers_of_layouts, n_empty = array("H"), 0
    for entry in entries:
        numbers_of_layouts.append(layouts.setdefault(tuple(entry), len(layouts)))
        for name, value in entry.items():
            kind = kind_of(value)
            types.setdefault(name, set()).add(type(value).__name__)
            kinds[name] = kind if kinds.setdefault(name, kind) is kind else None
        for name in distinct:
            if name in entry:
                values.setdefault(name, set()).add(entry[name])
        n_empty += not str(entry.get("caption", "")).strip()
    as_json = {name: sorted(types[name]) for name, kind in kinds.items() if kind is None}
    metadata = json.dumps({"layouts": [list(names) for names in layouts], "json": as_json})
    fields = [(name, pa.string() if kind is None else ARROW_TYPES[kind]) for name, kind in kinds.items()]
    columns = {LAYOUT: np.frombuffer(numbers_of_layouts, np.uint16), **numbers}
    fields += [(name, pa.from_numpy_dtype(column.dtype)) for name, column in columns.items()]
    schema = pa.schema(fields, metadata={METADATA: metadata.encode()})

    # Batch by batch.
    with (
        replacing(file, sync=True) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for start in range(0, len(entries), ROWS):
            rows = entries[start : start + ROWS]
            arrays = [column_of(rows, name, kind) for name, kind in kinds.items()]
            arrays += [pa.array(column[start : start + ROWS]) for column in columns.values()]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return {"distinct": {name: sorted(values[name]) for name in values}, "empty_captions": n_empty}


def kind_of(value: Any) -> type | None:
    """The type of a value that a column can hold as it is; None: it is stored as JSON."""
    kind = type(value)
    if kind is str:
        # A lone surrogate, of a file name that is no UTF-8.
        return str if value.isascii() or value.encode(errors="replace").decode() == value else None
    if kind is int:
        return int if -(2**63) <= value < 2**63 else None
    return kind if kind in (float, bool) else None


def column_of(rows: Sequence[Mapping[str, Any]], name: str, kind: type | None) -> pa.Array:
    """One field of some entries as a column; null where an entry has none."""
    if kind is None:
        return pa.array([json.dumps(row[name]) if name in row else None for row in rows], pa.string())
    return pa.array([row.get(name) for row in rows], ARROW_TYPES[kind])
