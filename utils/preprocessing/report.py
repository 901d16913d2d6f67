"""What a preprocessing run left out or lost, by reason, for its last log line and the manifest."""

from collections.abc import Callable, Iterable
from typing import Any

from dataset_loading.left_out import LeftOut, reason_group
from utils.preprocessing.samples import Outcome


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
