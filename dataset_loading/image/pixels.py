"""Images: decoding, geometry and augmentation for preprocessing, and the dataset of preprocessed images.

S is the side of the square images in a preprocessed folder; in one of aspect-ratio buckets images are Y x X.
"""

import dataclasses
import functools
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageEnhance, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from dataset_loading.image.buckets import BucketedDataset, Size
from dataset_loading.sources import read_media
from utils.flags.choices import MAX_PIXELS, ResizeMode

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif", ".ico",
))
# fmt: on
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which no flag names.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # Programs store long texts, which are not read here.


class ImageDataset(BucketedDataset):
    """Preprocessed images: items with `image` (3, Y, X) float32 in [-1, 1] and `index`, the index in `entries`."""

    stage = "image_vae"

    def tensor_kinds(self, entry):
        width, height = self.size_of_entry(entry)
        return {"image": (torch.uint8, (3, height, width))}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "image": to_float(sample["image"])}


def to_float(image: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], any shape."""
    return image.float().div_(127.5).sub_(1)


def to_uint8(image: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in [0, 255], rounded and clamped, any shape; the inverse of `to_float`."""
    return image.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_tensor(image: Image.Image) -> Tensor:
    """An image in RGB as (3, Y, X) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---- Decoding.


class TooSmallError(ValueError):
    """An image is intact, but smaller than the limit."""


class TooLargeError(ValueError):
    """An image is intact, but has more pixels than the limit."""


def decode_image(
    media: dict[str, Any] | None,
    background_color: str,
    *,
    enough: int = 0,
    min_side: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image file of any mode to 8-bit sRGB, upright, with transparency over the background colour.

    Args:
        media: `{"path": ..., "bytes": ...}`, see `read_media`.
        background_color: name or `#rrggbb`, which shows through transparent pixels.
        enough: a JPEG may be decoded at 1/2, 1/4 or 1/8 size while both sides keep as many pixels; 0: full size.
        min_side: images with a shorter side are refused, in pixels.
        max_pixels: images that have more, as they are decoded, are refused.
    Raises:
        TooSmallError, TooLargeError: see `min_side`, `max_pixels`.
        OSError, ValueError: the file is missing, damaged, or no image; the message says which.
    """
    buffer = read_media(media)
    try:
        image = Image.open(buffer)  # Reads the header alone, so that small and large images are not decoded.
        if min(image.size) < min_side:
            raise TooSmallError(f"{image.width}x{image.height} pixels, the shorter side is under {min_side}")
        if enough and image.format == "JPEG":
            # The JPEG decoder scales by powers of two almost for free.
            image.draft(None, (enough, enough))
        if image.width * image.height > max_pixels:
            raise TooLargeError(
                f"{image.width}x{image.height} pixels are more than max_image_pixels={max_pixels}; make the image "
                "smaller, or allow more with --max_image_pixels in preprocessing"
            )
        image.load()
        # Up to 255 in 32 bits, pixels are rather of 8 bits than of 16, and would become black.
        is_ambiguous = image.mode == "F" or (image.mode == "I" and image.format == "TIFF" and brightest(image) < 256)
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"no image of a known format ({buffer.getbuffer().nbytes} bytes)") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow's readers let all kinds of errors through.
        raise ValueError(f"damaged image: {error!r}") from error
    if is_ambiguous:
        raise ValueError("32-bit pixels have no defined white; save the image with 8 or 16 bits")
    # Any mode to 8-bit sRGB; transparency is composited in RGBA.
    profile = image.info.get("icc_profile")
    image = to_8_bit(image)
    if profile and not is_srgb(profile):
        image = to_srgb(image, profile)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, ImageColor.getrgb(background_color))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return image.convert("RGB")


def brightest(image: Image.Image) -> int:
    """The largest pixel of an image with one channel."""
    extrema: Any = image.getextrema()
    return extrema[1]


def check_color(flag: str, color: str) -> None:
    """Raises: ValueError: a flag names no known color."""
    try:
        ImageColor.getrgb(color)
    except ValueError as error:
        raise ValueError(f"--{flag}={color!r}: {error}") from error


def to_8_bit(image: Image.Image) -> Image.Image:
    """An image of up to 16 bits per channel in 8 bits, 65535 becoming 255; its transparent grey becomes a channel."""
    transparent = image.info.get("transparency")
    if not image.mode.startswith("I"):
        # Pillow keeps the upper 8 of 16 bits of the pixels, but all of the transparent colour's.
        if isinstance(transparent, tuple) and max(transparent) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"32-bit pixels in [{pixels.min()}, {pixels.max()}] have no defined white; save the image with 8 or "
            "16 bits"
        )
    # 65535 = 255 * 257, so this rounds to the nearest of 256 levels.
    grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8))))


# ---- Colour profiles.


@functools.lru_cache(maxsize=64)
def is_srgb(profile: bytes) -> bool:
    """Whether an ICC profile calls itself sRGB; so does one that cannot be read, which is ignored."""
    try:
        description = ImageCms.getProfileDescription(ImageCms.getOpenProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return True
    return "sRGB" in description


@functools.lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """From a profile's colours of one mode to sRGB, relative to white."""
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours of an image in sRGB, its transparency kept; unchanged where the profile is for other colours."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = image.mode if image.mode in ("L", "RGB", "CMYK") else "L" if image.mode in ("1", "LA") else "RGB"
    try:
        converted = ImageCms.applyTransform(image.convert(mode), srgb_transform(profile, mode))
    except ImageCms.PyCMSError:  # Such as a profile of RGB in a grey image.
        return image
    assert converted is not None, "a new image, since it is not changed in place"
    if alpha:
        converted.putalpha(alpha)
    return converted


# ---- Geometry.


def fit_image(image: Image.Image, size: int | Size, mode: ResizeMode, *, background_color: str) -> Image.Image:
    """Resize to a size, antialiased.

    Args:
        size: (width, height) in pixels, or the side of a square.
        mode: "crop" keeps the centre of the size's proportions; "pad" keeps everything, between bars of the background
            colour; "squash" keeps everything and changes the proportions.
    """
    size = (size, size) if isinstance(size, int) else size
    (width, height), (target_width, target_height) = image.size, size
    is_wider = width * target_height > height * target_width
    # The image fills one side of the size, and bars of the background fill the other.
    if mode == "pad":
        inner = (target_width, max(1, round(height * target_width / width)))
        if not is_wider:
            inner = (max(1, round(width * target_height / height)), target_height)
        canvas = Image.new("RGB", size, ImageColor.getrgb(background_color)[:3])
        place = ((target_width - inner[0]) // 2, (target_height - inner[1]) // 2)
        canvas.paste(resample(image, inner, (0, 0, width, height)), place)
        return canvas
    if mode == "squash":
        return resample(image, size, (0, 0, width, height))
    # The region that is kept: the largest of the size's proportions, in the centre.
    kept_width = height * target_width / target_height if is_wider else width
    kept_height = height if is_wider else width * target_height / target_width
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return resample(image, size, (left, top, left + kept_width, top + kept_height))


def resample(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """Resize a region with a Lanczos kernel that widens when shrinking; large ratios begin with exact block means."""
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate about the centre by at most 90 degrees and keep the largest upright part of the same proportions."""
    width, height = image.size
    angle = math.radians(abs(degrees))
    # The largest rectangle of the same proportions inside the rotated one has its sides scaled by this.
    shrink = 1 / (math.cos(angle) + math.sin(angle) * max(width / height, height / width))
    inner_width, inner_height = (max(1, int(side * shrink) - 1) for side in image.size)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    return turned.crop((left, top, left + inner_width, top + inner_height))


# ---- Augmentation.


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of an image.

    Attributes:
        random_resized_crop: smallest share of the area that a crop keeps, in (0, 1]; the proportions stay.
        horizontal_flip: probability of a flip.
        color_jitter: brightness, contrast and saturation are multiplied by factors uniform in [1 - color_jitter, 1 +
            color_jitter]. The hue stays, since captions name colours.
        rotation: largest rotation in degrees, at most 45; the corners are cut away, none are invented.
    """

    random_resized_crop: float
    horizontal_flip: float
    color_jitter: float
    rotation: float

    def change_geometry(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Rotate, then crop; for the image in its own size."""
        # Always four numbers, so that one augmentation does not change the others.
        turn, share, left, top = torch.rand(4, generator=generator).tolist()
        if self.rotation:
            image = rotate(image, self.rotation * (2 * turn - 1))
        # The share of the area is uniform in [random_resized_crop, 1], and a side is its square root.
        scale = math.sqrt(self.random_resized_crop + (1 - self.random_resized_crop) * share)
        width, height = (max(1, round(side * scale)) for side in image.size)
        left, top = round(left * (image.width - width)), round(top * (image.height - height))
        return image.crop((left, top, left + width, top + height))

    def change_pixels(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Flip and change the colours; for the image in its final size."""
        flip, *factors = torch.rand(4, generator=generator).tolist()
        if flip < self.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
                image = enhance(image).enhance(1 + self.color_jitter * (2 * factor - 1))
        return image
