"""Images of durations: axes as long as the data, the diagonal, and what lies beyond the maximum."""

import pytest
import torch

from model.audio.spectral import MelSettings
from utils.drawing.alignment import MARGIN, MAX_DURATION, PLOT, aligned_mel, duration_image
from utils.drawing.axes import BOTTOM, LEFT, RIGHT
from utils.drawing.images import GAP, LINE


def pixel(image, number_real, number_predicted, size):
    """The colour in the middle of a cell, but for the diagonal."""
    cell = PLOT // size
    x = GAP + MARGIN + number_real * cell + cell // 4
    return image.getpixel((x, GAP + LINE + (size - 1 - number_predicted) * cell + cell // 4))


@pytest.mark.parametrize("longest", [5, 12, 90])
def test_the_plot_of_durations_reaches_as_far_as_they_do(longest):
    real = torch.tensor([2, 2, longest])
    image = duration_image(real, torch.tensor([2, 4, longest]))
    size = min(longest, MAX_DURATION) + 1
    assert PLOT * 0.8 < size * (PLOT // size) <= image.width - MARGIN
    empty = pixel(image, 4, 2, size)
    # Counted: (2, 2), (2, 4), and the longest in the last cell.
    for pair in ((2, 2), (2, 4), (size - 1, size - 1)):
        assert sum(pixel(image, *pair, size)) > sum(empty) + 100


def test_ends_of_tokens_are_marked_at_the_top():
    image = aligned_mel(torch.full((80, 40), -9.0), torch.tensor([10, 0, 20, 10]), MelSettings())
    image = image.crop((LEFT, 0, image.width - RIGHT, image.height - BOTTOM))
    marked = [x for x in range(image.width) if image.getpixel((x, 3)) == (255, 255, 255)]
    assert marked == [image.width // 4, image.width * 3 // 4]
    assert image.getpixel((image.width // 4, image.height - 3)) != (255, 255, 255)
