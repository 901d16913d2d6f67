"""Documents as tokens on disk: the files of each split, described in `dataset_loading/text/windows.py`."""

import array
import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset_loading.files import crc_of_file
from dataset_loading.text import tokenizers
from dataset_loading.text.documents import Document
from dataset_loading.text.sources import cut_document
from dataset_loading.text.survey import SPLITS, SplitDocument
from dataset_loading.text.tokenizers import EncodedText

logger = logging.getLogger(__name__)

BATCH_BYTES = 1 << 19  # Text that is encoded at once, which takes up to 350 times as much memory.
BATCH_DOCUMENTS = 512
LOG_SECONDS = 30  # Between two lines of progress.


@dataclasses.dataclass
class WrittenSplits:
    """The result of `write_splits`.

    Attributes:
        totals: the manifest's entry on each split, by its name.
        n_in_pieces: documents that were too long to be encoded at once.
    """

    totals: dict[str, dict[str, Any]]
    n_in_pieces: int


class DocumentSize(NamedTuple):
    """Size of a document that was written: UTF-8 bytes, and pieces in which it was encoded."""

    n_bytes: int
    n_pieces: int


def write_splits(
    folder: Path,
    documents: Iterable[SplitDocument],
    tokenizer: PreTrainedTokenizerFast,
    *,
    description: dict[str, Any],
) -> WrittenSplits:
    """Encode all documents in batches and write the files of both splits.

    Args: description: the tokenizer as `describe_tokenizer` gives it.
    """
    core = tokenizers.document_encoder(tokenizer)
    lengths = tokenizers.byte_lengths(tokenizer) if description["is_byte_level"] else None
    # A byte-level tokenizer knows every text, so only others can meet unknown characters.
    unknown = None if lengths is not None else tokenizer.unk_token_id
    writers = [SplitWriter(folder, name, description, unknown=unknown) for name in SPLITS]
    shown_at, n_bytes, n_in_pieces = time.monotonic(), 0, 0
    for batch in batches(documents):
        if len(batch) == 1:
            # A document alone may be of any length: encode it piece by piece, so that memory stays bounded.
            document, split = batch[0]
            size = writers[split].write(document, encode_pieces(core, document.text, lengths))
            n_bytes += size.n_bytes
            n_in_pieces += size.n_pieces > 1
        else:
            # Short documents together, so that the tokenizer's threads share them.
            encoded = tokenizers.encode_texts(core, [document.text for document, _ in batch], lengths)
            for (document, split), piece in zip(batch, encoded):
                n_bytes += writers[split].write(document, [piece]).n_bytes
        if time.monotonic() > shown_at + LOG_SECONDS:
            shown_at = time.monotonic()
            logger.info("%.1f MB of text tokenised", n_bytes / 1e6)
    return WrittenSplits({writer.name: writer.close() for writer in writers}, n_in_pieces)


def encode_pieces(
    core: Tokenizer, text: str, lengths: np.ndarray | None, *, size: int = BATCH_BYTES
) -> Iterator[EncodedText]:
    """Encode a text in pieces of at most `size` bytes (the last one half as many more).

    Bytes that no id of a piece covers count for its last one, so that those of the next piece keep their own.
    """
    pieces = list(cut_document(Document("", text), size))
    for number, piece in enumerate(pieces, start=1):
        ((ids, widths),) = tokenizers.encode_texts(core, [piece.text], lengths)
        if lengths is None and number < len(pieces) and len(ids):
            widths[-1] += len(piece.text.encode()) - widths.sum()
        yield EncodedText(ids, widths)


def batches(documents: Iterable[SplitDocument]) -> Iterator[list[SplitDocument]]:
    """Lists of documents with up to `BATCH_BYTES` of text; a longer document is alone."""
    batch, size = [], 0
    for entry in documents:
        n_bytes = len(entry.document.text.encode())
        if batch and (size + n_bytes > BATCH_BYTES or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += n_bytes
    if batch:
        yield batch


class SplitWriter:
    """The files of one split.

    Args:
        folder: the folder of all splits.
        name: `"train"` or `"validation"`.
        description: the tokenizer as `describe_tokenizer` gives it.
        unknown: id of unknown text, whose number is counted, or None.
    """

    def __init__(self, folder: Path, name: str, description: dict[str, Any], *, unknown: int | None):
        self.folder, self.name, self.description, self.unknown = folder, name, description, unknown
        self.names = {"tokens": f"{name}.bin", "offsets": f"{name}.offsets.npy"}
        # The ids of a byte-level tokenizer tell how many bytes they stand for; those of others need a file for it.
        if not description["is_byte_level"]:
            self.names["widths"] = f"{name}.bytes.bin"
        self.files = {kind: open(folder / file, "wb") for kind, file in self.names.items()}  # noqa: SIM115
        self.offsets = array.array("q", [0])  # 8 bytes per document, also where there are millions of them.
        self.n_bytes = self.n_unknown = 0

    def write(self, document: Document, pieces: Iterable[EncodedText]) -> DocumentSize:
        """Append a document between its first and its last token.

        Bytes that no token stands for, such as blanks that a tokenizer drops at the end, go to the last token.
        Args: pieces: ids and their bytes, one piece after the other.
        Raises: ValueError: a tokenizer of bytes lost some, or one token stands for more than 65535 bytes.
        """
        size = rest = len(document.text.encode())
        n_ids = n_pieces = 0
        self.append(document.key, [self.description["begin"]], [0])
        for ids, widths in pieces:
            self.append(document.key, ids, widths)
            self.n_unknown += int((ids == self.unknown).sum()) if self.unknown is not None else 0
            rest, n_ids, n_pieces = rest - int(widths.sum()), n_ids + len(ids), n_pieces + 1
        if rest and "widths" not in self.files:
            raise ValueError(f"{document.key}: the tokens have {size - rest} bytes, the text has {size}")
        self.append(document.key, [self.description["end"]], [rest])
        self.offsets.append(self.offsets[-1] + n_ids + 2)  # 2 for the first and the last token.
        self.n_bytes += size
        return DocumentSize(size, n_pieces)

    def append(self, key: str, ids: Any, widths: Any) -> None:
        """Write ids and, where they do not tell, their bytes. Raises: ValueError: more bytes than a uint16 holds."""
        if "widths" in self.files and len(ids):
            largest = int(np.max(widths))
            if largest > np.iinfo(np.uint16).max:
                raise ValueError(f"{key}: one token stands for {largest} bytes; choose another tokenizer")
            self.files["widths"].write(np.asarray(widths, dtype=np.uint16).tobytes())
        self.files["tokens"].write(np.asarray(ids, dtype=self.description["dtype"]).tobytes())

    def close(self) -> dict[str, Any]:
        """Write the offsets and flush all files to the disk; returns the manifest's entry on the split."""
        np.save(self.files["offsets"], np.frombuffer(self.offsets, dtype=np.int64))
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        n_tokens, n_documents = self.offsets[-1], len(self.offsets) - 1
        if self.n_unknown:
            logger.warning("%s: %d tokens are unknown to the tokenizer, the text is lost", self.name, self.n_unknown)
        return {
            "documents": n_documents,
            "tokens": n_tokens,
            "bytes": self.n_bytes,
            # A document's first token is never a target, so it does not count.
            "bytes_per_token": round(self.n_bytes / (n_tokens - n_documents), 4) if n_documents else None,
            "unknown_tokens": self.n_unknown,
            "files": {file: (self.folder / file).stat().st_size for file in self.names.values()},
            "crc32": {file: crc_of_file(self.folder / file) for file in self.names.values()},
        }
