"""Images that were not preprocessed: each is decoded and fitted when it is read, as preprocessing does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset_loading.image.buckets import Size, nearest_size
from dataset_loading.image.pixels import IMAGE_SUFFIXES, decode_image, fit_image, to_float, to_tensor
from dataset_loading.sources import open_source
from dataset_loading.tables import captions_of
from utils.flags.choices import ResizeMode


class ImageFolderDataset(Dataset):
    """The images of a folder (and its subfolders), an index file, or a hub dataset.

    `item["image"]` is (3, Y, X) float32 in [-1, 1], `item["index"]` the index in `entries`.

    Args:
        name: folder, index file or hub name, see `dataset_loading.sources`.
        split: `""` takes the only split there is.
        sizes: (width, height) in pixels; an image gets that of the nearest ratio.
        resize_mode, background_color: see `fit_image`, `decode_image`.
        allow_outside: see `open_source`.
    Attributes:
        entries: one dict per image: `key`, `caption`.
        fingerprint: None, since files may change; callers compare it with that of a preprocessed folder.
    Raises:
        FileNotFoundError, ValueError: as `open_source`.
    """

    fingerprint = None

    def __init__(
        self,
        name: str,
        split: str,
        *,
        sizes: Sequence[Size],
        resize_mode: ResizeMode = "crop",
        background_color: str = "white",
        allow_outside: bool = False,
    ):
        self.source = open_source(name, split, "image", suffixes=IMAGE_SUFFIXES, allow_outside=allow_outside)
        # Listed at once, decoded on access.
        self.media: list[dict[str, Any]] = []
        self.entries: list[dict[str, Any]] = []
        for key, row in self.source:
            self.media.append(row[self.source.media])
            self.entries.append(
                {"key": key, "caption": captions_of(row.get("text"))[0] or str(row.get("label") or "")}
            )
        self.sizes, self.background_color = sizes, background_color
        self.resize_mode: ResizeMode = resize_mode

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Raises: ValueError: the file is damaged; the message names it."""
        try:
            image = decode_image(self.media[index], self.background_color)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG files.
            raise ValueError(
                f"{self.entries[index]['key']} in {self.source.identity} cannot be read ({error}); remove it"
            ) from error
        size = self.sizes[nearest_size(image.size, self.sizes)]
        image = fit_image(image, size, self.resize_mode, background_color=self.background_color)
        return {"image": to_float(to_tensor(image)), "index": torch.tensor(index)}
