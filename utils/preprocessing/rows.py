"""Rows of a table and their samples: a row with several captions is one sample of a stage that reads no captions, else
one for each; so are rows that name the same file."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dataset_loading.sources import Source
from dataset_loading.tables import captions_of
from utils.preprocessing.samples import Outcome, Raw, named_cell


def merge_rows(source: Source, caption: str, others: Sequence[str]) -> Source:
    """The source with one row for each file (or part of it), in the order of their first rows.

    Args:
        caption: column of the captions; a merged row has a list of the distinct ones. `""`: there is none.
        others: further columns in which rows of the same file must agree to be one, such as `offset`.
    Returns: the source itself where no file has two rows. Rows of hub data sets, which are known by their numbers, and
        rows without a file stay as they are.
    Raises: ValueError: a caption is an object; names the data set, the file and the column.
    """
    if not isinstance(source.rows, list):  # Reading the rows of a hub data set reads its files.
        return source
    rows: list[dict[str, Any]] = []
    places: dict[tuple[str, ...], int] = {}
    merged: dict[int, dict[str, None]] = {}  # Captions of each place with several rows.
    for row in source.rows:
        media = row[source.media] or {}
        name = media.get("row") or media.get("path")
        place = places.setdefault((name, *(repr(row.get(column)) for column in others)), len(rows)) if name else -1
        if place in (-1, len(rows)):
            rows.append(row)
        elif caption:
            with named_cell(source.identity, str(name), caption):
                if place not in merged:
                    merged[place] = dict.fromkeys(captions_of(rows[place].get(caption)))
                merged[place].update(dict.fromkeys(captions_of(row.get(caption))))
    for place, captions in merged.items():
        rows[place] = {**rows[place], caption: list(filter(str.strip, captions))}
    return dataclasses.replace(source, rows=rows) if len(rows) < len(source.rows) else source


def first_rows(examples: Iterable[tuple[str, Raw]], limit: int) -> Iterator[tuple[str, Raw]]:
    """The (name, raw sample) of the first rows; all for -1."""
    n_rows = 0
    for name, raw in examples:
        n_rows += not raw.place
        if 0 <= limit < n_rows:
            return
        yield name, raw


def once_per_row(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Outcomes, where a row is broken once, and skipped once for each reason, however many samples it has."""
    reported = set()
    for outcome in outcomes:
        if outcome.broken or outcome.skipped:
            problem = outcome.row, "" if outcome.broken else outcome.skipped
            if problem in reported:
                continue
            reported.add(problem)
        yield outcome
