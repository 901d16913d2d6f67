"""Which documents of a source are used and for what: the first reading of `prepare_text`, before any is encoded."""

import array
import dataclasses
import hashlib
import heapq
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dataset_loading.left_out import LeftOut
from dataset_loading.text.documents import EMPTY, Document, TextSource
from dataset_loading.text.sources import cut_document

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
FEWEST_DOCUMENTS = 10  # In the validation split, else long documents are cut.
SAMPLE_PART_BYTES = 8192  # Size of the parts that the sample for a tokenizer is made of.
REPORTED = 1000  # Broken documents that are listed.


@dataclasses.dataclass
class Corpus:
    """The sources of one prepared folder.

    Attributes:
        training: the source of the training split.
        validation: a separate source of the validation split; None: documents of the training source are held out.
        own_split: the name of that split where it is one of the training source itself, `""`: it is not.
    """

    training: TextSource
    validation: TextSource | None = None
    own_split: str = ""

    def __iter__(self) -> Iterator[tuple[int, TextSource]]:
        """Yields (index in SPLITS, source). Validation first, so that its duplicates leave the training split."""
        if self.validation:
            yield 1, self.validation
        yield 0, self.training


class SplitDocument(NamedTuple):
    """A document and the index in SPLITS of the split that it belongs to, 0 while that is not decided."""

    document: Document
    split: int


@dataclasses.dataclass
class Rules:
    """How raw documents become those of the splits; the arguments of `prepare_text` of the same names."""

    validation_fraction: float
    seed: int
    keep_duplicates: bool
    document_bytes: int
    max_broken_fraction: float
    limit: int


@dataclasses.dataclass
class Survey:
    """The result of a first reading, before anything is encoded.

    Attributes:
        is_cut: whether long documents are cut.
        n_read: documents or parts of them, those that are left out included.
        n_empty: those that are blank.
        n_broken: those that cannot be read, or are no text.
        broken: the first thousand of these, with the reason.
        n_broken_files: tables that cannot be read from some line on; each counts as one of the broken documents.
        left_out: documents that are left out by reason, and files of the sources that are not read.
        n_bytes: UTF-8 bytes of the documents that are kept.
        duplicates: numbers of the documents that equal an earlier one.
        splits: index in SPLITS of every document that is kept, in order, (number of documents,) uint8.
    """

    is_cut: bool
    n_read: int = 0
    n_empty: int = 0
    n_broken: int = 0
    n_broken_files: int = 0
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    n_bytes: int = 0
    broken: list[dict[str, str]] = dataclasses.field(default_factory=list)
    duplicates: set[int] = dataclasses.field(default_factory=set)
    splits: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))


def read_documents(corpus: Corpus, rules: Rules, is_cut: bool) -> Iterator[SplitDocument]:
    """All documents with the split of their source, broken ones included; long ones in parts where `is_cut`."""
    for split, source in corpus:
        for document in itertools.islice(source.read(), None if rules.limit < 0 else rules.limit):
            is_part = is_cut and not document.problem
            for part in cut_document(document, rules.document_bytes) if is_part else (document,):
                yield SplitDocument(part, split)


def survey_documents(corpus: Corpus, rules: Rules) -> Survey:
    """Read everything once: find what is broken, equal or to be cut, and choose the documents for validation.

    Raises: ValueError: too many documents are broken, or none is left for training, or none to be held out.
    """
    survey = survey_once(corpus, rules, is_cut=False)
    check_broken(survey, rules, corpus)
    # Few documents, such as one book, are cut into parts, so that validation is more than one of them.
    is_held_out = rules.validation_fraction > 0 and not corpus.validation
    may_cut = is_held_out and rules.document_bytes > 0
    if may_cut and len(survey.splits) * rules.validation_fraction < FEWEST_DOCUMENTS:
        cut = survey_once(corpus, rules, is_cut=True)
        if len(cut.splits) > len(survey.splits):
            n_documents, survey = len(survey.splits), cut
            logger.warning(
                "%d documents are too few to hold %d of them out: they are cut into %d parts of about %d bytes, each "
                "a document of its own, and parts of the same one are in both splits; --document_bytes sets the size, "
                "0 keeps documents whole, --validation_dataset names held-out texts",
                *(n_documents, FEWEST_DOCUMENTS, len(survey.splits), rules.document_bytes),
            )

    # Neither split may be empty.
    if not (survey.splits == 0).any():
        raise ValueError(
            f"{corpus.training.identity} gives no training document: {survey.n_read} read, {survey.n_empty} "
            f"empty, {survey.n_broken} broken, {len(survey.duplicates)} duplicates; choose another source"
        )
    if corpus.validation and not survey.splits.any():
        raise ValueError(
            f"{corpus.validation.identity} gives no validation document; add text or give another --validation_dataset"
        )
    if is_held_out and not survey.splits.any():
        raise ValueError(
            f"too little text: {survey.n_bytes} bytes in 1 document, of which no part can be held out "
            f"(document_bytes={rules.document_bytes}); add text or give --validation_dataset"
        )
    return survey


def survey_once(corpus: Corpus, rules: Rules, *, is_cut: bool) -> Survey:
    """One reading of everything."""
    survey, seen, hashes, splits = Survey(is_cut), set(), array.array("Q"), bytearray()
    for number, (document, split) in enumerate(read_documents(corpus, rules, is_cut)):
        survey.n_read = number + 1
        # Blank and broken documents are counted and left out.
        if document.problem == EMPTY:
            survey.n_empty += 1
            survey.left_out.add("empty", document.key)
            continue
        if document.problem:
            survey.n_broken += 1
            survey.n_broken_files += document.is_file
            survey.left_out.add("unreadable, or no text", document.key)
            if survey.n_broken <= REPORTED:
                survey.broken.append({"source": document.key, "reason": document.problem})
            continue
        # Of equal documents the first is kept.
        digest = text_digest(document.text, rules.seed)
        if not rules.keep_duplicates and digest in seen:
            survey.duplicates.add(number)
            survey.left_out.add("equal to an earlier one, as --keep_duplicates is not given", document.key)
            continue
        seen.add(digest)
        hashes.append(int.from_bytes(digest[:8], "big"))
        splits.append(split)
        survey.n_bytes += len(document.text.encode())
    for _, source in corpus:  # Those of tars are known once they were read.
        survey.left_out.merge(source.left_out)
    survey.splits = np.frombuffer(splits, dtype=np.uint8)
    if not corpus.validation:  # Hold out the documents with the smallest hashes.
        survey.splits = smallest(np.frombuffer(hashes, dtype=np.uint64), rules.validation_fraction).astype(np.uint8)
    return survey


def text_digest(text: str, seed: int) -> bytes:
    """16 bytes that depend on seed and text: the first half decides the split, the second BPE's sample."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()


def smallest(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which of N hashes are the smallest fraction of them, (N,) bool; at least one and not all, where that can be."""
    if fraction == 0 or len(hashes) < 2:
        return np.zeros(len(hashes), dtype=bool)
    # The n-th smallest hash is the bound; equal hashes are equal texts, which stay on the same side.
    n = min(max(1, round(fraction * len(hashes))), len(hashes) - 1)
    return hashes <= np.partition(hashes, n - 1)[n - 1]


def check_broken(survey: Survey, rules: Rules, corpus: Corpus) -> None:
    """Raises: ValueError: more of the documents that are not empty, or of the files, are broken than allowed; names
    the first five."""
    # A table that is cut off is one broken document, but it takes others with it: files are counted, too, and folders
    # that cannot be read as files.
    unreadable = [pair for _, source in corpus for pair in source.left_out.unreadable()]
    n_files = len(unreadable) + sum(source.n_files for _, source in corpus)
    counts = {"documents": (survey.n_broken, survey.n_read - survey.n_empty)}
    counts["files"] = survey.n_broken_files + len(unreadable), n_files
    broken = [*survey.broken, *({"source": name, "reason": reason} for reason, name in unreadable)]
    for kind, (n_broken, n_read) in counts.items():
        if n_broken > rules.max_broken_fraction * n_read:
            shown = "; ".join(f"{entry['source']} ({entry['reason']})" for entry in broken[:5])
            more = f"; and {n_broken - 5} more" if n_broken > 5 else ""
            raise ValueError(
                f"{n_broken} of {n_read} {kind} have no text, more than --max_broken_fraction="
                f"{rules.max_broken_fraction}: {shown}{more}. Repair or remove them, or allow more"
            )


def describe_cut(survey: Survey, rules: Rules) -> dict[str, Any] | None:
    """Manifest entry on long documents that were cut; None where none were."""
    if not survey.is_cut:
        return None
    return {
        "document_bytes": rules.document_bytes,
        "documents": len(survey.splits),
        "reason": f"whole documents would have given fewer than {FEWEST_DOCUMENTS} for validation, so that long ones "
        "were cut at paragraphs; parts of the same one are in both splits",
    }


def assigned_documents(corpus: Corpus, survey: Survey, rules: Rules) -> Iterator[SplitDocument]:
    """The documents that the survey keeps, each with its split, reading everything again.

    Raises: ValueError: the source has changed since.
    """
    splits = iter(survey.splits)
    for number, (document, _) in enumerate(read_documents(corpus, rules, survey.is_cut)):
        if not document.problem and number not in survey.duplicates:
            split = next(splits, None)
            if split is None:
                raise ValueError(f"{document.key} is new: the source has changed while it was read; begin again")
            yield SplitDocument(document, int(split))
    if next(splits, None) is not None:
        raise ValueError("documents are gone: the source has changed while it was read; begin again")


def sample_texts(texts: Iterable[str], n_bytes: int, *, seed: int) -> list[str]:
    """Parts of texts, about 8 KiB each, up to so many bytes: those with the smallest hashes, in their order."""
    # A heap of (negative hash, bytes, text): the part with the largest hash is first, so that it leaves first.
    heap: list[tuple[int, int, str]] = []
    total, bound = 0, 1 << 64  # Bytes in the heap, and the hash from which on parts cannot enter it any more.
    for text in texts:
        for part in cut_document(Document("", text), SAMPLE_PART_BYTES):
            # The second half of the digest: the first one decides the split, and they must be independent.
            priority = int.from_bytes(text_digest(part.text, seed)[8:], "big")
            if priority >= bound:
                continue
            size = len(part.text.encode())
            heapq.heappush(heap, (-priority, size, part.text))
            total += size
            while total > n_bytes and len(heap) > 1:
                removed, size, _ = heapq.heappop(heap)
                total, bound = total - size, -removed
    return [text for _, _, text in sorted(heap, reverse=True)]
