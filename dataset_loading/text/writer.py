"""Tokenises documents once: `prepare_text`. `dataset_loading/text/windows.py` describes the layout of the folder."""

import array
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset_loading.files import (
    MANIFEST,
    SCHEMA,
    fingerprint,
    read_manifest,
    remove_leftovers,
    replace_file,
    replacing,
)
from dataset_loading.text import tokenizers
from dataset_loading.text.digests import Digests
from dataset_loading.text.sources import Document, TextSource, cut_document, open_text, own_validation
from dataset_loading.text.survey import Rules, describe_cut, kept, sample_texts, survey_documents

logger = logging.getLogger(__name__)

STAGE = "text"
SPLITS = ("train", "validation")
PACKAGES = ("tokenizers", "transformers", "datasets", "numpy")
BPE_SIZE = 4096
BATCH_BYTES = 1 << 19  # Text that is encoded at once, which takes up to 350 times as much memory.
BATCH_DOCUMENTS = 512
LOG_SECONDS = 30
VALIDATION_FRACTION = 0.05


def prepare_text(
    source: str,
    folder: str | Path,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    *,
    text_column: str = "text",
    dataset_config: str = "",
    dataset_split: str = "train",
    validation_source: str = "",
    validation_split: str = "validation",
    validation_fraction: float | None = None,
    seed: int = 42,
    keep_duplicates: bool = False,
    document_bytes: int = 8192,
    tokenizer_sample_bytes: int = 16 << 20,
    max_broken_fraction: float = 0.01,
    limit: int = -1,
) -> Path:
    """Tokenise a source into a folder, or find that it is there already. Several processes may call it at once.

    A document above 768 KiB is encoded in pieces of 512 KiB, cut behind a blank line, a line, a space, or between
    characters, so that memory stays bounded. Bytes are the same ids as without; of other tokenizers no token reaches
    across a cut. The manifest counts such documents. Each has one first and one last token all the same.

    Args:
        source: file, folder, hub name, or "python-topics", see `dataset_loading.text.sources`.
        folder: what is written.
        tokenizer: "bytes", "bpe" (trained on the training split), or a fast tokenizer's folder or hub name.
        vocab_size: ids of "bpe", special tokens included; None: 4096.
        text_column, dataset_config, dataset_split: of tables and hub data sets.
        validation_source, validation_split: a source of its own for validation; `validation_fraction` is unused then.
        validation_fraction: share of the documents for validation, those with the smallest hashes of (seed, text): it
            depends neither on order nor on names, and equal texts are never on both sides. None: the validation split
            that the source has of its own, else 0.05. 0: no validation.
        keep_duplicates: keep documents that equal an earlier one; else the first is kept.
        document_bytes: size into which long documents are cut where validation would have fewer than 10 documents.
        tokenizer_sample_bytes: training text that "bpe" sees at most, documents drawn by their hashes.
        max_broken_fraction: share of raw documents that may be unreadable or no text; those that are blank do not
            count, they are left out.
        limit: raw documents that are read, from the first; -1: all.
    Returns: the folder.
    Raises:
        FileNotFoundError: source or tokenizer do not exist.
        ValueError: an argument is out of its bounds; the folder was made with other settings, or is something else;
            too many documents are broken, or none is left, or none could be held out.
    """
    folder = Path(folder)
    fraction = VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    rules = Rules(fraction, seed, keep_duplicates, document_bytes, max_broken_fraction, limit)
    check_rules(rules, tokenizer, vocab_size, tokenizer_sample_bytes)
    digests = Digests(folder)
    read = partial(open_text, text_column=text_column, config=dataset_config, digests=digests)
    opened, own, split = read(source, split=dataset_split), None, ""
    if validation_source:
        own = read(validation_source, split=validation_split)
    elif validation_fraction is None and (split := own_validation(opened, dataset_split)):
        logger.info("%s has a split %r of its own, which is held out; validation_fraction is unused", source, split)
        own = read(source, split=split)
    sources = ([(1, own)] if own else []) + [(0, opened)]  # Validation first: its duplicates leave the training split.
    known = None if tokenizer == "bpe" else load(tokenizer)
    settings = {
        "source": opened.identity,
        "validation": own.identity if own else f"{fraction} of the source",
        "text_column": text_column,
        "tokenizer": tokenizer if tokenizer in ("bytes", "bpe") else f"hash {tokenizers.tokenizer_hash(known)}",
        "vocab_size": tokenizers.vocabulary_size(known) if known else vocab_size or BPE_SIZE,
        "tokenizer_sample_bytes": None if known else tokenizer_sample_bytes,
        **{name: getattr(rules, name) for name in ("seed", "keep_duplicates", "document_bytes", "limit")},
    }
    if not is_prepared(folder, settings):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not is_prepared(folder, settings):  # Another process may have been faster.
                write_folder(folder, sources, known, settings, rules, split)
    digests.save()
    return folder


def check_rules(rules: Rules, tokenizer: str, vocab_size: int | None, sample_bytes: int) -> None:
    """Raises: ValueError: an argument is out of its bounds or has no effect."""
    if not 0 <= rules.validation_fraction < 1:
        raise ValueError(f"validation_fraction={rules.validation_fraction} must be in [0, 1)")
    if not 0 <= rules.max_broken_fraction <= 1:
        raise ValueError(f"max_broken_fraction={rules.max_broken_fraction} must be in [0, 1]")
    if rules.document_bytes < 64 or sample_bytes < 1:
        raise ValueError(f"document_bytes={rules.document_bytes} must be >= 64, {sample_bytes=} > 0")
    if rules.limit == 0:
        raise ValueError("limit=0 reads nothing; give a positive number, or -1 for all")
    if tokenizer == "bpe":
        if vocab_size is not None and vocab_size < tokenizers.SMALLEST_BPE:
            raise ValueError(f"vocab_size={vocab_size} must be at least {tokenizers.SMALLEST_BPE}, or None")
    elif vocab_size is not None:
        raise ValueError(f"vocab_size={vocab_size} has no effect with tokenizer={tokenizer!r}; it belongs to 'bpe'")


def load(tokenizer: str) -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, or one that exists."""
    return tokenizers.byte_tokenizer() if tokenizer == "bytes" else tokenizers.load_tokenizer(tokenizer)


def is_prepared(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete and was made with these settings.

    Raises: ValueError: it was made with others, which the message shows beside these, or is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is not empty and no prepared text (no {MANIFEST}); choose another folder")
    there = read_text_manifest(folder)["settings"]
    names = sorted(name for name in there.keys() | settings.keys() if there.get(name) != settings.get(name))
    if names:
        pairs = "; ".join(f"{name}={there.get(name)!r} there, {settings.get(name)!r} now" for name in names)
        raise ValueError(f"{folder} was made with other settings: {pairs}. Choose another folder, or delete it first")
    return True


def read_text_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of prepared text.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the manifest is damaged, of another stage or of another version.
    """
    return read_manifest(folder, STAGE, remedy="make it with dataset_loading.text.writer.prepare_text")


def write_folder(
    folder: Path,
    sources: list[tuple[int, TextSource]],
    tokenizer: PreTrainedTokenizerFast | None,
    settings: dict[str, Any],
    rules: Rules,
    own_split: str,
) -> None:
    """Write everything beside the folder and rename it; the caller holds the lock.

    Args: own_split: the source's own split that validates, `""`: none.
    """
    started = time.perf_counter()
    survey = survey_documents(sources, rules)
    remove_leftovers(folder)
    with replacing(folder) as temporary:
        temporary.mkdir()
        is_ours = tokenizer is None or settings["tokenizer"] == "bytes"
        if tokenizer is None:
            training = (one.text for one, split in kept(sources, survey, rules) if split == 0)
            sample = sample_texts(training, settings["tokenizer_sample_bytes"], rules.seed)
            tokenizer = tokenizers.train_bpe(sample, settings["vocab_size"])
        tokenizer.save_pretrained(temporary / "tokenizer")
        described = describe_tokenizer(tokenizer, is_ours)
        if described["vocab_size"] < settings["vocab_size"]:
            logger.warning(
                "the training text has pairs for %d of vocab_size=%d ids",
                described["vocab_size"],
                settings["vocab_size"],
            )
        totals, n_long = write_splits(temporary, kept(sources, survey, rules), tokenizer, described)
        pieces = describe_pieces(n_long, settings["tokenizer"])
        identified = {"schema": SCHEMA, "stage": STAGE, **settings, "hash": described["hash"]}
        if pieces and not pieces["is_exact"]:
            identified["piece_bytes"] = BATCH_BYTES
        manifest = {
            "schema": SCHEMA,
            "stage": STAGE,
            "fingerprint": fingerprint(identified),
            "settings": settings,
            "tokenizer": described,
            "totals": totals,
            "cut": describe_cut(survey, rules),
            "pieces": pieces,
            "own_validation": own_split or None,
            "duplicates": len(survey.duplicates),
            "n_empty": survey.n_empty,
            "n_broken": survey.n_broken,
            "broken": survey.broken,
            "licence": sources[-1][1].licence,
            "packages": {name: version(name) for name in PACKAGES},
        }
        content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        replace_file(temporary / MANIFEST, content.encode("utf-8", "backslashreplace"), sync=True)
    logger.info("%s: %s in %.1f s", folder, json.dumps(totals), time.perf_counter() - started)
    if survey.n_broken:
        logger.warning("%d documents have no text, see %s", survey.n_broken, folder / MANIFEST)


def describe_pieces(n_documents: int, tokenizer: str) -> dict[str, Any] | None:
    """What the manifest says where documents were too long to be encoded at once."""
    if not n_documents:
        return None
    return {
        "piece_bytes": BATCH_BYTES,
        "documents": n_documents,
        "is_exact": tokenizer == "bytes",
        "reason": "long documents were encoded in pieces, cut at blank lines, lines or spaces where there are any; "
        "no token reaches across a cut",
    }


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast, is_byte_level: bool) -> dict[str, Any]:
    """What the manifest says of a tokenizer; `is_byte_level`: it was built here, ids tell their bytes."""
    size, (begin, end) = tokenizers.vocabulary_size(tokenizer), tokenizers.document_ends(tokenizer)
    return {
        "hash": tokenizers.tokenizer_hash(tokenizer),
        "vocab_size": size,
        "begin": begin,
        "end": end,
        "padding": tokenizer.pad_token_id,
        "is_byte_level": is_byte_level,
        "dtype": "uint16" if size <= 1 << 16 else "uint32",
    }


def write_splits(
    folder: Path,
    documents: Iterable[tuple[Document, int]],
    tokenizer: PreTrainedTokenizerFast,
    described: dict[str, Any],
) -> tuple[dict[str, dict[str, Any]], int]:
    """Encode all documents in batches; returns what the manifest says of each split, and how many were in pieces."""
    core = tokenizers.document_encoder(tokenizer)
    lengths = tokenizers.byte_lengths(tokenizer) if described["is_byte_level"] else None
    unknown = None if lengths is not None else tokenizer.unk_token_id
    writers = [SplitWriter(folder, name, described, unknown) for name in SPLITS]
    shown, n_bytes, n_long = time.monotonic(), 0, 0
    for batch in batches(documents):
        if len(batch) == 1:
            one, split = batch[0]
            size, n_pieces = writers[split].write(one, encode_pieces(core, one.text, lengths))
            n_bytes, n_long = n_bytes + size, n_long + (n_pieces > 1)
        else:
            encoded = tokenizers.encode_texts(core, [one.text for one, _ in batch], lengths)
            for (one, split), piece in zip(batch, encoded):
                n_bytes += writers[split].write(one, [piece])[0]
        if time.monotonic() > shown + LOG_SECONDS:
            shown = time.monotonic()
            logger.info("%.1f MB of text are tokens", n_bytes / 1e6)
    return {writer.name: writer.close() for writer in writers}, n_long


def encode_pieces(
    core: Tokenizer, text: str, lengths: np.ndarray | None, size: int = BATCH_BYTES
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode a text in pieces of at most so many bytes (the last one half as many more); yields as `encode_texts`.

    Bytes that no id of a piece covers count for its last one, so that those of the next keep their own.
    """
    parts = list(cut_document(Document("", text), size))
    for number, part in enumerate(parts, start=1):
        ((ids, widths),) = tokenizers.encode_texts(core, [part.text], lengths)
        if lengths is None and number < len(parts) and len(ids):
            widths[-1] += len(part.text.encode()) - widths.sum()
        yield ids, widths


def batches(documents: Iterable[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    """Lists of documents with up to `BATCH_BYTES` of text; a longer document is alone."""
    batch, size = [], 0
    for one, split in documents:
        n_bytes = len(one.text.encode())
        if batch and (size + n_bytes > BATCH_BYTES or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append((one, split))
        size += n_bytes
    if batch:
        yield batch


class SplitWriter:
    """The files of one split.

    Args:
        described: the tokenizer as `describe_tokenizer` gives it.
        unknown: id whose number is counted, or None.
    """

    def __init__(self, folder: Path, name: str, described: dict[str, Any], unknown: int | None):
        self.folder, self.name, self.described, self.unknown = folder, name, described, unknown
        self.names = {"tokens": f"{name}.bin", "offsets": f"{name}.offsets.npy"}
        if not described["is_byte_level"]:
            self.names["widths"] = f"{name}.bytes.bin"
        self.files = {kind: open(folder / file, "wb") for kind, file in self.names.items()}  # noqa: SIM115
        self.offsets = array.array("q", [0])
        self.n_bytes = self.n_unknown = 0

    def write(self, one: Document, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
        """Append a document between its first and its last token; returns its bytes and the number of its pieces.

        Bytes that no token stands for, such as blanks that a tokenizer drops at the end, go to the last token.
        Args: pieces: ids and their bytes, one piece after the other.
        Raises: ValueError: a tokenizer of bytes lost some, or one token stands for more than 65535 bytes.
        """
        size = rest = len(one.text.encode())
        n_ids = n_pieces = 0
        self.append(one, [self.described["begin"]], [0])
        for ids, widths in pieces:
            self.append(one, ids, widths)
            self.n_unknown += int((ids == self.unknown).sum()) if self.unknown is not None else 0
            rest, n_ids, n_pieces = rest - int(widths.sum()), n_ids + len(ids), n_pieces + 1
        if rest and "widths" not in self.files:
            raise ValueError(f"{one.key}: the tokens have {size - rest} bytes, the text has {size}")
        self.append(one, [self.described["end"]], [rest])
        self.offsets.append(self.offsets[-1] + n_ids + 2)
        self.n_bytes += size
        return size, n_pieces

    def append(self, one: Document, ids: Any, widths: Any) -> None:
        """Write ids and, where these do not tell, their bytes. Raises: ValueError: more bytes than a uint16 holds."""
        if "widths" in self.files and len(ids):
            largest = int(np.max(widths))
            if largest > np.iinfo(np.uint16).max:
                raise ValueError(f"{one.key}: one token stands for {largest} bytes; choose another tokenizer")
            self.files["widths"].write(np.asarray(widths, dtype=np.uint16).tobytes())
        self.files["tokens"].write(np.asarray(ids, dtype=self.described["dtype"]).tobytes())

    def close(self) -> dict[str, Any]:
        """Write the offsets, flush to the disk; returns what the manifest says."""
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
            "bytes_per_token": round(self.n_bytes / (n_tokens - n_documents), 4) if n_documents else None,
            "unknown_tokens": self.n_unknown,
            "files": {file: (self.folder / file).stat().st_size for file in self.names.values()},
        }
