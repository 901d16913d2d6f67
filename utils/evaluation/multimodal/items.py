"""The held-out items of an evaluation, one of each text, and the directions in which a model is evaluated.

m tokens of a span, W values of a token.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset_loading.files import fingerprint_of_bytes
from dataset_loading.multimodal import Caches, Item, join_items, parse_task
from model.multimodal.layout import Part, audio_tokens, check_span, image_tokens
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import SPANS, Modality
from utils.generation.multimodal import MultimodalPipeline
from utils.seeds import seed_of

logger = logging.getLogger(__name__)

MARGIN = 8  # Text tokens that an answer may be longer than the longest text.


class Direction(NamedTuple):
    """From the condition to what is generated; without a source the target alone."""

    source: Modality | None
    target: Modality

    @property
    def name(self) -> str:
        """`text-image`, or the target alone."""
        return f"{self.source}-{self.target}" if self.source else self.target


def directions_of(record: Mapping[str, Any]) -> list[Direction]:
    """The directions that the streams of a run train, from its record: from the first part of each to the second one.
    Without `--tasks` a run trains understanding and generation of each modality."""
    names = record["arguments"].get("tasks") or [
        f"{first}-{second}"
        for name in SPANS
        if name in record["latents"]
        for first, second in ((name, "text"), ("text", name))
    ]
    directions = {}
    for name in names:
        first, *following = parse_task(name).modalities
        directions[Direction(first, following[0]) if following else Direction(None, first)] = None
    return list(directions)


class HeldOutItems(Dataset):
    """One item of each distinct text, the first of those that have the most modalities, in random order.

    Args:
        caches: `image`, `audio` or both, of the held-out split.
        config: of the model; clips that are longer than it takes are left out, with a warning.
    Attributes: items, entries (`key`, `caption`), fingerprint.
    Raises: ValueError: no item has a text.
    """

    def __init__(self, caches: Caches, config: MegaTransformerConfig):
        self.caches = caches
        self.fingerprint = fingerprint_of_bytes([cache.fingerprint.encode() for cache in caches.values()])
        best: dict[str, Item] = {}
        for item in without_long_clips(join_items(caches), caches, config):
            if item.text and len(item.places) > len(best[item.text].places if item.text in best else ()):
                best[item.text] = item
        if not best:
            folders = ", ".join(str(cache.folder) for cache in caches.values())
            raise ValueError(f"no item in {folders} has a text; name latents of captioned items")
        # In an order that has nothing to do with the texts: every n-th item may have the same place or colour.
        self.items = sorted(best.values(), key=lambda item: seed_of(0, item.text))
        self.entries = [{"key": item.key, "caption": item.text} for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def latents(self, item: Item, name: str) -> Tensor:
        """Means of an item's posterior, (Z, y, x) or (L, Z)."""
        return self.caches[name][item.places[name]]["mean"]

    def entry(self, item: Item, name: str) -> dict[str, Any]:
        """An item's entry in the manifest of one of its caches."""
        return self.caches[name].entries[item.places[name]]

    def part(self, item: Item, name: Modality, pipeline: MultimodalPipeline) -> Part:
        """An item's text, image or audio as a part of a stream; spans have latents (m, W).

        Raises: ValueError: a clip that is longer than the model takes; names it.
        """
        if name == "text":
            return pipeline.text_part(item.text)
        config = pipeline.model.config
        part = span_part(name, self.latents(item, name), getattr(config, f"{name}_encoder_patch_size"))
        try:
            check_span(config, part)
        except ValueError as error:
            raise ValueError(
                f"{self.entry(item, name)['key']} in {self.caches[name].folder}: {error}; leave it out of the folder"
            ) from error
        return part


def span_part(name: Modality, latents: Tensor, patch: int) -> Part:
    """Latents (Z, y, x) or (L, Z) as a part of a stream."""
    return Part(name, latents=(image_tokens if name == "image" else audio_tokens)(latents, patch))


def without_long_clips(items: list[Item], caches: Caches, config: MegaTransformerConfig) -> list[Item]:
    """The items, without the audio that is longer than a model takes, as in training; warns of it."""
    limit, left_out = config.audio_max_tokens * config.audio_encoder_patch_size, []
    for item in items:
        if "audio" in item.places and caches["audio"].entries[item.places["audio"]]["length"] > limit:
            del item.places["audio"]
            left_out.append(item.key)
    if left_out:
        logger.warning(
            "%d clips in %s are longer than audio_max_tokens=%d and are left out, the first: %s",
            *(len(left_out), caches["audio"].folder, config.audio_max_tokens, left_out[0]),
        )
    return items


def having(items: Sequence[Item], *names: Modality | None) -> list[Item]:
    """The items that have all of some modalities."""
    return [item for item in items if all(name in (None, "text") or name in item.places for name in names)]


def others(values: Sequence[Any]) -> list[Any]:
    """For each value that of another item, the control of a condition; always the same permutation, one cycle."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    following = dict(zip(order, [*order[1:], *order[:1]]))
    return [values[following[number]] for number in range(len(values))]
