"""Samples on their way through the preprocessing driver (raw, decoded, encoded, written), and their manifest
entries."""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from dataset_loading.cache_writer import sample_key
from dataset_loading.content import CONTENT_FIELDS, DIGEST, present_state, stem_of
from dataset_loading.files import fingerprint
from dataset_loading.tables import captions_of

FEW_SAMPLES = 1000  # Of more, some fall into any usual validation share.
# Numbers of a manifest's entries whose sum over all samples means nothing.
NOT_SUMMED = (
    *("bytes", "copy", "length", "part", "parts", "log_likelihood", "likelihood_ratio", "offset", "duration"),
    "bucket",
    *CONTENT_FIELDS,
)
# Fields of entries that say what a cache holds: always, and where texts shape the tensors.
IDENTITY = ("key", DIGEST, "offset", "duration")
TEXT_IDENTITY = ("caption", "speaker", "language")


@dataclasses.dataclass
class Example:
    """One copy of a raw sample: copy 0 is the plain one, the others are to be changed at random.

    `data` is what `decode` returns, then the tensors that `encode` returns. A copy that `encode_parts` cuts becomes
    several examples, its `n_parts` parts.
    """

    name: str
    copy: int
    data: Any
    caption: str
    key: str
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    part: int = 0
    n_parts: int = 1


@dataclasses.dataclass
class Raw:
    """A raw sample as listed: `media` is `{"path": ..., "bytes": ...}`, see `dataset_loading.sources`.

    `notes` go into the manifest with the caption, such as the speaker, and which part of a recording it is. `place`
    counts the samples of one row, from 0.
    """

    media: dict[str, Any] | None
    caption: str
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    place: int = 0


@dataclasses.dataclass
class Task:
    """A raw sample with the copies still to be written, `{copy: key}`, and the entries of those that are there."""

    number: int  # position in the source, which orders the manifest
    split: str
    name: str
    raw: Raw
    missing: dict[int, str]
    entries: list[dict[str, Any]]
    row: int  # number of the first sample of its row
    outcome: "Outcome | None" = None  # of an earlier run, whose row is not read again


@dataclasses.dataclass
class Outcome:
    """The result of a task: entries of all its copies, or the reason why there are none."""

    number: int
    split: str
    name: str
    entries: list[dict[str, Any]]
    n_written: int = 0  # samples that this run wrote
    has_text: bool = False  # whether the raw sample has one
    content: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the raw file, see `describe_content`
    broken: str = ""  # reason, if the file cannot be read or encoded
    skipped: str = ""  # reason, if an intact sample is left out
    row: int = -1  # number of the first sample of its row


@dataclasses.dataclass
class Prepared:
    """A decoded and encoded task: the outcome so far, and the copies still to be written."""

    outcome: Outcome
    examples: list[Example]


class SkipSampleError(ValueError):
    """Raised by `decode` or `encode` to leave out an intact sample; it is reported but does not count as broken."""


def caption_of(value: Any) -> str:
    """A caption as text; the first of several; nothing is `""`."""
    return captions_of(value)[0]


@contextlib.contextmanager
def named_cell(source: str, name: str, column: str) -> Iterator[None]:
    """Names the data set, the row's file and the column in a ValueError about what a cell holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {name}, column {column!r}: {error}") from error


def notes_of(sample: Raw | Example, n_parts: int) -> dict[str, Any]:
    """Caption and notes of a sample for the manifest. A part has no caption, since it is unknown what it holds."""
    if n_parts == 1:
        return {"caption": sample.caption, **sample.notes}
    return {"caption": "", **{name: note for name, note in sample.notes.items() if name != "captions"}}


def renewed(entry: dict[str, Any], raw: Raw, n_parts: int) -> dict[str, Any]:
    """The entry of a sample that is there, with the notes of now and the times of its file."""
    # Notes that not every sample has: its row may have lost them. The others keep their places.
    notes = notes_of(raw, n_parts)
    former = {name: value for name, value in entry.items() if name in notes or name not in ("captions", "language")}
    return {**former, **notes, **present_state(raw.media)}


class Naming:
    """Splits and keys of the raw samples of a source, by their names in their order.

    Args:
        split: of the source.
        fraction: of the validation split that is held out of it.
        held_out: the name that is held out whatever its hash; `""`: none.
        n_copies: augmented copies of a training sample.
    """

    def __init__(self, split: str, fraction: float, held_out: str, n_copies: int):
        self.split, self.fraction, self.held_out, self.n_copies = split, fraction, held_out, n_copies
        self.seen: Counter[str] = Counter()
        self.firsts: dict[str, str] = {}  # By their stems: a.wav and a.mp3 are the same recording, on one side.

    def assign(self, name: str) -> tuple[str, dict[int, str]]:
        """Split of the next raw sample, and keys of its copies by number; validation has the plain one alone."""
        split, first = self.split, self.firsts.setdefault(stem_of(name), name)
        if (self.held_out and first == self.held_out) or is_validation(first, self.fraction):
            split = "validation"
        n_copies = self.n_copies if split == "train" else 0
        keys = {copy: sample_key(name, self.seen[name], copy) for copy in range(1 + n_copies)}
        self.seen[name] += 1
        return split, keys


def is_validation(name: str, fraction: float) -> bool:
    """Whether a raw file's name falls into the validation share; independent of seed, order and other files."""
    return split_hash(name) < fraction * 2**64


def smallest_name(names: Iterable[str]) -> str:
    """The name that is the first to fall into a validation share as it grows."""
    return min(names, key=split_hash)


def split_hash(name: str) -> int:
    """A number that is uniform in [0, 2**64), from the first 8 bytes of a digest."""
    return int.from_bytes(hashlib.sha256(f"validation {name}".encode()).digest()[:8], "big")


def content_fingerprint(settings: str, entries: dict[str, list[dict[str, Any]]], *, has_texts: bool) -> str:
    """Identifies what a cache holds: its settings, and the raw files of both splits in their order.

    Args:
        settings: fingerprint of the settings.
        entries: by split.
        has_texts: whether captions, speakers and languages shape the tensors.
    """
    names = (*IDENTITY, *(TEXT_IDENTITY if has_texts else ()))
    rows = [[split, *(entry.get(name) for name in names)] for split, rows in entries.items() for entry in rows]
    return fingerprint([settings, rows])


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """The manifest's entries, totals, and lists of samples that were left out."""
    splits = ("train", "validation")
    entries = {
        split: [entry for outcome in outcomes if outcome.split == split for entry in outcome.entries]
        for split in splits
    }
    # Number of samples, and sums of the sizes that `measure` returned, such as seconds.
    totals: dict[str, Any] = {}
    for split in splits:
        totals[split] = {"samples": len(entries[split])}
        for name, value in entries[split][0].items() if entries[split] else ():
            if name not in NOT_SUMMED and isinstance(value, int | float):
                totals[split][name] = round(sum(entry[name] for entry in entries[split]), 3)
    # Raw files that gave no sample, with the reasons.
    left_out = {
        kind: [
            {
                "source": outcome.name,
                "reason": getattr(outcome, kind),
                **({"split": outcome.split} if outcome.split != "train" else {}),
            }
            for outcome in outcomes
            if getattr(outcome, kind)
        ]
        for kind in ("broken", "skipped")
    }
    return {"totals": totals, **left_out, "entries": entries}


def describe_problems(outcomes: Iterable[Outcome]) -> str:
    """The first few raw files that gave no sample, with the reasons."""
    problems = [f"{outcome.name} ({reason})" for outcome in outcomes if (reason := outcome.broken or outcome.skipped)]
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
