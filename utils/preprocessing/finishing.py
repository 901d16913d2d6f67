"""The end of preprocessing: from the outcomes of all raw files to the manifest, and what the user should know.

One process and the merging of shards end here, so that both write the same manifest.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset_loading.cache_writer import remove_others, write_manifest
from dataset_loading.files import MANIFEST
from dataset_loading.left_out import LeftOut, why_empty
from utils.preprocessing.report import describe_lack, describe_left_out
from utils.preprocessing.samples import Outcome, content_fingerprint, summary
from utils.preprocessing.shards import Shard
from utils.preprocessing.updates import describe_changes, report_changes, without_duplicates

logger = logging.getLogger(__name__)


def finish_folder(
    folder: Path,
    header: dict[str, Any],
    outcomes: list[Outcome],
    *,
    shard: Shard,
    total: int,
    keep_duplicates: bool,
    has_texts: bool,
    listings: Sequence[LeftOut],
    lost_text: Callable[[dict[str, Any]], str],
    earlier: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, Any]:
    """Write the manifest of a folder whose samples are written, delete samples that it does not name, and report.

    Args:
        header: the manifest without the samples.
        outcomes: of all raw files, or of those of a shard.
        shard: what the folder holds; training samples may be missing in a shard, and equal files are not looked for.
        total: number of raw files.
        keep_duplicates: whether training samples that equal one of validation stay.
        has_texts: whether texts shape the tensors.
        listings: what the sources left out.
        lost_text: see `describe_left_out`.
        earlier: entries of earlier runs by split and key.
    Returns: the manifest.
    Raises: ValueError: there are no training samples.
    """
    # The manifest, in the order of the source.
    outcomes = sorted(outcomes, key=lambda outcome: outcome.number)
    duplicates: list[dict[str, Any]] = []
    if shard.is_whole and not keep_duplicates:
        outcomes, duplicates = without_duplicates(outcomes, lambda split, key: folder / split / f"{key}.pt")
    manifest = {**header, **summary(outcomes), "duplicates": duplicates}
    if shard.is_whole and not manifest["entries"]["train"]:
        lack = describe_lack(outcomes, len(duplicates), manifest["entries"]["validation"])
        raise ValueError(f"no training samples among {total} raw ones; {lack}")
    if not shard.is_whole:
        outcomes_of_shard = {"total": total, "has_texts": has_texts, "listings": listings, "lost_text": lost_text}
        manifest["shard"] = shard.record(outcomes, **outcomes_of_shard)
    left_out = describe_left_out(listings, outcomes, lost_text)
    manifest = identified({**manifest, "left_out": left_out.as_dict()}, has_texts=has_texts)
    manifest = write_manifest(folder, manifest)
    remove_others(folder, manifest)

    # What the user should know.
    if shard.is_whole and not manifest["entries"]["validation"]:
        if any(outcome.split == "validation" for outcome in outcomes):
            logger.warning("no validation sample is left: %s", why_empty(manifest, "validation"))
        elif header["arguments"].get("validation_fraction"):
            logger.warning("no sample is held out: a single file, or a --validation_fraction that is too small")
    report_changes(folder, describe_changes(earlier, manifest), manifest)
    if left_out:
        logger.warning("left out or lost: %s; see %s", left_out, folder / MANIFEST)
    return manifest


def identified(manifest: dict[str, Any], *, has_texts: bool) -> dict[str, Any]:
    """The manifest with the fingerprint of its settings and its content, in place of that of its settings."""
    settings, entries = manifest["fingerprint"], manifest["entries"]
    identity = content_fingerprint(settings, entries, has_texts=has_texts)
    return {**manifest, "fingerprint": identity, "settings_fingerprint": settings}


def report_totals(
    folder: Path, manifest: Mapping[str, Any], *, n_written: int, started: float, n_found: int = 0
) -> None:
    """Log how many samples were written, in how many seconds, and what the folder holds.

    Args:
        started: the time of `time.perf_counter` at the start.
        n_found: samples that an earlier call wrote.
    """
    counts = f"{n_found} samples there already, {n_written}" if n_found else f"{n_written} samples"
    seconds, totals = time.perf_counter() - started, json.dumps(manifest["totals"])
    logger.info("%s: %s written in %.1f s, %s", folder, counts, seconds, totals)
