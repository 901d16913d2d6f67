"""Which split a file belongs to, by the names of its folders and by its own, as the `datasets` package does.

    train/a.txt  val2017/b.png  en/test/c.wav                       a folder named like a split, at any depth
    train.txt  valid.txt  train-00000-of-00002.parquet              a table or .txt that is named so
    wiki.train.txt  dev-clean/1.flac  en_test_2.csv  test_17.png    where all files name a split, one of them training

Names of code and documents (`train.py`, `evaluation.md`) say nothing; their folders do.
Names that merely contain a split's, such as `test-drive.png`, say nothing where other files are named otherwise.
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
HELD_OUT = ("validation", "test")
KEYWORD = "|".join(sorted(SPLIT_NAMES, key=len, reverse=True))
ALONE = re.compile(rf"({KEYWORD})(?:[-._ \d]|of)*", re.IGNORECASE)  # But for numbers of shards, or a year.
ENDINGS = re.compile(r"(\.(txt|md|rst|py|jsonl?|csv|tsv|parquet))?\.(gz|bz2|xz|zst|zip)$|\.[^.]*$", re.IGNORECASE)
DOCUMENTS = re.compile(r"\.(md|rst|py)(\.(gz|bz2|xz|zst|zip))?$", re.IGNORECASE)  # Their own names say no split.
AMONG = re.compile(rf"(?:.*[-._ \d])?({KEYWORD})(?:[-._ \d].*)?", re.IGNORECASE)


@functools.lru_cache(maxsize=65536)
def split_of_name(name: str) -> str:
    """The split that a name without an ending says, numbers aside: `train-00000-of-00002` is train; "" for others."""
    match = ALONE.fullmatch(name)
    return SPLIT_NAMES[match[1].lower()] if match else ""


@functools.lru_cache(maxsize=65536)
def split_in_name(name: str) -> str:
    """The split whose name is one of the words of a name: `wiki.train` is train; "" for others."""
    match = AMONG.fullmatch(name)
    return SPLIT_NAMES[match[1].lower()] if match else ""


def split_of_folders(path: str) -> str:
    """The split that the folders of a path are named like; "" for none. What is held out inside training is so."""
    splits = [split_of_name(folder) for folder in path.split("/")[:-1]]
    return next((split for split in splits if split in HELD_OUT), "train" if "train" in splits else "")


def group_by_split(paths: Sequence[str], *, are_media: bool) -> dict[str, list[int]]:
    """Which files belong to which split.

    Files that no name assigns are training files where no other ones are, and left out with a warning otherwise. Where
    they outnumber those that their own names assign, the names tell nothing.

    Args:
        paths: relative to the folder of the dataset, with slashes.
        are_media: images or recordings, whose own names count only where all of them name a split.
    Returns: indices of `paths` by split; {} where the names tell no splits apart.
    """
    names = [path.rpartition("/")[2] for path in paths]
    stems = ["" if not are_media and DOCUMENTS.search(name) else ENDINGS.sub("", name) for name in names]
    splits = [split_of_folders(path) or ("" if are_media else split_of_name(stem)) for path, stem in zip(paths, stems)]
    # Words of names, where all of them name a split, and some are for training.
    words = []
    for path, stem, split in zip(paths, stems, splits):
        words.append(split or next(filter(None, map(split_in_name, (*path.split("/")[:-1], stem))), ""))
        if not words[-1]:
            break
    if words and words[-1] and "train" in words:
        splits = words
    # Files of one held-out split alone are not mixed with others.
    if not set(splits) & set(HELD_OUT) or len(set(splits)) == 1:
        return {}
    if "train" in splits and 2 * splits.count("") > len(splits) and not any(map(split_of_folders, paths)):
        named = next(path for path, split in zip(paths, splits) if split)
        logger.warning("all %d files are taken together: few name a split, such as %s", len(paths), named)
        return {}
    if "train" not in splits:
        splits = [split or "train" for split in splits]
    groups: dict[str, list[int]] = {}
    for index, split in enumerate(splits):
        groups.setdefault(split, []).append(index)
    if rest := groups.pop("", []):
        logger.warning(
            "%d files are left out, since others name a split (%s) and they do not, such as %s",
            *(len(rest), ", ".join(groups), paths[rest[0]]),
        )
    return groups


def group_by_column(rows: Sequence[Mapping[str, Any]], place: str) -> dict[str, list[int]]:
    """Which rows of a table belong to which split, as its column `split` says; rows where it is empty are training.

    Returns: indices of `rows` by split; {} where there is no such column, or, with a warning, where one is unknown.
    """
    values = [str(row.get("split") or "train").strip().lower() for row in rows]
    if set(values) <= {"train"}:
        return {}
    if unknown := next((value for value in values if value not in SPLIT_NAMES), ""):
        logger.warning(
            "%s: all %d rows are taken together, since the column 'split' has %r; known are %s",
            *(place, len(rows), unknown, ", ".join(SPLIT_NAMES)),
        )
        return {}
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(SPLIT_NAMES[value], []).append(index)
    return groups


def held_out_folders(root: Path) -> dict[str, Path]:
    """Folders in a folder of training files that are named like another split, by split; {} for an index file."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir()] if root.is_dir() else []
    names = {split_of_name(child.name): child for child in reversed(children)}
    return {split: child for split, child in names.items() if split in HELD_OUT}


def is_held_out(path: str) -> bool:
    """Whether a path below a folder of training files lies in a folder that is named like another split."""
    return split_of_folders(path) in HELD_OUT


def choose_split(name: str, split: str, known: list[str]) -> str:
    """The named split, or the only one where none is named.

    Args: known: names of the splits that there are.

    Raises: ValueError: the split does not exist, or none is named and there are several.
    """
    if split in known:
        return split
    if not split and len(known) == 1:
        return known[0]
    problem = f"has no split {split!r}" if split else "has several splits, and none is named"
    raise ValueError(f"{name} {problem}; there is: {', '.join(known)}")
