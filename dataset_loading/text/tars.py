"""Texts in tar files of WebDataset's layout, on disk or at an address: a document per sample."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_loading.left_out import LeftOut
from dataset_loading.sources import choose_split
from dataset_loading.streams.tars import DAMAGED, Tar, TarStream, is_tars, tars_by_split
from dataset_loading.tables import TABLE_SUFFIXES, decode_text
from dataset_loading.text.documents import TEXT_SUFFIXES, Document, TextSource, document
from dataset_loading.walking import walk

MEMBER = "document"  # The column of a sample's text file.


def is_text_tars(name: str) -> bool:
    """Whether a name means tar files: an address, a file, a pattern, or a folder without text files and tables."""
    path, known = Path(name).expanduser(), (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    return is_tars(name, known, "text") and not (path.is_dir() and next(walk(path, known), None))


def open_text_tars(name: str, split: str, *, text_column: str = "text", is_held_out: bool = False) -> TextSource:
    """The documents of tars: of each sample its text file, or else a field of its .json.

    Args: as of `dataset_loading.text.sources.open_text`. Tars named like splits (`train-000.tar`) are splits.
    Raises: FileNotFoundError, ValueError, OSError: no tars, a split that does not exist, or what the server refuses.
    """
    splits = tars_by_split(name)
    split = "train" if is_held_out and list(splits) == ["train"] else split
    tars, left_out = splits[choose_split(name, split, list(splits))], LeftOut()

    def read() -> Iterator[Document]:
        left_out.clear()
        for tar in tars:
            yield from read_tar(tar, text_column, left_out)

    content = TarStream(tars, MEMBER, TEXT_SUFFIXES).content
    return TextSource(f"{name}:{split}@{content}", "", read, list(splits), n_files=len(tars), left_out=left_out)


def read_tar(tar: Tar, text_column: str, left_out: LeftOut) -> Iterator[Document]:
    """The documents of one tar, and where it is damaged a problem at its end; `left_out` counts other members."""
    stream = TarStream([tar], MEMBER, TEXT_SUFFIXES)
    stream.max_broken_fraction = 1.0  # Documents with a problem are counted by the reader.
    for row in stream.read(None):
        yield document_of(row, text_column)
    for reason in [reason for reason in stream.left_out.counts if reason.startswith(DAMAGED)]:
        del stream.left_out.counts[reason]
        yield Document(tar.name, "", reason, is_file=True)
    left_out.merge(stream.left_out)


def document_of(row: dict[str, Any], text_column: str) -> Document:
    """The document of a sample: its text file goes before a field of its .json."""
    member = row[MEMBER]
    key = member["path"] or member["row"]
    if problem := member.get("problem"):
        return Document(key, "", problem)
    if member["bytes"] is not None:
        try:
            return document(key, decode_text(member["bytes"]))
        except ValueError as error:
            return Document(key, "", str(error))
    if text_column not in row:
        return Document(key, "", f"no text file and no {text_column!r}; there is: {', '.join(set(row) - {MEMBER})}")
    return document(key, row[text_column])
