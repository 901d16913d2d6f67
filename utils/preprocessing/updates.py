"""What a run of preprocessing changes of a cache, and training samples that equal some of the validation split."""

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset_loading.content import DIGEST
from dataset_loading.files import MANIFEST
from utils.preprocessing.samples import Outcome

logger = logging.getLogger(__name__)

Entry = Mapping[str, Any]


def describe_changes(earlier: Mapping[tuple[str, str], Entry], manifest: Mapping[str, Any]) -> str:
    """Raw files that have changed or are gone since an earlier run, in words; "" for none. Added ones do not count.

    Args:
        earlier: entries of the earlier run by split and key.
        manifest: of this run.
    """
    rows = [*manifest["entries"].items(), ("train", manifest["duplicates"])]
    present = {(split, entry["key"]): entry for split, entries in rows for entry in entries}
    groups: dict[str, dict[str, None]] = {"changed": {}, "gone": {}, "noted without a digest": {}}
    for place, entry in earlier.items():
        source, now = entry.get("source", place[1]), present.get(place)
        if now is None:
            groups["gone"][source] = None
        elif DIGEST not in entry:
            groups["noted without a digest"][source] = None
        elif entry[DIGEST] != now[DIGEST]:
            groups["changed"][source] = None
    texts = [f"raw files {kind}: {len(names)} ({first(list(names))})" for kind, names in groups.items() if names]
    return ", ".join(texts)


def report_changes(folder: Path, changes: str, manifest: Mapping[str, Any]) -> None:
    """Log what has become of raw files, and which samples are left out as duplicates.

    Args: changes: see `describe_changes`.
    """
    if changes:
        logger.warning(
            "%s was brought up to date, %s; its fingerprint is %s now: what was made from the former content is "
            "refused or warned about",
            *(folder, changes, manifest["fingerprint"]),
        )
    if duplicates := manifest["duplicates"]:
        logger.warning(
            "%d training samples equal files of the validation split and are kept out of training, such as %s (%s), "
            "see %s; --keep_duplicates trains on them",
            *(len(duplicates), duplicates[0]["source"], duplicates[0]["same_as"], folder / MANIFEST),
        )


def first(names: Sequence[str], n: int = 3) -> str:
    """The first few names."""
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def without_duplicates(
    outcomes: Sequence[Outcome], path_of: Callable[[str, str], Path]
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """Training samples without those that were made from the same bytes, or have the same tensors, as one of the
    validation split.

    Args:
        outcomes: of all raw files.
        path_of: file of a split and key.
    Returns: the outcomes, and the entries that are left out, with the raw file that each equals as `same_as`.
    """
    held_out = [entry for outcome in outcomes if outcome.split == "validation" for entry in outcome.entries]
    by_digest: dict[str, list[Entry]] = defaultdict(list)
    for entry in held_out:
        by_digest[entry[DIGEST]].append(entry)
    # Samples whose tensors may be equal: those with the same size and CRC.
    by_crc: dict[Any, list[Entry]] = defaultdict(list)
    for entry in held_out:
        by_crc[entry.get("bytes"), entry.get("crc32")].append(entry)

    def same_as(outcome: Outcome) -> str:
        for entry in outcome.entries if outcome.split == "train" else ():
            if other := next((other for other in by_digest.get(entry[DIGEST], ()) if overlap(entry, other)), None):
                return other["source"]
            content = None
            for other in by_crc.get((entry.get("bytes"), entry.get("crc32")), ()) if is_whole(entry) else ():
                content = content or path_of("train", entry["key"]).read_bytes()
                if content == path_of("validation", other["key"]).read_bytes():
                    return other["source"]
        return ""

    distinct, duplicates = [], []
    for outcome in outcomes:
        if source := same_as(outcome):
            duplicates += [{**entry, "same_as": source} for entry in outcome.entries]
            outcome = dataclasses.replace(outcome, entries=[])
        distinct.append(outcome)
    return distinct, duplicates


def overlap(first: Entry, second: Entry) -> bool:
    """Whether two samples of the same recording have a moment in common."""
    (start, end), (other_start, other_end) = (
        (entry.get("offset", 0.0), entry.get("offset", 0.0) + entry.get("duration", math.inf))
        for entry in (first, second)
    )
    return start < other_end and other_start < end


def is_whole(entry: Entry) -> bool:
    """Whether a sample is all of a raw file, unchanged."""
    return not entry["copy"] and entry.get("parts", 1) == 1
