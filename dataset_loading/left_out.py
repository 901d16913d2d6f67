"""What is left out and why: counted by reason, with the first names, for one closing log line and the manifest."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dataset_loading.tables import TABLE_SUFFIXES
from dataset_loading.walking import LinkedFolders, path_below

NAMES = 20  # Names that are kept of each reason.
# Reasons that are errors of reading, and count for --max_broken_fraction.
UNREADABLE = ("folder cannot be read", "link leads nowhere", "tar is damaged")
# Files that describe a dataset or belong to a file system, and are never samples.
DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e|copying|citation|changelog|dataset_infos?|checksums?|md5sums?|sha256sums?)\b.*"
    r"|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)


class LeftOut:
    """Counts and names of what is left out, by reason."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, n: int = 1) -> None:
        """Count `n` of a reason; the name is kept if it is among the first."""
        self.counts[reason] = self.counts.get(reason, 0) + n
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES:
            names.append(name)

    def clear(self) -> None:
        """Count from zero again."""
        self.counts.clear()
        self.names.clear()

    def update(self, reason: str, names: Iterable[str]) -> None:
        """Count several of one reason."""
        for name in names:
            self.add(reason, name)

    def merge(self, other: "LeftOut") -> None:
        """Count what another one has."""
        for reason, count in other.counts.items():
            names = other.names[reason]
            for name in names:
                self.add(reason, name)
            self.counts[reason] += count - len(names)

    def unreadable(self) -> list[tuple[str, str]]:
        """What could not be read, as (reason, name); beyond the first names the last one stands for the others."""
        pairs = []
        for reason, names in self.names.items():
            if reason.startswith(UNREADABLE):
                others = [f"{names[-1]} and others"] * (self.counts[reason] - len(names))
                pairs += [(reason, name) for name in [*names, *others]]
        return pairs

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """For a manifest: `{reason: {"count": ..., "names": [...]}}`, the most frequent reason first."""
        reasons = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        return {reason: {"count": self.counts[reason], "names": self.names[reason]} for reason in reasons}

    @classmethod
    def from_dict(cls, groups: Mapping[str, Mapping[str, Any]]) -> "LeftOut":
        """What `as_dict` returned."""
        left_out = cls()
        for reason, group in groups.items():
            left_out.counts[reason], left_out.names[reason] = group["count"], list(group["names"])
        return left_out

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line: counts, reasons and the first name of each."""
        groups = (f"{group['count']} {reason} ({group['names'][0]})" for reason, group in self.as_dict().items())
        return "; ".join(groups)


def survey_folder(
    folder: Path, *, used: Collection[Path], suffixes: Collection[str], readable: Collection[str] = ()
) -> LeftOut:
    """Files below a folder that are no samples, by reason: another ending, links that lead nowhere, folders that
    cannot be read, files of the kind that no sample was made of. Hidden files and descriptions do not count.

    Args:
        used: files that samples, captions and tables were read from.
        suffixes: endings of the kind.
        readable: further endings that are read, of which a link that leads nowhere is a loss.
    """
    left_out, links = LeftOut(), LinkedFolders(os.path.realpath(folder))
    used_names = {os.path.normpath(file) for file in used}

    def report(error: OSError) -> None:
        left_out.add(f"folder cannot be read: {error.strerror}", str(error.filename))

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=report):
        paths = {name: os.path.join(parent, name) for name in folders if not name.startswith((".", "__MACOSX"))}
        folders[:] = sorted(name for name, path in paths.items() if not os.path.islink(path) or links.add(path))
        for name in sorted(files):
            file = os.path.join(parent, name)
            if name.startswith(".") or DESCRIPTIONS.fullmatch(name) or os.path.normpath(file) in used_names:
                continue
            place = path_below(file, folder)
            suffix, is_dangling = os.path.splitext(name)[1].lower(), not os.path.exists(file)
            if is_dangling and name.lower().endswith((*suffixes, *readable)):
                left_out.add("link leads nowhere", place)
            elif not is_dangling and not os.path.isfile(file):
                left_out.add("pipe, socket or device", place)
            elif os.path.splitext(name)[0].lower() == "metadata" and suffix in TABLE_SUFFIXES:
                left_out.add("metadata that is not read", place)
            elif suffix in suffixes:
                left_out.add("no row of the metadata names it", place)
            else:
                left_out.add(f"ending {suffix or 'missing'} is not read", place)
    return left_out


def why_empty(manifest: Mapping[str, Any], split: str) -> str:
    """Why a split of a cache has no samples, and what gives it some.

    Args: manifest: of the cache; those of earlier versions do not tell what was left out of which split.
    """
    rows = [row for kind in ("skipped", "broken") for row in manifest.get(kind, []) if row.get("split") == split]
    if not rows:
        return f"a {split} split comes from --validation_dataset, or from --validation_fraction of several raw files"
    named = "; ".join(f"{row['source']} ({row['reason']})" for row in rows[:5])
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    cache = manifest.get("arguments", {}).get("audio_cache")
    whose = f" of the audio cache {cache}, whose split is kept" if cache else ""
    return (
        f"none of the {len(rows)} held-out samples can be used: {named}{more}. Hold out others with a larger "
        f"--validation_fraction or a --validation_dataset{whose}, in another --output_dir; the same command "
        "leaves out the same"
    )


def reason_group(reason: str) -> str:
    """The kind of a reason, without what is of one sample: what stands before a colon, numbers replaced by `#`."""
    return re.sub(r"\d+(\.\d+)?", "#", reason.partition(":")[0])
