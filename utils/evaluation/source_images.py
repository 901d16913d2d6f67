"""The raw images from which latents were preprocessed."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from dataset_loading.cache_writer import sample_key
from dataset_loading.content import DIGEST, is_same_content
from dataset_loading.image.buckets import BucketedDataset
from dataset_loading.image.pixels import IMAGE_SUFFIXES, decode_image, fit_image, to_float, to_tensor
from dataset_loading.sources import open_source
from utils.checkpoints import places


class SourceImageDataset:
    """The raw images of a preprocessed folder, in the order of its samples.

    Item: (3, Y, X) float32 in [-1, 1], cropped or padded as in preprocessing.

    Args:
        dataset: preprocessed images or latents.
    Raises:
        FileNotFoundError, ValueError: the source has moved, or lacks images of the folder.
    """

    def __init__(self, dataset: BucketedDataset):
        # The arguments of preprocessing name the source; a validation set may have its own.
        arguments, settings = dataset.manifest["arguments"], dataset.manifest["settings"]
        name, split = arguments["dataset_name"], arguments["dataset_split"]
        if dataset.split == "validation" and arguments["validation_dataset"]:
            name, split = arguments["validation_dataset"], arguments["validation_split"]
        options = {"media": arguments["media_column"], "config": arguments["dataset_config"]}
        options["allow_outside"] = arguments.get("allow_outside", True)  # As earlier versions did.
        # A folder may be given relative to another working folder, or have moved together with the samples.
        identity = settings.get("validation" if name != arguments["dataset_name"] else "source", "")
        if Path(identity).is_absolute():
            where = [Path(identity), *places(name, dataset.folder)]
            name = next((str(place) for place in where if place.exists()), name)
        self.source = open_source(name, split, "image", suffixes=IMAGE_SUFFIXES, **options)
        self.mode, self.color = (settings[field] for field in ("resize_mode", "background_color"))
        self.size_of_entry = dataset.size_of_entry
        # Rows of the source by sample key. Files that occur more than once are numbered, as in preprocessing.
        rows, seen = {}, Counter()
        for row, (file, _) in enumerate(self.source):
            rows[sample_key(file, seen[file], 0)] = row
            seen[file] += 1
        self.entries, self.repair = dataset.entries, dataset.repair()
        self.keys = [entry["key"] for entry in dataset.entries]
        # Every sample must have its image, otherwise indices would not match.
        missing = [key for key in self.keys if key not in rows]
        if missing:
            raise FileNotFoundError(
                f"{self.source.identity} lacks {len(missing)} of the {len(self.keys)} images that "
                f"{dataset.folder} was preprocessed from, the first is {missing[0]}"
            )
        self.rows = [rows[key] for key in self.keys]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """Raises: ValueError: the file cannot be read, or has changed since; the message names it."""
        media, entry = self.source.rows[self.rows[index]][self.source.media], self.entries[index]
        if DIGEST in entry and not is_same_content(entry, media):
            raise ValueError(
                f"{entry['source']} in {self.source.identity} is gone, or has changed since it was preprocessed; "
                f"bring them up to date: {self.repair}"
            )
        try:
            image = decode_image(media, self.color)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{self.keys[index]} in {self.source.identity} cannot be read ({error})") from error
        # Cropped or padded to the size of the sample, then (3, Y, X).
        size = self.size_of_entry(entry)
        return to_float(to_tensor(fit_image(image, size, self.mode, background_color=self.color)))
