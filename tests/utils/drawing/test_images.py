"""Drawing and what goes with it."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_loading.cached import evenly_spaced
from utils.drawing.images import (
    Group,
    channel_images,
    difference,
    draw_prompts,
    draw_sheet,
    fit_cell,
    pad_to_multiple,
    resize_shorter_side,
    save_image,
    shrunk,
    to_image,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_to_image_rounds_and_clamps_and_makes_grey_rgb():
    image = to_image(torch.tensor([[[-1.0, 1.0, 0.0, 7.0]]]))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (255,) * 3, (128,) * 3, (255,) * 3]
    assert to_image(torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)).getpixel((0, 0)) == RED


def test_difference_is_black_where_equal_and_white_from_half_the_range_on():
    a = torch.tensor([0.5, 0.5, 1.0, 1.0])
    b = torch.tensor([0.5, 0.0, 0.0, -1.0])
    assert difference(a, b).tolist() == [-1.0, 0.0, 1.0, 1.0]


def test_channel_images_are_normalised_per_channel():
    latents = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    scaled = channel_images(latents * torch.tensor([0.01, 100.0]).view(2, 1, 1) + 5)
    assert torch.allclose(scaled, channel_images(latents), atol=1e-4) and scaled.shape == (4, 2, 1, 5, 5)
    assert torch.equal(channel_images(torch.ones(1, 1, 2, 2)), torch.zeros(1, 1, 1, 2, 2))


@pytest.mark.parametrize(("size", "inside"), [((20, 10), (60, 30)), ((300, 150), (64, 32)), ((2, 500), (1, 64))])
def test_a_cell_holds_the_whole_image_with_its_proportions(size, inside):
    cell = np.asarray(fit_cell(Image.new("RGB", size, RED), 64))
    red = (cell == RED).all(2)
    assert cell.shape == (64, 64, 3) and (red.any(0).sum(), red.any(1).sum()) == inside


def test_a_sheet_places_every_group():
    groups = [Group([Image.new("RGB", (128, 128), RED), Image.new("RGB", (128, 128), BLUE)], "caption")] * 3
    sheet = draw_sheet(groups, ("input", "reconstruction"), n_across=2, title="title")
    for color in (RED, BLUE):
        assert (np.asarray(sheet) == color).all(2).sum() == 3 * 128**2
    bare = draw_sheet([Group(group.images) for group in groups], n_across=2)
    assert bare.width == sheet.width and bare.height < sheet.height


def test_long_captions_stay_inside_the_sheet():
    groups = [Group([Image.new("RGB", (128, 128), RED)], "a caption far too long to fit " * 5)]
    sheet = draw_sheet(groups)
    column = {sheet.getpixel((sheet.width - 2, y)) for y in range(sheet.height)}
    assert column == {sheet.getpixel((0, 0))}


@pytest.mark.parametrize(("n_groups", "n_images"), [(40, 1), (40, 3), (5, 8), (1, 1), (7, 2)])
def test_a_sheet_without_a_number_across_is_about_square(n_groups, n_images):
    groups = [Group([Image.new("RGB", (128, 128), RED)] * n_images, f"caption {i}") for i in range(n_groups)]
    sheets = [draw_sheet(groups, n_across=n) for n in (None, *range(1, n_groups + 1))]
    sheet, *others = [max(image.width / image.height, image.height / image.width) for image in sheets]
    assert sheet <= min(others) * 1.05  # The margins count little.
    assert (np.asarray(sheets[0]) == RED).all(2).sum() == n_groups * n_images * 128**2


def test_a_caption_takes_several_lines_where_its_group_is_narrow():
    caption = "a large panda on a red ground beside a blue bicycle"
    image = Image.new("RGB", (128, 128), RED)
    short, long = (draw_sheet([Group([image], text)]) for text in ("a large panda", caption))
    assert long.width == short.width and long.height > short.height
    assert draw_sheet([Group([image] * 4, caption)]).height == short.height


@pytest.mark.parametrize(("n_prompts", "n_seeds"), [(40, 1), (1, 40), (5, 8), (2, 20)])
def test_prompts_and_seeds_fill_a_sheet_of_readable_proportions(n_prompts, n_seeds):
    rows = [[Image.new("RGB", (128, 128), RED)] * n_seeds] * n_prompts
    sheet = draw_prompts(rows, [f"prompt {i}" for i in range(n_prompts)], range(n_seeds))
    assert 0.6 < sheet.width / sheet.height < 1.7
    assert (np.asarray(sheet) == RED).all(2).sum() == 40 * 128**2


@pytest.mark.parametrize("size", [(300, 700), (1000, 90), (128, 100)])
def test_a_shrunk_image_looks_the_same_on_a_sheet(size):
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    assert max(shrunk(image).size) <= 256
    sheets = [draw_sheet([Group([shown], "")]) for shown in (image, shrunk(image))]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_spread_is_even_and_without_repetition():
    assert evenly_spaced(10, 5) == [0, 2, 4, 6, 8]
    assert evenly_spaced(3, 8) == [0, 1, 2] and evenly_spaced(5, 0) == []
    assert all(len(set(evenly_spaced(n, k))) == k for n in range(1, 20) for k in range(1, n + 1))


@pytest.mark.parametrize("size", [(8, 16), (7, 9), (1, 1)])
def test_padding_keeps_the_image_in_its_corner(size):
    image = torch.rand(2, 3, *size)
    padded = pad_to_multiple(image, 8)
    assert padded.shape[2] % 8 == padded.shape[3] % 8 == 0 and padded.shape[2] - size[0] < 8
    assert torch.equal(padded[..., : size[0], : size[1]], image)
    assert torch.equal(padded[..., -1, -1], image[..., -1, -1])


def test_the_shorter_side_gets_the_length():
    assert resize_shorter_side(Image.new("RGB", (30, 20)), 40).size == (60, 40)
    assert resize_shorter_side(Image.new("RGB", (20, 33)), 10).size == (10, 16)


def test_a_image_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "made" / "a.png"
    save_image(Image.new("RGB", (2, 2), RED), file)
    with pytest.raises(OSError):
        save_image(Image.new("F", (2, 2)), file)  # PNG has no float pixels.
    assert Image.open(file).getpixel((0, 0)) == RED
