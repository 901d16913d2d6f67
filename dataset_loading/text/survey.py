"""Which documents of a source are used and for what: the first reading of `prepare_text`, before any is encoded."""

import array
import dataclasses
import hashlib
import heapq
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dataset_loading.text.sources import EMPTY, Document, TextSource, cut_document

logger = logging.getLogger(__name__)

FEWEST_DOCUMENTS = 10  # In the validation split, else long documents are cut.
SAMPLE_PART_BYTES = 8192
REPORTED = 1000  # Broken documents that are listed.


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
    """What a first reading finds, before anything is encoded.

    Attributes:
        is_cut: whether long documents are cut.
        n_read: documents or parts of them, those that are left out included.
        n_empty: those that are blank.
        n_broken: those that cannot be read, or are no text.
        broken: the first thousand of these, with the reason.
        n_bytes: UTF-8 bytes of the documents that are kept.
        duplicates: numbers of the documents that equal an earlier one.
        splits: 0 (train) or 1 (validation) of every document that is kept, in order.
    """

    is_cut: bool
    n_read: int = 0
    n_empty: int = 0
    n_broken: int = 0
    n_bytes: int = 0
    broken: list[dict[str, str]] = dataclasses.field(default_factory=list)
    duplicates: set[int] = dataclasses.field(default_factory=set)
    splits: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))


def read_documents(
    sources: list[tuple[int, TextSource]], rules: Rules, is_cut: bool
) -> Iterator[tuple[int, Document]]:
    """Yields (0 or the split that the source is for, document), broken ones included."""
    for forced, source in sources:
        for one in itertools.islice(source.read(), None if rules.limit < 0 else rules.limit):
            for part in cut_document(one, rules.document_bytes) if is_cut and not one.problem else (one,):
                yield forced, part


def survey_documents(sources: list[tuple[int, TextSource]], rules: Rules) -> Survey:
    """Read everything once: what is broken, equal, to be cut, and which documents validate.

    Raises: ValueError: too many documents are broken, or none is left for training, or none to be held out.
    """
    survey = survey_once(sources, rules, is_cut=False)
    check_broken(survey, rules)
    wants_split = rules.validation_fraction > 0 and len(sources) == 1
    if wants_split and len(survey.splits) * rules.validation_fraction < FEWEST_DOCUMENTS:
        cut = survey_once(sources, rules, is_cut=True)
        survey = cut if len(cut.splits) > len(survey.splits) else survey
    if not (survey.splits == 0).any():
        raise ValueError(
            f"{sources[-1][1].identity} gives no training document: {survey.n_read} read, {survey.n_empty} "
            f"empty, {survey.n_broken} broken, {len(survey.duplicates)} duplicates; choose another source"
        )
    if len(sources) > 1 and not survey.splits.any():
        raise ValueError(
            f"{sources[0][1].identity} gives no validation document; add text or give another --validation_dataset"
        )
    if wants_split and not survey.splits.any():
        raise ValueError(
            f"too little text: {survey.n_bytes} bytes in 1 document, of which no part can be held out "
            f"(document_bytes={rules.document_bytes}); add text or give --validation_dataset"
        )
    if survey.n_empty:
        logger.info("%d of %d documents are empty and left out", survey.n_empty, survey.n_read)
    return survey


def survey_once(sources: list[tuple[int, TextSource]], rules: Rules, *, is_cut: bool) -> Survey:
    """One reading of everything."""
    survey, seen, hashes, splits = Survey(is_cut), set(), array.array("Q"), bytearray()
    for number, (split, one) in enumerate(read_documents(sources, rules, is_cut)):
        survey.n_read = number + 1
        if one.problem == EMPTY:
            survey.n_empty += 1
            continue
        if one.problem:
            survey.n_broken += 1
            if survey.n_broken <= REPORTED:
                survey.broken.append({"source": one.key, "reason": one.problem})
            continue
        digest = text_digest(one.text, rules.seed)
        if not rules.keep_duplicates and digest in seen:
            survey.duplicates.add(number)
            continue
        seen.add(digest)
        hashes.append(int.from_bytes(digest[:8], "big"))
        splits.append(split)
        survey.n_bytes += len(one.text.encode())
    survey.splits = np.frombuffer(splits, dtype=np.uint8)
    if len(sources) == 1:
        survey.splits = smallest(np.frombuffer(hashes, dtype=np.uint64), rules.validation_fraction).astype(np.uint8)
    return survey


def text_digest(text: str, seed: int) -> bytes:
    """16 bytes that depend on seed and text: the first half decides the split, the second BPE's sample."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()


def smallest(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which of N hashes are the smallest fraction of them, (N,) bool; at least one and not all, where that can be."""
    if fraction == 0 or len(hashes) < 2:
        return np.zeros(len(hashes), dtype=bool)
    n = min(max(1, round(fraction * len(hashes))), len(hashes) - 1)
    return hashes <= np.partition(hashes, n - 1)[n - 1]


def check_broken(survey: Survey, rules: Rules) -> None:
    """Raises: ValueError: more of the documents that are not empty are broken than allowed; names the first five."""
    n_read = survey.n_read - survey.n_empty
    if survey.n_broken > rules.max_broken_fraction * n_read:
        shown = "; ".join(f"{one['source']} ({one['reason']})" for one in survey.broken[:5])
        more = f"; and {survey.n_broken - 5} more" if survey.n_broken > 5 else ""
        raise ValueError(
            f"{survey.n_broken} of {n_read} documents have no text, more than --max_broken_fraction="
            f"{rules.max_broken_fraction}: {shown}{more}. Repair or remove them, or allow more"
        )


def describe_cut(survey: Survey, rules: Rules) -> dict[str, Any] | None:
    """What the manifest says where long documents were cut."""
    if not survey.is_cut:
        return None
    return {
        "document_bytes": rules.document_bytes,
        "documents": len(survey.splits),
        "reason": f"whole documents would have given fewer than {FEWEST_DOCUMENTS} for validation, so that long ones "
        "were cut at paragraphs; parts of the same one are in both splits",
    }


def kept(sources: list[tuple[int, TextSource]], survey: Survey, rules: Rules) -> Iterator[tuple[Document, int]]:
    """Yields (document, split) of what the survey kept, reading everything again.

    Raises: ValueError: the source has changed since.
    """
    splits = iter(survey.splits)
    for number, (_, one) in enumerate(read_documents(sources, rules, survey.is_cut)):
        if not one.problem and number not in survey.duplicates:
            split = next(splits, None)
            if split is None:
                raise ValueError(f"{one.key} is new: the source has changed while it was read; begin again")
            yield one, int(split)
    if next(splits, None) is not None:
        raise ValueError("documents are gone: the source has changed while it was read; begin again")


def sample_texts(texts: Iterable[str], n_bytes: int, seed: int) -> list[str]:
    """Parts of texts, about 8 KiB each, up to so many bytes: those with the smallest hashes, in their order."""
    heap: list[tuple[int, int, str]] = []  # The part with the largest hash is in front.
    total, bound = 0, 1 << 64
    for text in texts:
        for part in cut_document(Document("", text), SAMPLE_PART_BYTES):
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
