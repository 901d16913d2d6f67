"""Opening a data set in whatever form it comes: files, tables, hub data sets, tars."""

from collections.abc import Collection
from typing import Any

from dataset_loading.sources import Source, open_source
from dataset_loading.streams.tars import is_tars, open_tars


def open_any(name: str, split: str, kind: str, *, suffixes: Collection[str], **options: Any) -> Source:
    """As `open_source`, but tar files and addresses of them are read, too; they are always a stream.

    Raises: ValueError, OSError: as `open_source` and `open_tars`, or an option has no effect on tars.
    """
    if not is_tars(name, suffixes, kind):
        return open_source(name, split, kind, suffixes=suffixes, **options)
    for option, flag in (("media", "--media_column"), ("config", "--dataset_config")):
        if options.get(option):
            raise ValueError(f"{flag}={options[option]} has no effect on tar files, {name}; leave it out")
    return open_tars(name, split, kind, suffixes=suffixes)
