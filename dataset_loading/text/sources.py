"""Raw text: documents out of text files, tables with a text column, and hub datasets, read one by one.

    notes.txt, book.md, code.py, folder/**/*.txt     a document per file
    rows.jsonl, .json, .csv, .tsv, .parquet, folders a document per row, the column `text`
    notes.txt.gz, rows.jsonl.zst, ...                the same, compressed
    shards/, shard-{00..09}.tar, s3://bucket/shards  tars in the layout of WebDataset, a document per sample
    anything else                                    the name of a hub dataset, read by the `datasets` package
    python-topics                                    the help texts that Python carries with it (0.4 MB)

What cannot be read is handed out as a document with a problem, so that one broken file stops nothing. Text is never
changed: no stripping, no Unicode normalisation, line endings as they are; only a byte order mark is dropped.
"""

import dataclasses
import logging
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dataset_loading.files import fingerprint, fingerprint_of_bytes
from dataset_loading.left_out import LeftOut, survey_folder
from dataset_loading.sources import choose_split, describe_missing, find_splits, is_hub_name, read_licence
from dataset_loading.splits import SPLIT_NAMES, group_by_split
from dataset_loading.tables import (
    JSON_SUFFIXES,
    OPENERS,
    TABLE_SUFFIXES,
    DamagedFileError,
    damages,
    iterate_table,
    read_text,
    suffix_of,
    table_columns,
    with_compressions,
)
from dataset_loading.text.digests import Digests
from dataset_loading.text.documents import TEXT_SUFFIXES, Document, TextSource, document
from dataset_loading.text.tars import is_text_tars, open_text_tars
from dataset_loading.walking import regular_state, walk

logger = logging.getLogger(__name__)

EMBEDDED = "python-topics"
SEPARATORS = (b"\n\n", b"\n\r\n", b"\n", b" ")  # Where a long document is cut: the first that is found.


def open_text(
    name: str,
    *,
    text_column: str = "text",
    config: str = "",
    split: str = "train",
    is_held_out: bool = False,
    digests: Digests | None = None,
) -> TextSource:
    """Open a source of documents.

    Args:
        name: file, folder, hub name, or "python-topics".
        text_column: column with the text in tables and hub datasets.
        config: configuration of a hub dataset.
        split: split of a hub dataset, or of a folder that has `train/`, `validation/`, ...
        is_held_out: whether a folder whose names say no split is taken as a whole.
        digests: hashes of files that an earlier start remembered.
    Raises:
        FileNotFoundError: there is nothing, or nothing that is known as text; the message lists the endings.
        ValueError: the split or the column does not exist; the message lists what exists.
    """
    if name == EMBEDDED:
        return open_topics()
    if is_text_tars(name):
        return open_text_tars(name, split, text_column=text_column, is_held_out=is_held_out)
    # A name that looks like a path is one; any other may be a hub name.
    check_path(name)
    path = Path(name).expanduser()
    known = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    if not path.exists():
        return open_hub(name, split, text_column=text_column, config=config)
    regular_state(path)
    splits = split_files(path) if path.is_dir() else {}
    files = [path] if path.is_file() else []
    if splits:
        split = "train" if is_held_out and list(splits) == ["train"] else split
        files = splits[choose_split(str(path), split, list(splits))]
    if not files or (path.is_file() and suffix_of(path) not in known):
        endings = f"{' '.join(known)}, also with {' '.join(OPENERS)}"
        raise FileNotFoundError(f"{name} holds no text; known endings: {endings}")
    # Columns are checked now, so that a wrong one is an error at the start; texts are read when they are needed.
    root = path if path.is_dir() else path.parent
    for file in files:
        check_column(file, text_column)
    digest = digest_files(root, files, digests or Digests())
    if len(splits) > 1:
        logger.info("%s: splits by name: %s", path, {name: len(own) for name, own in splits.items()})
    others = [file for name, own in splits.items() if name != split for file in own]
    left_out = LeftOut()
    if path.is_dir():
        left_out = survey_folder(path, used=[*files, *others], suffixes=(), readable=with_compressions(known))
    identity, licence = f"{path.resolve().name}@{digest}", read_licence(path)
    read = partial(read_files, root, files, text_column)
    return TextSource(identity, licence, read, list(splits), n_files=len(files), left_out=left_out)


def check_path(name: str) -> None:
    """Raises: FileNotFoundError: a name that looks like a path, and not like that of a hub dataset, does not exist."""
    path = Path(name).expanduser()
    if name == EMBEDDED or is_text_tars(name):
        return  # Patterns and addresses are looked for when they are opened.
    if (not is_hub_name(name) or suffix_of(path) in (*TEXT_SUFFIXES, *TABLE_SUFFIXES)) and not path.exists():
        raise FileNotFoundError(describe_missing(name))


def find_validation_split(source: TextSource, split: str) -> str:
    """The source's split for validation (or valid, val, dev), `""` where there is none or training reads it."""
    trained = {part.strip().partition("[")[0] for part in split.split("+")}  # Such as train[:10%]+test.
    names = [name for name in source.splits if SPLIT_NAMES.get(name.lower()) == "validation"]
    return "" if not names or trained & set(names) else names[0]


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split, all of them as `train` where no name says a split; licences at its top are left
    out. Splits without files are not there."""
    find_splits(folder, (*TEXT_SUFFIXES, *TABLE_SUFFIXES))  # Raises where folders of splits and others are mixed.
    files = [
        file
        for file in walk(folder, {*TEXT_SUFFIXES, *TABLE_SUFFIXES, *OPENERS})
        if suffix_of(file) in (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
        and (file.parent != folder or not file.name.upper().startswith(("LICENSE", "LICENCE")))
    ]
    groups = group_by_split([file.relative_to(folder).as_posix() for file in files], are_media=False)
    splits = {split: [files[index] for index in indices] for split, indices in groups.items()} or {"train": files}
    splits = {split: tables_or_texts(folder, files) for split, files in splits.items()}
    return {split: files for split, files in splits.items() if files}


def tables_or_texts(root: Path, files: list[Path]) -> list[Path]:
    """Tables hold the texts, if there are any; text files next to them are notes about the data, .json files next to
    text files settings."""
    tables = [file for file in files if suffix_of(file) in TABLE_SUFFIXES]
    texts = [file for file in files if suffix_of(file) in TEXT_SUFFIXES]
    if texts:
        tables = [file for file in tables if suffix_of(file) != ".json"]
    if tables and texts:
        logger.warning(
            "%s has tables and %d text files; the text files are left out: %s", root, len(texts), texts[0].name
        )
    return tables or texts


def digest_files(root: Path, files: list[Path], digests: Digests) -> str:
    """A hash of the names and contents of files, 16 hexadecimal digits."""
    lines = (f"{name_of(root, file)}\n{content}\n" for file, content in zip(files, digests.of(files)))
    return fingerprint_of_bytes(line.encode() for line in lines)


def name_of(root: Path, file: Path) -> str:
    """The path below the root, with names that are not UTF-8 made legible."""
    return file.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()


def check_column(file: Path, column: str) -> None:
    """Raises: ValueError: a .csv, .tsv or .parquet file lacks the column. Rows of JSON are checked one by one."""
    if suffix_of(file) not in TABLE_SUFFIXES or suffix_of(file) in JSON_SUFFIXES:
        return
    try:
        columns = table_columns(file, [column])
    except (OSError, EOFError, *damages()) as error:
        logger.warning("%s is damaged: %s", file, error)  # It is counted when it is read.
        return
    if column not in columns:
        raise ValueError(f"text_column={column!r} is no column of {file}; there is: {', '.join(columns) or 'none'}")


def read_files(root: Path, files: list[Path], column: str) -> Iterator[Document]:
    """The documents of text files and tables."""
    for file in files:
        name = name_of(root, file)
        if suffix_of(file) in TABLE_SUFFIXES:
            yield from read_rows(name, file, column)
        else:
            yield read_text_file(name, file)


def read_text_file(name: str, file: Path) -> Document:
    """One file as one document."""
    try:
        return document(name, read_text(file))
    except (OSError, EOFError, ValueError, *damages()) as error:
        return Document(name, "", str(error) or type(error).__name__)


def read_rows(name: str, file: Path, column: str) -> Iterator[Document]:
    """The documents of a table, one per row, named by their number."""
    number = 0
    try:
        for number, (_, row) in enumerate(iterate_table(file, [column]), start=1):
            if isinstance(row, dict) and column not in row:
                row = {column: ValueError(f"no {column!r}; there is: {', '.join(row)}")}
            value = row[column] if isinstance(row, dict) else row
            is_file = isinstance(row, DamagedFileError)
            yield dataclasses.replace(document(f"{name}:{number}", value), is_file=is_file)
    except OSError as error:
        yield Document(f"{name}:{number + 1}", "", str(error), is_file=True)


def open_hub(name: str, split: str, *, text_column: str = "text", config: str = "") -> TextSource:
    """One split of a hub dataset; it stays on disk and is not loaded into memory."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it is a script.
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{name!r} is no local file or folder, and the datasets package cannot load its split {split!r}: {reason}"
        ) from error
    fingerprint = getattr(rows, "_fingerprint", "")  # Of name, configuration, split and the revision on the hub.
    identity = f"{name}{f'/{config}' if config else ''}:{split}{fingerprint and f'@{fingerprint}'}"
    return from_rows(rows, identity, text_column)


def from_rows(rows: Any, identity: str, text_column: str) -> TextSource:
    """The documents of a `datasets.Dataset`. Raises: ValueError: it lacks the column; the message lists its own."""
    if text_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"text_column={text_column!r} is no column of {identity}; there is: {columns}")
    # Only this column is read from the disk.
    rows = rows.select_columns([text_column])

    def read() -> Iterator[Document]:
        for number, row in enumerate(rows):
            yield document(f"{number}", row[text_column])

    return TextSource(identity, rows.info.license or "", read, list(rows.info.splits or ()))


def open_topics() -> TextSource:
    """The help texts of the running Python, a document per topic."""
    from pydoc_data.topics import topics

    licence = f"Python {platform.python_version()} documentation, PSF License"
    return TextSource(
        f"{EMBEDDED}@{fingerprint(topics)}", licence, lambda: (document(key, topics[key]) for key in sorted(topics))
    )


def cut_document(whole: Document, size: int) -> Iterator[Document]:
    """Cut a document at paragraphs, else at lines, spaces, or between characters; together the parts are the whole.

    Args:
        size: maximum bytes of a part; the last part may have half as many more. A part has at least half as many.
    """
    text, start, parts = whole.text.encode(), 0, []
    while len(text) - start > size + size // 2:
        # After the last separator in the second half of the part, the best kind first; else at the maximum.
        ends = (text.rfind(mark, start + size // 2, start + size) + len(mark) for mark in SEPARATORS)
        end = next((end for mark, end in zip(SEPARATORS, ends) if end >= len(mark)), start + size)
        while text[end] & 0xC0 == 0x80:  # A continuation byte of UTF-8: the cut is within a character.
            end -= 1
        parts.append(text[start:end])
        start = end
    for number, part in enumerate([*parts, text[start:]], start=1):
        yield Document(f"{whole.key}#{number}" if parts else whole.key, part.decode())
