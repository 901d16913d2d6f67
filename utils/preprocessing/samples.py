"""Samples on their way through the preprocessing driver: raw, decoded, encoded, written; and what the manifest says
of them."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any


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
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    part: int = 0
    n_parts: int = 1


@dataclasses.dataclass
class Raw:
    """A raw sample as listed: `media` is `{"path": ..., "bytes": ...}`, see `dataset_loading.sources`.

    `notes` go into the manifest beside the caption, such as the speaker.
    """

    media: dict[str, Any] | None
    caption: str
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Task:
    """A raw sample with the copies still to be written, `{copy: key}`, and the entries of those that are there."""

    number: int
    split: str
    name: str
    raw: Raw
    missing: dict[int, str]
    entries: list[dict[str, Any]]


@dataclasses.dataclass
class Outcome:
    """What became of a task: entries of all its copies, or the reason why there are none."""

    number: int
    split: str
    name: str
    entries: list[dict[str, Any]]
    n_written: int = 0
    broken: str = ""
    skipped: str = ""


@dataclasses.dataclass
class Prepared:
    """A decoded and encoded task: the outcome so far, and the copies still to be written."""

    outcome: Outcome
    examples: list[Example]


class SkipSampleError(ValueError):
    """Raised by `decode` or `encode` to leave out a sound sample; it is reported but does not count as broken."""


def caption_of(value: Any) -> str:
    """A caption as text; the first of several; nothing is `""`."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return "" if value is None else str(value)


def notes_of(sample: Raw | Example, n_parts: int) -> dict[str, str]:
    """What the manifest says of a sample's meaning. A caption is of the whole; nobody knows which part holds what."""
    return {"caption": sample.caption if n_parts == 1 else "", **sample.notes}


def is_validation(name: str, fraction: float) -> bool:
    """Whether a raw file's name falls into the validation share; independent of seed, order and other files."""
    digest = hashlib.sha256(f"validation {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the manifest says about the samples."""
    splits = ("train", "validation")
    entries = {split: [entry for one in outcomes if one.split == split for entry in one.entries] for split in splits}
    totals: dict[str, Any] = {}
    for split in splits:
        totals[split] = {"samples": len(entries[split])}
        for name, value in entries[split][0].items() if entries[split] else ():
            if name not in ("copy", "length", "part", "parts") and isinstance(value, int | float):
                totals[split][name] = round(sum(entry[name] for entry in entries[split]), 3)
    left_out = {
        kind: [{"source": one.name, "reason": getattr(one, kind)} for one in outcomes if getattr(one, kind)]
        for kind in ("broken", "skipped")
    }
    return {"totals": totals, **left_out, "entries": entries}


def describe_problems(outcomes: Iterable[Outcome]) -> str:
    """The first few raw files that gave no sample, with the reasons."""
    found = [f"{one.name} ({one.broken or one.skipped})" for one in outcomes if one.broken or one.skipped]
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
