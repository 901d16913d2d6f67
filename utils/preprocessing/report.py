"""What a preprocessing run left out or lost, by reason, for its last log line and the manifest."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from dataset_loading.left_out import LeftOut, reason_group
from dataset_loading.sources import Source
from dataset_loading.splits import SPLIT_NAMES
from utils.preprocessing.samples import Outcome, describe_problems

logger = logging.getLogger(__name__)


def report_unread_validation(source: Source, args: Any) -> None:
    """Warn where the dataset has a split for validation that no flag names, so that it is not read."""
    names = [name for name in source.splits if SPLIT_NAMES.get(name.lower()) == "validation"]
    if names and args.dataset_split not in names:
        logger.warning(
            "%s has a split %r, which is not read; validate on it with --validation_dataset %s --validation_split %s",
            *(args.dataset_name, names[0], args.dataset_name, names[0]),
        )


def describe_lack(outcomes: list[Outcome], n_duplicates: int, validation: list[Any]) -> str:
    """Why no training sample is left, and what to do."""
    reasons = [f"{n_duplicates} equal files of the validation split (see --keep_duplicates)"] * bool(n_duplicates)
    if validation:
        reasons.append(f"{len(validation)} are held out; give more files, or a smaller --validation_fraction")
    return "; ".join([*reasons, *filter(None, [describe_problems(outcomes)])])


def unreadable(left_out: LeftOut) -> list[Outcome]:
    """What a listing could not read, as outcomes of broken files."""
    return [Outcome(-1, "train", name, [], broken=f"OSError: {reason}") for reason, name in left_out.unreadable()]


def describe_left_out(
    listings: Iterable[LeftOut], outcomes: Iterable[Outcome], lost_text: Callable[[dict[str, Any]], str]
) -> LeftOut:
    """Everything that gave no sample, and texts that were lost on the way.

    Args:
        listings: what the sources left out.
        outcomes: of all raw samples.
        lost_text: what was lost of the text of a sample that was written, by its entry; `""` for nothing.
    """
    left_out, n_texts, empty = LeftOut(), 0, []
    for listing in listings:
        left_out.merge(listing)
    for outcome in outcomes:
        if outcome.broken and outcome.number >= 0:  # Others are in the listings.
            left_out.add(f"broken: {reason_group(outcome.broken.partition(': ')[2])}", outcome.name)
        elif outcome.skipped:
            left_out.add(reason_group(outcome.skipped), outcome.name)
        if outcome.has_text and any(entry.get("parts", 1) > 1 for entry in outcome.entries):
            left_out.add("transcript lost, as --segment_seconds cut the clip", outcome.name)
        n_texts += outcome.has_text
        for entry in outcome.entries[:1]:
            if not outcome.has_text:
                empty.append(outcome.name)
            elif reason := lost_text(entry):
                left_out.add(reason, outcome.name)
    # Sets without any text are meant to have none.
    if n_texts:
        left_out.update("without a text, though others have one", empty)
    return left_out
