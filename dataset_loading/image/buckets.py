"""Aspect-ratio buckets: images of one cache that have one of a few sizes, all of about the same area, so that photos
are not cut to squares (NovelAI 2022, "Aspect Ratio Bucketing"; SDXL, arXiv 2307.01952, section 2.3).

A size is (width, height) in pixels, both multiples of one number, as the strides of VAE and UNet need. An image goes
to the size of the nearest ratio.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from dataset_loading.cached import CachedDataset

Size = tuple[int, int]  # width, height
BUCKET = "bucket"  # The field of a manifest's entries with the number of the sample's size.
MAX_RATIO = 4.0


def parse_ratio(text: str, flag: str) -> float:
    """Width over height of a ratio such as `3:2`. Raises: ValueError: names the flag, the value and the form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text)
    ratio = float(match[1]) / float(match[2]) if match and float(match[2]) else 0.0
    if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        raise ValueError(
            f"--{flag} {text!r} must be width:height between 1:{MAX_RATIO:g} and {MAX_RATIO:g}:1, such as 3:2"
        )
    return ratio


def size_of(ratio: float, image_size: int, multiple: int) -> Size:
    """The size of a ratio whose area is about `image_size` squared, its sides rounded to multiples."""
    width, height = image_size * math.sqrt(ratio), image_size / math.sqrt(ratio)
    return round_to(width, multiple), round_to(height, multiple)


def round_to(side: float, multiple: int) -> int:
    """The nearest multiple, at least one."""
    return max(1, round(side / multiple)) * multiple


def bucket_sizes(ratios: Sequence[str], image_size: int, multiple: int) -> list[Size]:
    """The sizes of ratios such as `["1:1", "3:2"]`, in their order.

    Raises: ValueError: a ratio is malformed, or two of them have the same size; names both and what to do.
    """
    sizes: dict[Size, str] = {}
    for text in ratios:
        size = size_of(parse_ratio(text, "aspect_buckets"), image_size, multiple)
        if size in sizes:
            raise ValueError(
                f"--aspect_buckets {sizes[size]} and {text} are both {size[0]}x{size[1]} pixels at --image_size "
                f"{image_size} in steps of {multiple}; leave one out, or lower --bucket_multiple"
            )
        sizes[size] = text
    return list(sizes)


def nearest_size(size: tuple[float, float], sizes: Sequence[Size]) -> int:
    """The number of the size whose ratio is the nearest, by the ratio of ratios; the first of equal ones."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][0] / sizes[number][1]) - ratio))


def sizes_of(settings: Mapping[str, Any]) -> list[Size]:
    """The sizes of a cache's images, from the settings in its manifest; one square where it has no buckets."""
    buckets = settings.get("aspect_buckets") or [[settings["image_size"]] * 2]
    return [(width, height) for width, height in buckets]


def describe_sizes(sizes: Sequence[Size]) -> str:
    """`96x64, 64x64`."""
    return ", ".join(f"{width}x{height}" for width, height in sizes)


class BucketedDataset(CachedDataset):
    """Preprocessed images, or what was made of them, in squares or in aspect-ratio buckets."""

    @property
    def sizes(self) -> list[Size]:
        """The sizes of the images in pixels."""
        return sizes_of(self.manifest["settings"])

    @property
    def buckets(self) -> list[int]:
        """The number of each sample's size; [] in a cache of squares."""
        return self.numbers(BUCKET) if self.manifest["settings"].get("aspect_buckets") else []

    def size_of_entry(self, entry: Mapping[str, Any]) -> Size:
        """The size of an entry's image in pixels."""
        return self.sizes[entry[BUCKET] if self.manifest["settings"].get("aspect_buckets") else 0]

    def expect_multiples(self, multiple: int, reason: str) -> Self:
        """Returns: this dataset. Raises: ValueError: a side of a bucket is no multiple; names the command for others.

        Args: reason: what the multiple is, in words.
        """
        wrong = [size for size in self.sizes if size[0] % multiple or size[1] % multiple]
        if self.manifest["settings"].get("aspect_buckets") and wrong:
            other = {"bucket_multiple": multiple, "output_dir": f"{self.folder}_multiples_of_{multiple}"}
            raise ValueError(
                f"{self.folder} has images of {describe_sizes(wrong)} pixels, whose sides must be multiples of "
                f"{multiple}, {reason}; this makes them: {self.command(**other)}"
            )
        return self

    def check_entries(self, split: str, entries: Any) -> None:
        if self.manifest["settings"].get("aspect_buckets"):
            self.entry_types = {**self.entry_types, BUCKET: int}  # type: ignore[misc]
        super().check_entries(split, entries)
