"""Attention masks of streams as images.  L tokens."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from utils.drawing.images import PAPER

SIZE = 384  # Maximum side of a mask in pixels; longer streams have one pixel per token.
MAX_CELL = 12  # Pixels of a token.
KINDS = ("text", "clean latents", "noisy latents")
COLORS = ((45, 90, 160), (70, 150, 90), (221, 106, 28))  # Of the tokens that are seen, by kind.
LEGEND = "rows see columns: text blue, clean latents green, noisy latents orange; the margins name the tokens"


def mask_image(mask: Tensor, kinds: Sequence[int]) -> Image.Image:
    """A mask with a margin that has the tokens' kinds; what is not seen is light.

    Args:
        mask: (L, L) bool, true where the token of the row sees that of the column.
        kinds: of each token, its place in `KINDS`, (L,).
    """
    L = len(kinds)
    colors = np.array(COLORS, np.uint8)[np.asarray(kinds)]  # (L, 3)
    cells = np.where(mask.cpu().numpy()[:, :, None], colors[None], np.array(PAPER, np.uint8))
    # One row and one column more for the kinds, and one between them and the mask.
    canvas = np.full((L + 2, L + 2, 3), 255, np.uint8)
    canvas[2:, 2:], canvas[0, 2:], canvas[2:, 0] = cells, colors, colors
    cell = max(1, min(MAX_CELL, SIZE // (L + 2)))
    return Image.fromarray(canvas.repeat(cell, 0).repeat(cell, 1))
