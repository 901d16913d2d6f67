"""Shared by the preprocessing stages that read images: the sizes that they get, and decoding."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from dataset_loading.image.buckets import BUCKET, bucket_sizes, nearest_size
from dataset_loading.image.pixels import TooSmallError, decode_image, fit_image
from utils.preprocessing.arguments import ImageArguments
from utils.preprocessing.samples import Example, SkipSampleError

# Flags that shape the tensors of every image stage; they belong to the fingerprint of a cache.
IMAGE_SETTINGS = ("resize_mode", "background_color", "min_image_size")


class BucketedSizes:
    """The sizes of a cache's images, and which one an image gets.

    Args:
        args: the flags.
        image_size: side of a square in pixels, whose area all sizes have about.
    """

    def __init__(self, args: ImageArguments, image_size: int):
        self.args, self.image_size, self.has_buckets = args, image_size, bool(args.aspect_buckets)
        buckets = bucket_sizes(args.aspect_buckets, image_size, args.bucket_multiple)
        self.sizes = buckets or [(image_size, image_size)]

    @property
    def longest(self) -> int:
        """The longest side of all sizes."""
        return max(map(max, self.sizes))

    def settings(self) -> dict[str, Any]:
        """What the manifest says of the sizes; without buckets that of the square alone."""
        buckets = {"aspect_buckets": [list(size) for size in self.sizes]} if self.has_buckets else {}
        return {"image_size": self.image_size, **buckets}

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in the size of the nearest ratio."""
        size = self.sizes[nearest_size(image.size, self.sizes)]
        return fit_image(image, size, self.args.resize_mode, background_color=self.args.background_color)

    def expect_divisible(self, compression: int) -> Self:
        """Returns: these sizes. Raises: ValueError: a side of a bucket is not divisible by a VAE's compression."""
        if self.has_buckets and self.args.bucket_multiple % compression:
            raise ValueError(
                f"--bucket_multiple={self.args.bucket_multiple} must be divisible by {compression}, the VAE's "
                "compression"
            )
        return self

    def encode_each(
        self, examples: Sequence[Example], encode: Callable[[list[Example], Tensor], list[Any]], batch_size: int
    ) -> list[Any]:
        """What `encode(examples of one size, images (B, 3, Y, X) uint8)` returns for each example.

        The images are filled with black ones up to B, always the same: kernels choose by its size how they round.

        Args: batch_size: B where there is one size. With several, B is an equal part of it, so that all batches
            together hold at most about twice the examples.
        """
        batch_size = max(1, batch_size // len(self.sizes))
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, example in enumerate(examples):
            rows.setdefault(tuple(example.data["image"].shape), []).append(row)
        encoded: dict[int, Any] = {}
        for same_size in rows.values():
            for start in range(0, len(same_size), batch_size):
                batch = same_size[start : start + batch_size]
                images = torch.zeros(batch_size, *examples[batch[0]].data["image"].shape, dtype=torch.uint8)
                images[: len(batch)] = torch.stack([examples[row].data["image"] for row in batch])
                encoded |= zip(batch, encode([examples[row] for row in batch], images), strict=True)
        return [encoded[row] for row in range(len(examples))]

    def measure(self, tensor: Tensor, scale: int = 1) -> dict[str, int]:
        """What an entry of the manifest says of the bucket of an image, or of latents of a VAE with a compression of
        `scale`, (C, Y / scale, X / scale)."""
        height, width = (scale * side for side in tensor.shape[-2:])
        return {BUCKET: self.sizes.index((width, height))} if self.has_buckets else {}


def decode_source_image(media: dict[str, Any] | None, args: ImageArguments, enough: int) -> Image.Image:
    """Decode an image file in its own size.

    Args:
        enough: pixels a side that a large JPEG need not exceed, see `decode_image`.
    Raises:
        SkipSampleError: the image is smaller than --min_image_size.
        OSError, ValueError: the file is missing, damaged, or no image.
    """
    try:
        # A small image is intact: it is skipped, and does not count as broken.
        limits = {"min_side": args.min_image_size, "max_pixels": args.max_image_pixels}
        return decode_image(media, args.background_color, enough=enough, **limits)
    except TooSmallError as error:
        raise SkipSampleError(str(error)) from error
