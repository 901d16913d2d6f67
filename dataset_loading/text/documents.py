"""Documents, and sources that hand them out one by one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dataset_loading.left_out import LeftOut
from dataset_loading.tables import TO_UTF8

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
EMPTY = "empty"  # The problem of a blank document, which is no mistake of the source.


@dataclasses.dataclass
class Document:
    """A text with a name that does not depend on the machine; `problem` says why there is none, and `is_file` that it
    is the problem of a whole file, of which further documents are lost."""

    key: str
    text: str
    problem: str = ""
    is_file: bool = False


@dataclasses.dataclass
class TextSource:
    """Documents that can be read any number of times, always in the same order.

    Attributes:
        identity: name and, for local files, a hash of the contents.
        licence: the first line of its licence, `""` where unknown.
        read: begins to read from the start.
        splits: names of all splits that the same file, folder or hub dataset has; none where there are no splits.
        n_files: local files that are read.
        left_out: files of the folder that are not read, by reason.
    """

    identity: str
    licence: str
    read: Callable[[], Iterator[Document]]
    splits: Sequence[str] = ()
    n_files: int = 0
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)


def document(key: str, value: Any) -> Document:
    """A document of a value; one with a problem where it is no text. Exceptions stand for unreadable values."""
    if not isinstance(value, str):
        return Document(key, "", str(value) if isinstance(value, Exception) else f"no text but {value!r:.40}")
    if not value.strip():
        return Document(key, "", EMPTY)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # Lone surrogates; some of a table stand for bytes.
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return Document(key, "", f"byte 0x{code - 0xDC00:02x} is not UTF-8; convert the file with {TO_UTF8}")
        return Document(key, "", f"not UTF-8: character {error.start + 1} is half of a pair, \\u{code:04x}; remove it")
    return Document(key, value)
