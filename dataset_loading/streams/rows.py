"""Rows that are read in their order, one by one, and never listed."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

POINT_ROWS = 64  # Between two places that an interrupted reading goes on from.


class RowStream:
    """Rows of a data set that is not listed. A subclass defines `read` and `state`.

    Attributes:
        content: identifies the files that are read; rows after a place are the same while it is.
        limit: number of rows to read, from the first one; -1: all.
        n_rows: rows that were read, those before the place of the start included.
        first_number: rows from here on have at least this number in their order.
        has_shares: whether shards are divided by files, and read their own alone; else they read all rows, and take
            every n-th one.
        share: index (from 1) and number of the shards, where they are divided by files.
        is_own: whether the row that was read last is of this shard.
        n_own: rows of this shard that were read.
        n_files: that are read, where shards are divided by files.
        base: files of sources before this one.
        listing: of the files, on any machine.
        max_broken_fraction: of the files that may be damaged.
        at_point: called where reading may go on another time, every `POINT_ROWS` rows and at the end.
    """

    content = ""
    listing = ""
    first_number = 0
    has_shares = False
    share = (1, 1)
    is_own = True
    n_files = 0
    base = 0
    max_broken_fraction = 0.0

    def __init__(self) -> None:
        self.limit, self.n_rows, self.n_own = -1, 0, 0
        self.start: dict[str, Any] | None = None
        self.at_point: Callable[[], None] = lambda: None

    def read(self, start: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """The rows, from the place that `state` told, or the first one. Raises: OSError: they cannot be read."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The place after the row that was read last, as JSON values."""
        raise NotImplementedError

    def go_to(self, start: dict[str, Any] | None, n_rows: int) -> None:
        """Have the next reading begin after `n_rows` rows."""
        self.start, self.n_rows = start, n_rows

    def beginning(self, n_rows: int) -> Self:
        """The first rows of the stream, at most `n_rows`, for another reader."""
        stream = copy.copy(self)
        stream.go_to(None, 0)
        stream.limit = n_rows if self.limit < 0 else min(n_rows, self.limit)
        stream.at_point = lambda: None
        return stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.n_rows == self.limit:  # Not even the next row is fetched.
            return
        for row in self.read(self.start):
            is_own = self.is_own
            yield row
            self.n_rows += 1
            self.n_own += is_own
            # Whoever reads has done with the row.
            if self.n_rows == self.limit:
                break
            if self.n_rows % POINT_ROWS == 0:
                self.at_point()
        self.at_point()
