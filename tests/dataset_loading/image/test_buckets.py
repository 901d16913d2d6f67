"""Sizes of aspect-ratio buckets, which one an image gets, and what of the image it keeps."""

import math

import pytest
from PIL import Image

from dataset_loading.image.buckets import bucket_sizes, describe_sizes, nearest_size, parse_ratio
from dataset_loading.image.pixels import fit_image


def test_sizes_have_about_the_area_of_the_square_and_sides_that_are_multiples():
    sizes = bucket_sizes(["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2.4:1"], 512, 32)
    assert sizes[:3] == [(512, 512), (576, 448), (448, 576)]
    for width, height in sizes:
        assert width % 32 == height % 32 == 0 and 0.9 < width * height / 512**2 < 1.1
    assert describe_sizes(sizes[:2]) == "512x512, 576x448"


@pytest.mark.parametrize("text", ["1.5", "3x2", "3:0", "0:3", "-3:2", "5:1", "1:5", ""])
def test_malformed_and_extreme_ratios_are_refused(text):
    with pytest.raises(ValueError, match=r"--aspect_buckets .* between 1:4 and 4:1, such as 3:2"):
        parse_ratio(text, "aspect_buckets")


def test_ratios_of_the_same_size_are_refused():
    with pytest.raises(ValueError, match=r"1:1 and 10:9 are both 64x64 .*lower --bucket_multiple"):
        bucket_sizes(["1:1", "10:9"], 64, 32)


def test_an_image_goes_to_the_nearest_ratio():
    sizes = [(64, 64), (80, 48), (48, 80)]
    chosen = {size: sizes[nearest_size(size, sizes)] for size in [(9, 9), (100, 101), (3, 2), (2, 3), (900, 100)]}
    assert [*chosen.values()] == [(64, 64), (64, 64), (80, 48), (48, 80), (80, 48)]
    # The geometric mean of two ratios is the border between them.
    border = math.sqrt(80 / 48)
    assert [nearest_size((border * share, 1.0), sizes) for share in (0.99, 1.01)] == [0, 1]


@pytest.mark.parametrize(
    ("mode", "left", "upper"), [("crop", "red", "red"), ("squash", "green", "red"), ("pad", "green", "white")]
)
def test_the_centre_of_the_buckets_proportions_is_kept(mode, left, upper):
    """A red image of 3:1 with green ends: a bucket of 3:2 cuts them off, squashes them, or adds bars above."""
    image = Image.new("RGB", (300, 100), (0, 128, 0))
    image.paste((255, 0, 0), (60, 0, 240, 100))
    fitted = fit_image(image, (30, 20), mode, background_color="white")
    colors = {(255, 0, 0): "red", (0, 128, 0): "green", (255, 255, 255): "white"}
    assert fitted.size == (30, 20)
    assert [colors.get(fitted.getpixel(place)) for place in ((0, 10), (15, 0))] == [left, upper]
    # A square is what it was before sizes had two sides.
    assert fit_image(image, 20, mode, background_color="white").tobytes() == (
        fit_image(image, (20, 20), mode, background_color="white").tobytes()
    )
