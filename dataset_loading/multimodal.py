"""Items that have texts, images and audio, joined from caches of latents, and the streams that are made of them.

W latent values of a token, m tokens of a span, B rows of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.files import fingerprint_of_bytes
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.text.tokenizers import document_encoder, tokenizer_hash
from model.multimodal.layout import Modality, Part, audio_tokens, build_stream, image_tokens
from utils.configuration import MegaTransformerConfig

Caches = Mapping[str, ImageLatentDataset | AudioLatentDataset]


@dataclass(frozen=True)
class Task:
    """A kind of stream, such as text and then an image, and how often each item comes in it per epoch."""

    modalities: tuple[Modality, ...]
    weight: int = 1

    @property
    def name(self) -> str:
        """The modalities in their order, `text-image`."""
        return "-".join(self.modalities)


def parse_task(text: str) -> Task:
    """A task from `text-image` or `text-image:3`.

    Raises: ValueError: an unknown modality, a weight that is no positive number, two parts of one modality in a row.
    """
    name, _, weight = text.partition(":")
    modalities = cast(tuple[Modality, ...], tuple(name.split("-")))
    known = get_args(Modality)
    if unknown := [modality for modality in modalities if modality not in known]:
        raise ValueError(f"task {text!r}: {unknown[0]!r} is no modality; join {', '.join(known)} by '-'")
    if any(first == second for first, second in zip(modalities, modalities[1:])):
        raise ValueError(f"task {text!r} has two parts of one modality in a row")
    if weight and not (weight.isdecimal() and int(weight) > 0):
        raise ValueError(f"task {text!r}: the weight {weight!r} must be a whole number above 0")
    return Task(modalities, int(weight or 1))


@dataclass
class Item:
    """What one thing has: its text, and where its latents are in the caches."""

    key: str
    text: str = ""
    places: dict[str, int] = field(default_factory=dict)  # cache -> index

    def has(self, task: Task) -> bool:
        """Whether the item has all that a task needs."""
        return all(self.text if name == "text" else name in self.places for name in task.modalities)


def join_items(caches: Caches) -> list[Item]:
    """The items of some caches: entries belong together where their sources have the same name without a suffix, and
    they are the same copy and part of it.

    Raises: ValueError: entries that belong together have different texts.
    """
    items: dict[tuple, Item] = {}
    for name, cache in caches.items():
        for index, entry in enumerate(cache.entries):
            stem = str(PurePosixPath(entry.get("source") or entry["key"]).with_suffix(""))
            key = (stem, entry.get("copy", 0), entry.get("part", 0))
            item = items.setdefault(key, Item("_".join(map(str, key))))
            text = entry["caption"].strip()
            if item.text and text and item.text != text:
                raise ValueError(
                    f"{cache.folder}: {stem!r} has the text {text!r}, but in {caches[next(iter(item.places))].folder} "
                    f"it is {item.text!r}; give both the same text, or different file names"
                )
            item.text = item.text or text
            item.places[name] = index
    return list(items.values())


class MultimodalDataset(Dataset):
    """Rows of streams: an item in a task. Training repeats the rows of a task by its weight; validation does not.

    A row is a dict with `index`, `task` (its number), `text` (list of ids), `other_text` (the text of an item that
    says something else), and where the task has them `image` and `audio`: mean and std of the posterior as tokens,
    (2, m, W).

    Args:
        caches: `image`, `audio` or both, of one split.
        tasks: kinds of streams.
        tokenizer: of the texts.
        config: of the model.
        is_training: whether weights count.
    Attributes: items, rows (item number, task number), fingerprint, entries (`key`, `caption`) of the rows.
    Raises: ValueError: no item has what a task needs; an audio clip or a stream is too long for the model.
    """

    def __init__(
        self,
        caches: Caches,
        tasks: Sequence[Task],
        tokenizer: PreTrainedTokenizerFast,
        *,
        config: MegaTransformerConfig,
        is_training: bool,
    ):
        self.caches, self.tasks, self.config = caches, list(tasks), config
        self.items = join_items(caches)
        core = document_encoder(tokenizer)
        self.texts = [encoding.ids for encoding in core.encode_batch([item.text for item in self.items])]
        self.rows: list[tuple[int, int]] = []
        for number, task in enumerate(self.tasks):
            chosen = [place for place, item in enumerate(self.items) if item.has(task)]
            if not chosen:
                folders = ", ".join(str(cache.folder) for cache in caches.values())
                raise ValueError(f"--tasks {task.name}: no item in {folders} has {', '.join(set(task.modalities))}")
            self.rows += [(place, number) for place in chosen for _ in range(task.weight if is_training else 1)]
        folders = [cache.fingerprint for cache in caches.values()]
        content = [*folders, tokenizer_hash(tokenizer), *(f"{task.name}:{task.weight}" for task in self.tasks)]
        self.fingerprint = fingerprint_of_bytes([part.encode() for part in content])
        self.check_lengths()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """`key` and `caption` of each row."""
        return [{"key": self.items[item].key, "caption": self.items[item].text} for item, _ in self.rows]

    def check_lengths(self) -> None:
        """Raises: ValueError: see the class."""
        for item, task in dict.fromkeys(self.rows):
            parts = [Part(name, ids=self.texts[item], n_tokens=self.n_tokens(item, name)) for name in
                     self.tasks[task].modalities]  # fmt: skip
            try:
                length = len(build_stream(self.config, parts))
            except ValueError as error:
                raise ValueError(
                    f"{self.items[item].key}: {error}; raise it with --override audio_max_tokens=..., or "
                    "audio_encoder_patch_size, or leave long clips out of the cache"
                ) from error
            if length > (limit := self.config.max_position_embeddings):
                raise ValueError(
                    f"{self.items[item].key} gives a stream of {length} tokens, more than max_position_embeddings="
                    f"{limit}; give --override max_position_embeddings={length}"
                )

    def n_tokens(self, item: int, modality: str) -> int:
        """Tokens of an item's image or audio."""
        if modality == "image":
            return self.config.image_n_tokens
        if modality == "text":
            return 0
        entry = self.caches[modality].entries[self.items[item].places[modality]]
        return -(-entry["length"] // self.config.audio_encoder_patch_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, task = self.rows[index]
        row: dict[str, Any] = {"index": torch.tensor(index), "task": torch.tensor(task), "text": self.texts[item]}
        row["other_text"] = self.other_text(item)
        for name in set(self.tasks[task].modalities) - {"text"}:
            sample = self.caches[name][self.items[item].places[name]]
            patch = getattr(self.config, f"{name}_encoder_patch_size")
            to_tokens = image_tokens if name == "image" else audio_tokens
            row[name] = torch.stack([to_tokens(sample[part], patch) for part in ("mean", "std")])
        return row

    def other_text(self, item: int) -> list[int]:
        """The text of another item, which says something else: the first such one from half the set away."""
        n = len(self.items)
        for step in range(n):
            other = self.texts[(item + n // 2 + step) % n]
            if other and other != self.texts[item]:
                return other
        return self.texts[item]


def collate_streams(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows of `MultimodalDataset`.

    Returns: `index`, `task` (B,) int64; `text`, `other_text`: B lists of ids; and for each modality that a row has
    `image` or `audio`, a dict with `latents` (n, 2, m, W), padded with zeros, `lengths` (n,), and `rows` (n,), those
    that they belong to.
    """
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in ("index", "task")}
    batch |= {name: [row[name] for row in rows] for name in ("text", "other_text")}
    for name in ("image", "audio"):
        numbers = [number for number, row in enumerate(rows) if name in row]
        if numbers:
            latents: list[Tensor] = [rows[number][name].transpose(0, 1) for number in numbers]  # (m, 2, W)
            batch[name] = {
                "latents": pad_sequence(latents, batch_first=True).transpose(1, 2).contiguous(),
                "lengths": torch.tensor([len(tokens) for tokens in latents]),
                "rows": torch.tensor(numbers),
            }
    return batch
