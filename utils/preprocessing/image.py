"""Shared by the preprocessing stages that read images: decoding."""

from typing import Any

from PIL import Image

from dataset_loading.image.pixels import TooSmallError, decode_image
from utils.preprocessing.arguments import ImageArguments
from utils.preprocessing.samples import SkipSampleError

# Flags that shape the tensors of every image stage; they belong to the fingerprint of a cache.
IMAGE_SETTINGS = ("resize_mode", "background_color", "min_image_size")


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
