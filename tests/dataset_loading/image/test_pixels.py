import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dataset_loading.image.pixels import (
    Augmentation,
    TooLargeError,
    TooSmallError,
    decode_image,
    fit_image,
    rotate,
    to_float,
    to_uint8,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def stored(image: Image.Image, kind: str = "PNG", **options) -> dict:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"path": None, "bytes": buffer.getvalue()}


def bars(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right, green between; each a third."""
    image = Image.new("RGB", (width, height), GREEN)
    image.paste(RED, (0, 0, width // 3, height))
    image.paste(BLUE, (width - width // 3, 0, width, height))
    return image


def test_all_values_survive_the_way_to_float_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_exif_orientation_is_applied():
    image = bars(30, 10)
    exif = image.getexif()
    exif[0x0112] = 6  # The camera was turned: show it rotated clockwise.
    upright = decode_image(stored(image, "JPEG", exif=exif, quality=100, subsampling=0), "white")
    assert upright.size == (10, 30)
    assert upright.getpixel((5, 2))[0] > 200 and upright.getpixel((5, 27))[2] > 200


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 4, 8))
    decoded = decode_image(stored(image), "#0000ff")
    assert decoded.getpixel((6, 0)) == BLUE
    assert np.allclose(decoded.getpixel((1, 0)), (128, 0, 127), atol=1)


def test_palette_transparency_shows_the_background():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (0, 0, 4, 8))
    decoded = decode_image(stored(image, transparency=0), "blue")
    assert decoded.getpixel((1, 0)) == GREEN and decoded.getpixel((6, 0)) == BLUE


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = np.asarray(decode_image(stored(Image.fromarray(ramp)), "white"))
    assert np.array_equal(decoded[..., 0], np.round(ramp / 257))


@pytest.mark.parametrize(
    ("mode", "kind", "color"),
    [
        ("1", "PNG", 255),
        ("L", "PNG", 255),
        ("LA", "PNG", (255, 255)),
        ("CMYK", "JPEG", (0, 0, 0, 0)),
        ("CMYK", "TIFF", 0),
    ],
)
def test_white_is_white_in_every_mode(mode, kind, color):
    decoded = decode_image(stored(Image.new(mode, (8, 8), color), kind), "black")
    assert decoded.mode == "RGB" and decoded.getpixel((4, 4)) == WHITE


@pytest.mark.parametrize("pixels", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 255, np.int32)])
def test_pixels_of_32_bits_without_a_white_are_refused(pixels):
    with pytest.raises(ValueError, match="no defined white; save"):
        decode_image(stored(Image.fromarray(pixels), "TIFF"), "white")


def test_long_texts_in_a_png_are_no_damage():
    information = PngInfo()
    information.add_text("workflow", "x" * 2_000_000, zip=True)
    assert decode_image(stored(Image.new("RGB", (8, 8), RED), pnginfo=information), "white").getpixel((4, 4)) == RED


def test_truncated_file_is_an_error():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    media = stored(noise)
    with pytest.raises(OSError, match="truncated"):
        decode_image({**media, "bytes": media["bytes"][: len(media["bytes"]) // 2]}, "white")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_random_damage_raises_nothing_else(kind):
    random = np.random.default_rng(0)
    content = np.frombuffer(stored(bars(40, 40), kind)["bytes"], dtype=np.uint8)
    results = set()
    for _ in range(60):
        damaged = content.copy()
        damaged[random.integers(0, len(content), 4)] = random.integers(0, 256, 4)
        try:
            decode_image({"path": None, "bytes": damaged.tobytes()}, "white")
            results.add("decoded")
        except (OSError, ValueError):
            results.add("refused")
    assert "refused" in results


def test_small_image_is_refused_by_its_size_on_disk():
    media = stored(bars(300, 40), "JPEG")
    assert decode_image(media, "white", enough=16, min_side=40).height == 20
    with pytest.raises(TooSmallError, match="300x40 pixels, the shorter side is under 41"):
        decode_image(media, "white", enough=16, min_side=41)


def test_reduced_jpeg_decoding_changes_little():
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    media = stored(
        Image.fromarray(np.stack([np.tile(ramp, (800, 1)), np.tile(ramp[:, None], (1, 800))], 2)[..., [0, 1, 0]]),
        "JPEG",
    )
    whole, reduced = decode_image(media, "white"), decode_image(media, "white", enough=192)
    assert whole.size == (800, 800) and reduced.size == (200, 200)
    pair = [
        np.asarray(fit_image(image, 64, "squash", background_color="white")).astype(int) for image in (whole, reduced)
    ]
    assert np.abs(pair[0] - pair[1]).max() <= 3


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_crop_keeps_the_centre(size):
    image = bars(90, 30) if size[0] > size[1] else bars(90, 30).rotate(90, expand=True)
    assert set(fit_image(image, 30, "crop", background_color="white").get_flattened_data()) == {GREEN}


def test_squash_keeps_everything():
    image = fit_image(bars(90, 30), 30, "squash", background_color="white")
    assert [image.getpixel((x, 15)) for x in (2, 15, 27)] == [RED, GREEN, BLUE]
    assert image.getpixel((2, 0)) == RED


def test_pad_keeps_proportions_between_bars():
    image = fit_image(bars(90, 30), 30, "pad", background_color="yellow")
    assert [image.getpixel((15, y)) for y in (5, 12, 18, 25)] == [(255, 255, 0), GREEN, GREEN, (255, 255, 0)]
    assert image.getpixel((2, 15)) == RED


def test_shrinking_averages_instead_of_picking():
    checkers = np.indices((512, 512)).sum(0) % 2 * 255
    shrunk = np.asarray(
        fit_image(Image.fromarray(checkers.astype(np.uint8)).convert("RGB"), 32, "crop", background_color="white")
    )
    assert abs(shrunk.astype(int) - 127).max() <= 2


@given(st.integers(16, 200), st.integers(16, 200), st.floats(-45, 45))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rotation_invents_no_corners(width, height, degrees):
    turned = rotate(Image.new("RGB", (width, height), WHITE), degrees)
    assert turned.getextrema() == ((255, 255),) * 3
    assert min(turned.size) >= 1


def test_rotation_turns_counterclockwise():
    image = Image.new("RGB", (100, 100), "black")
    image.paste(RED, (60, 45, 95, 55))  # East of the centre; goes to the north-east.
    turned = np.asarray(rotate(image, 30))[..., 0] > 128
    rows, columns = np.nonzero(turned)
    assert rows.mean() < turned.shape[0] / 2 < columns.mean()


def changed(augmentation: Augmentation, seed: int, image: Image.Image) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return augmentation.change_pixels(augmentation.change_geometry(image, generator), generator)


def test_augmentation_depends_on_the_generator_alone():
    augmentation, image = Augmentation(0.5, 0.5, 0.3, 20), bars(60, 40)
    first = [changed(augmentation, seed, image).tobytes() for seed in range(8)]
    assert first == [changed(augmentation, seed, image).tobytes() for seed in range(8)]
    assert len(set(first)) == 8


def test_switched_off_augmentation_changes_nothing():
    image = bars(60, 40)
    assert changed(Augmentation(1.0, 0.0, 0.0, 0.0), 3, image).tobytes() == image.tobytes()


def test_crops_keep_their_share_and_proportions():
    image = bars(300, 200)
    sizes = [changed(Augmentation(0.25, 0, 0, 0), seed, image).size for seed in range(40)]
    areas = [width * height / 60000 for width, height in sizes]
    assert 0.24 < min(areas) < 0.4 and 0.85 < max(areas) <= 1
    assert all(abs(width / height - 1.5) < 0.03 for width, height in sizes)


def test_flip_happens_with_its_probability():
    image = bars(30, 10)
    flipped = [changed(Augmentation(1, 0.25, 0, 0), seed, image).getpixel((0, 0)) == BLUE for seed in range(200)]
    assert 30 <= sum(flipped) <= 70


# ---- Colour profiles, 16 bits with transparency, limits.


def swapped_profile() -> bytes:
    """An ICC profile whose red is sRGB's blue and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(int.from_bytes(profile[128:132], "big")):
        at = 132 + 12 * number
        tag = bytes(profile[at : at + 4])
        profile[at : at + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(tag, tag)
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colour_profiles_are_applied(kind):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    media = stored(Image.new("RGB", (16, 16), RED), kind, icc_profile=swapped_profile(), **options)
    assert np.allclose(decode_image(media, "white").getpixel((8, 8)), BLUE, atol=6)
    # sRGB's own changes no value.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = bars(16, 16)
    media = stored(plain, "PNG", icc_profile=srgb)
    assert np.array_equal(decode_image(media, "white"), plain)


def test_profiles_keep_transparency_and_bad_ones_are_ignored():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 4, 8))
    decoded = decode_image(stored(image, icc_profile=swapped_profile()), "lime")
    assert decoded.getpixel((1, 0)) == GREEN and np.allclose(decoded.getpixel((6, 0)), BLUE, atol=6)
    for mode, color in (("RGB", RED), ("L", 76)):
        # No profile at all, and one of RGB in a grey image.
        profile = b"nothing" if mode == "RGB" else swapped_profile()
        decoded = decode_image(stored(Image.new(mode, (8, 8), color), icc_profile=profile), "white")
        assert decoded.getpixel((4, 4)) == (color if mode == "RGB" else (76, 76, 76))


def test_sixteen_bit_transparency_shows_the_background():
    grey = np.full((8, 8), 40000, np.uint16)
    grey[:, :4] = 513
    # 514 has the same upper bits, and is not transparent.
    grey[:, 4] = 514
    decoded = decode_image(stored(Image.fromarray(grey), transparency=513), "red")
    assert decoded.getpixel((1, 0)) == RED and decoded.getpixel((4, 0)) == (2, 2, 2)
    assert decoded.getpixel((6, 0)) == (156, 156, 156)


def png_of_16_bit_rgb(pixels: np.ndarray, transparent: tuple[int, int, int]) -> bytes:
    """A PNG file of (Y, X, 3) uint16, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"tRNS", struct.pack(">3H", *transparent)), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in [*chunks, (b"IEND", b"")])


def test_sixteen_bit_colour_transparency_shows_the_background():
    pixels = np.full((4, 8, 3), (65535, 0, 0), np.uint16)
    pixels[:, :4] = (1000, 2000, 3000)
    decoded = decode_image({"path": None, "bytes": png_of_16_bit_rgb(pixels, (1000, 2000, 3000))}, "blue")
    assert decoded.getpixel((1, 1)) == BLUE and decoded.getpixel((6, 1)) == RED


def test_the_pixel_limit_is_named_and_counts_what_is_decoded():
    media = stored(Image.new("RGB", (600, 400)), "JPEG")
    with pytest.raises(TooLargeError, match=r"600x400 pixels are more than max_image_pixels=9999.*--max_image_pixels"):
        decode_image(media, "white", max_pixels=9_999)
    assert decode_image(media, "white", max_pixels=240_000).size == (600, 400)
    # A JPEG that is decoded at a fraction of its size.
    assert decode_image(media, "white", enough=50, max_pixels=9_999).size == (75, 50)
    # Pillow's own limit does not count, which would end all above 179 million pixels.
    with pytest.raises(TooLargeError, match="20000x10000"):
        decode_image(stored(Image.new("1", (20_000, 10_000))), "white")
