"""Shards of a cache, joined, compared with what one process writes."""

import shutil
from collections.abc import Callable
from pathlib import Path

from utils.preprocessing.driver import Preprocess


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_shards(run: Callable[..., dict], stage: type[Preprocess], out: Path, n: int) -> list[Path]:
    """Run a stage as a whole and in `n` shards, join these, and compare every byte.

    Args: run: takes the flags that are added.
    Returns: the folders of the shards.
    """
    fingerprint, expected = run()["fingerprint"], contents(out)
    shutil.rmtree(out)
    shards = []
    for i in range(1, n + 1):
        run("--shard", f"{i}/{n}")
        shards.append(out.with_name(f"{out.name}.shard-{i}-of-{n}"))
    joined = stage.main(["--merge", *map(str, reversed(shards)), "--output_dir", str(out)])
    assert joined["fingerprint"] == fingerprint
    found = contents(out)
    different = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    assert not different, different
    return shards
