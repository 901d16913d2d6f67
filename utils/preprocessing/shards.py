"""Preprocessing by several processes or machines: each writes a shard, `merging.py` joins them.

A shard is a folder like a cache, with the samples of every n-th raw file, or of every n-th batch of them. Its manifest
holds `shard`, which says what the whole needs: the outcome of each raw file of this shard, and a digest of the whole
listing. Splits and names of samples are those of the whole, since every shard lists all raw files; equal files of both
splits are looked for when the shards are joined.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from dataset_loading.content import file_state, is_local
from dataset_loading.left_out import LeftOut
from dataset_loading.sources import has_file
from utils.options import declared_fields
from utils.preprocessing.arguments import HOW_WRITTEN, read_shard
from utils.preprocessing.samples import Outcome, Raw


@dataclasses.dataclass
class Shard:
    """The `index`-th of `count` shards, 1 to `count`; 0 of 0 is the whole, which no shard is.

    Attributes: settings: fingerprint of the settings, without where the raw files are on this machine.
    """

    index: int = 0
    count: int = 0
    settings: str = ""

    def __post_init__(self):
        self.listing = b""  # Digest of all raw samples so far.
        self.is_of_files = False  # Whether raw samples are divided by their files.

    @classmethod
    def parse(cls, text: str) -> Self:
        """`i/n` as `--shard` has it; `""` is the whole. Raises: ValueError: names the value and the form."""
        return cls(*read_shard(text))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_whole(self) -> bool:
        """Whether this is no shard."""
        return not self.count

    def folder_of(self, output: Path) -> Path:
        """The folder of this shard of a cache."""
        name = f"{output.name}.shard-{self.index}-of-{self.count}"
        return output if self.is_whole else output.with_name(name)

    def takes(self, block: int, split: str, name: str, raw: Raw) -> bool:
        """Whether a raw sample is of this shard; to be asked for all of them in their order.

        Args:
            block: of the raw sample in the whole, see `Preprocess.block_of`.
            split: of the whole.
        """
        if self.is_whole:
            return True
        row = [split, name, size_of(raw.media), raw.caption, raw.notes]
        self.listing = hashlib.sha256(self.listing + json.dumps(row, sort_keys=True).encode()).digest()
        return block % self.count == self.index - 1

    def add_files(self, listing: str) -> None:
        """Divide a source by its files: each shard reads its own alone. Their listing is that of the raw samples."""
        self.listing, self.is_of_files = hashlib.sha256(self.listing + listing.encode()).digest(), True

    def n_samples(self, total: int) -> int:
        """About how many of all raw samples are of this shard."""
        return -(-total // max(self.count, 1))

    def record(
        self,
        outcomes: Iterable[Outcome],
        *,
        total: int,
        has_texts: bool,
        listings: Iterable[LeftOut],
        lost_text: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """What the manifest of a shard holds for the joining.

        Args: as of `finish_folder`.
        """
        rows = [
            {
                **{name: getattr(outcome, name) for name in ("number", "row", "split", "name", "has_text")},
                **{name: getattr(outcome, name) for name in ("broken", "skipped") if getattr(outcome, name)},
                "entries": len(outcome.entries),
                "lost_text": lost_text(outcome.entries[0]) if outcome.entries and outcome.has_text else "",
            }
            for outcome in outcomes
            if outcome.number >= 0  # Others are in the listings.
        ]
        return {
            "index": self.index,
            "count": self.count,
            "settings": self.settings,
            "total": total,
            **({"is_of_files": True} if self.is_of_files else {}),
            "listing": self.listing.hex(),
            "has_texts": has_texts,
            "listings": [listing.as_dict() for listing in listings],
            "outcomes": rows,
        }


def size_of(media: Mapping[str, Any] | None) -> Any:
    """What a listing tells of the content of a raw sample without reading it: its size, or its digest."""
    if not has_file(media):
        return None
    if "digest" in media:
        return media["digest"]
    if media.get("bytes") is not None:
        return len(media["bytes"])
    try:
        return file_state(media)["source_bytes"] if is_local(media) else None
    except OSError:  # It counts as broken where it is read.
        return None


def arguments_of(args: Any) -> dict[str, Any]:
    """The flags that a manifest holds."""
    return {field.name: getattr(args, field.name) for field in declared_fields(args) if field.name not in HOW_WRITTEN}
