"""Tokenises documents once: `prepare_text`. `dataset_loading/text/windows.py` describes the layout of the folder."""

import json
import logging
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from dataset_loading.files import (
    MANIFEST,
    SCHEMA,
    Record,
    crc_of_file,
    fingerprint,
    read_manifest,
    remove_leftovers,
    replace_file,
    replacing,
    with_digest,
)
from dataset_loading.left_out import LeftOut
from dataset_loading.text import tokenizers
from dataset_loading.text.digests import Digests
from dataset_loading.text.encoding import BATCH_BYTES, write_splits
from dataset_loading.text.sources import find_validation_split, open_text
from dataset_loading.text.survey import (
    SPLITS,
    Corpus,
    Rules,
    assigned_documents,
    describe_cut,
    sample_texts,
    survey_documents,
)

logger = logging.getLogger(__name__)

STAGE = "text"
# What the manifest says of the tokenizer.
TOKENIZER_TYPES: dict[str, Any] = {
    "hash": str,
    "vocab_size": int,
    "begin": int,
    "end": int,
    "padding": (int, NoneType),
    "is_byte_level": bool,
    "dtype": str,
}
PACKAGES = ("tokenizers", "transformers", "datasets", "numpy")  # Their versions are noted in the manifest.
BPE_SIZE = 4096  # Ids of a tokenizer trained here, where the caller names no number.
VALIDATION_FRACTION = 0.05  # Share of a source without a validation split, likewise.


def prepare_text(
    source: str,
    folder: str | Path,
    tokenizer: str = "bytes",
    *,
    vocab_size: int | None = None,
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

    A document above 768 KiB is encoded in pieces of 512 KiB, cut after a blank line, a line, a space, or between
    characters, so that memory stays bounded. Bytes are the same ids as without; of other tokenizers no token reaches
    across a cut. The manifest counts such documents. Each has one first and one last token all the same.

    Args:
        source: file, folder, hub name, or "python-topics", see `dataset_loading.text.sources`.
        folder: the folder that is written.
        tokenizer: "bytes", "bpe" (trained on the training split), or a fast tokenizer's folder or hub name.
        vocab_size: ids of "bpe", special tokens included; None: 4096.
        text_column, dataset_config, dataset_split: of tables and hub datasets.
        validation_source, validation_split: a separate source for validation; `validation_fraction` is unused then.
        validation_fraction: share of the documents for validation, those with the smallest hashes of (seed, text): it
            depends neither on order nor on names, and equal texts are never on both sides. None: the validation split
            of the source itself where it has one, else 0.05. 0: no validation.
        keep_duplicates: keep documents that equal an earlier one; otherwise only the first is kept.
        document_bytes: size into which long documents are cut where validation would have fewer than 10 documents,
            with a warning; 0: they are not cut.
        tokenizer_sample_bytes: maximum of training text that "bpe" sees, documents chosen by their hashes.
        max_broken_fraction: share of raw documents that may be unreadable or no text; blank ones do not count, they
            are left out.
        limit: raw documents that are read, from the first; -1: all.
    Returns: the folder.
    Raises:
        FileNotFoundError: source or tokenizer do not exist.
        ValueError: an argument is out of its bounds; the folder was made with other settings, or is something else;
            too many documents are broken, or none is left, or none could be held out.
    """
    folder = Path(folder)
    rules = Rules(
        validation_fraction=VALIDATION_FRACTION if validation_fraction is None else validation_fraction,
        seed=seed,
        keep_duplicates=keep_duplicates,
        document_bytes=document_bytes,
        max_broken_fraction=max_broken_fraction,
        limit=limit,
    )
    # Wrong arguments are errors before anything is read.
    check_rules(rules)
    check_tokenizer_arguments(tokenizer, vocab_size, tokenizer_sample_bytes)

    # The sources: validation from a separate one, from the training source's own split, or from its documents.
    digests = Digests(folder)
    read = partial(open_text, text_column=text_column, config=dataset_config, digests=digests)
    corpus = Corpus(read(source, split=dataset_split))
    if validation_source:
        corpus.validation = read(
            validation_source, split=validation_split, is_held_out=validation_split == "validation"
        )
    elif validation_fraction is None and (split := find_validation_split(corpus.training, dataset_split)):
        logger.info("%s: its own split %r is held out; validation_fraction is unused", source, split)
        corpus.validation, corpus.own_split = read(source, split=split), split
        corpus.validation.left_out = LeftOut()  # What the folder holds beside its splits counts once.

    existing = None if tokenizer == "bpe" else load(tokenizer)
    options = {"text_column": text_column, "vocab_size": vocab_size, "tokenizer_sample_bytes": tokenizer_sample_bytes}
    settings = describe_settings(corpus, rules, tokenizer, existing=existing, **options)
    write_once(folder, corpus, rules, settings=settings, tokenizer=existing)
    digests.save()
    return folder


def describe_settings(
    corpus: Corpus,
    rules: Rules,
    tokenizer: str,
    *,
    existing: PreTrainedTokenizerFast | None,
    text_column: str,
    vocab_size: int | None,
    tokenizer_sample_bytes: int,
) -> dict[str, Any]:
    """Everything that shapes the folder; `prepare_text` describes the arguments.

    Args: existing: the tokenizer, None where "bpe" is still to be trained.
    """
    fraction = f"{rules.validation_fraction} of the source"
    return {
        "source": corpus.training.identity,
        "validation": corpus.validation.identity if corpus.validation else fraction,
        "text_column": text_column,
        # A tokenizer that exists is known by its content, not by its path.
        "tokenizer": tokenizer if tokenizer in ("bytes", "bpe") else f"hash {tokenizers.tokenizer_hash(existing)}",
        "vocab_size": tokenizers.vocabulary_size(existing) if existing else vocab_size or BPE_SIZE,
        "tokenizer_sample_bytes": None if existing else tokenizer_sample_bytes,
        **{name: getattr(rules, name) for name in ("seed", "keep_duplicates", "document_bytes", "limit")},
    }


def check_rules(rules: Rules) -> None:
    """Raises: ValueError: a rule is out of its bounds."""
    if not 0 <= rules.validation_fraction < 1:
        raise ValueError(f"validation_fraction={rules.validation_fraction} must be in [0, 1)")
    if not 0 <= rules.max_broken_fraction <= 1:
        raise ValueError(f"max_broken_fraction={rules.max_broken_fraction} must be in [0, 1]")
    if rules.document_bytes < 64 and rules.document_bytes:
        raise ValueError(f"document_bytes={rules.document_bytes} must be >= 64, or 0: documents are not cut")
    if rules.limit == 0:
        raise ValueError("limit=0 reads nothing; give a positive number, or -1 for all")


def check_tokenizer_arguments(tokenizer: str, vocab_size: int | None, tokenizer_sample_bytes: int) -> None:
    """Raises: ValueError: an argument is out of its bounds or has no effect."""
    if tokenizer_sample_bytes < 1:
        raise ValueError(f"{tokenizer_sample_bytes=} must be > 0")
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
    # Complete, since the folder was renamed as a whole; the settings must agree, name by name.
    old = read_text_manifest(folder)["settings"]
    names = sorted(name for name in old.keys() | settings.keys() if old.get(name) != settings.get(name))
    if names:
        pairs = "; ".join(f"{name}={old.get(name)!r} there, {settings.get(name)!r} now" for name in names)
        raise ValueError(f"{folder} was made with other settings: {pairs}. Choose another folder, or delete it first")
    return True


def read_text_manifest(folder: Path) -> Record:
    """The manifest of a folder of prepared text.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the manifest is damaged, of another stage or of another version.
    """
    remedy = "make it with --text_dataset, or with dataset_loading.text.writer.prepare_text"
    manifest = read_manifest(folder, STAGE, remedy=remedy)
    manifest.expect_types({"tokenizer": Record, "totals": Record})
    description = manifest["tokenizer"]
    description.expect_types(TOKENIZER_TYPES, "tokenizer")
    if description["dtype"] not in ("uint16", "uint32"):
        raise manifest.damaged(f"tokenizer.dtype={description['dtype']!r} must be 'uint16' or 'uint32'")
    manifest["totals"].expect_types(dict.fromkeys(SPLITS, Record), "totals")
    for split, totals in manifest["totals"].items():
        totals.expect_types({"documents": int, "tokens": int, "bytes": int, "files": Record}, f"totals.{split}")
        totals["files"].expect_types(dict.fromkeys(totals["files"], int), f"totals.{split}.files")
    return manifest


def write_once(
    folder: Path,
    corpus: Corpus,
    rules: Rules,
    *,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Write the folder where it is not there yet; of several processes one writes and the others wait for it."""
    if is_prepared(folder, settings):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not is_prepared(folder, settings):  # Another process may have been faster.
            write_folder(folder, corpus, rules, settings=settings, tokenizer=tokenizer)


def write_folder(
    folder: Path,
    corpus: Corpus,
    rules: Rules,
    *,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Write everything under a temporary name and rename it; the caller holds the lock.

    Args: tokenizer: None: a byte-pair encoding is trained on the training split.
    """
    started = time.perf_counter()
    survey = survey_documents(corpus, rules)
    remove_leftovers(folder)
    with replacing(folder) as temporary:
        temporary.mkdir()
        # The tokenizer: given, or trained on a sample of the training split.
        is_byte_level = tokenizer is None or settings["tokenizer"] == "bytes"
        if tokenizer is None:
            training = (document.text for document, split in assigned_documents(corpus, survey, rules) if split == 0)
            sample = sample_texts(training, settings["tokenizer_sample_bytes"], seed=rules.seed)
            tokenizer = tokenizers.train_bpe(sample, settings["vocab_size"])
        tokenizer.save_pretrained(temporary / "tokenizer")
        description = describe_tokenizer(tokenizer, is_byte_level)
        description["crc32"] = {file.name: crc_of_file(file) for file in sorted((temporary / "tokenizer").iterdir())}
        n_ids, n_wanted = description["vocab_size"], settings["vocab_size"]
        if n_ids < n_wanted:
            logger.warning("the training text has pairs for %d of vocab_size=%d ids", n_ids, n_wanted)

        # The tokens of both splits.
        documents = assigned_documents(corpus, survey, rules)
        written = write_splits(temporary, documents, tokenizer, description=description)

        # The manifest, last. The size of pieces shapes the tokens only where a cut could have changed one.
        pieces = describe_pieces(written.n_in_pieces, settings["tokenizer"])
        identity = {"schema": SCHEMA, "stage": STAGE, **settings, "hash": description["hash"]}
        if pieces and not pieces["is_exact"]:
            identity["piece_bytes"] = BATCH_BYTES
        manifest = {
            "schema": SCHEMA,
            "stage": STAGE,
            "fingerprint": fingerprint(identity),
            "settings": settings,
            "tokenizer": description,
            "totals": written.totals,
            "cut": describe_cut(survey, rules),
            "pieces": pieces,
            "own_validation": corpus.own_split or None,
            "duplicates": len(survey.duplicates),
            "n_empty": survey.n_empty,
            "n_broken": survey.n_broken,
            "broken": survey.broken,
            "left_out": survey.left_out.as_dict(),
            "licence": corpus.training.licence,
            "packages": {name: version(name) for name in PACKAGES},
        }
        content = json.dumps(manifest, indent=1, ensure_ascii=False).removesuffix("\n}")
        replace_file(temporary / MANIFEST, with_digest(content.encode("utf-8", "backslashreplace")), sync=True)
    logger.info("%s: %s in %.1f s", folder, json.dumps(written.totals), time.perf_counter() - started)
    if pieces and not pieces["is_exact"]:
        logger.warning("%d long documents were encoded in pieces: %s", pieces["documents"], pieces["reason"])
    if survey.left_out:
        logger.warning("left out: %s; see %s", survey.left_out, folder / MANIFEST)


def describe_pieces(n_documents: int, tokenizer: str) -> dict[str, Any] | None:
    """Manifest entry on documents that were too long to be encoded at once; None where there are none."""
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
    """Manifest entry on a tokenizer.

    Args: is_byte_level: it was built here, so that an id tells how many bytes it stands for.
    """
    size, ends = tokenizers.vocabulary_size(tokenizer), tokenizers.document_ends(tokenizer)
    return {
        "hash": tokenizers.tokenizer_hash(tokenizer),
        "vocab_size": size,
        "begin": ends.begin,
        "end": ends.end,
        "padding": tokenizer.pad_token_id,
        "is_byte_level": is_byte_level,
        # The smallest type that holds every id.
        "dtype": "uint16" if size <= 1 << 16 else "uint32",
    }
