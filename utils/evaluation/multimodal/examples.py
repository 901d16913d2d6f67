"""Examples of generated images and clips beside the real ones: sheets and wav files.

S side of an image, M mel bins, F mel frames.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from model.audio.spectral import MelSettings
from utils.drawing.alignment import aligned_mel
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group, draw_sheet, to_image


@dataclass
class Examples:
    """Some items of a direction.

    Args:
        direction: its name.
        captions: text of each item.
        real: image (3, S, S) or log-mel (M, F) of each item.
        copies: the same generated, of each copy.
    """

    direction: str
    captions: Sequence[str]
    real: Sequence[Tensor]
    copies: Sequence[Sequence[Tensor]]

    @property
    def labels(self) -> list[str]:
        """Titles of the columns of a sheet."""
        return ["real", *["generated"] * len(self.copies)]

    def rows(self) -> list[tuple[Tensor, ...]]:
        """The real and the generated ones of each item."""
        return list(zip(self.real, *self.copies))

    def image_sheet(self, title: str) -> Image.Image:
        """Images, real | generated."""
        groups = [Group([to_image(x) for x in row], text) for row, text in zip(self.rows(), self.captions)]
        title = f"{title}: {self.direction}, held-out items"
        return draw_sheet(groups, self.labels, n_across=min(4, len(groups)), title=title)

    def mel_sheet(self, title: str, settings: MelSettings) -> Image.Image:
        """Log-mels in one time scale, real | generated."""
        longest = max(mel.shape[1] for row in self.rows() for mel in row)
        nothing = torch.zeros(0, dtype=torch.long)
        groups = [
            Group([aligned_mel(mel, nothing, settings, max_frames=longest) for mel in row], text)
            for row, text in zip(self.rows(), self.captions)
        ]
        return strip_sheet(groups, self.labels, title=f"{title}: {self.direction}, held-out items")

    def clips(self, vocode: Callable[[Tensor], Tensor], rate: int) -> dict[str, tuple[Tensor, int]]:
        """Waveforms with their sampling rate in Hz, by the names of their files."""
        clips = {}
        for text, (real, *generated) in zip(self.captions, self.rows()):
            name = f"{self.direction}_{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:60]}"
            for label, mel in {"real": real, **{f"generated_{n}": mel for n, mel in enumerate(generated)}}.items():
                clips[f"{name}_{label}"] = vocode(mel), rate
        return clips
