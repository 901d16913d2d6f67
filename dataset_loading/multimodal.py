"""Items that have texts, images and audio, joined from caches of latents, and the streams that are made of them and of
windows of further text.

W latent values of a token, m tokens of a span, B rows of a batch.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.content import stem_of
from dataset_loading.files import fingerprint_of_bytes
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.text.tokenizers import document_encoder, tokenizer_hash
from dataset_loading.text.windows import TextDataset
from model.multimodal.layout import Part, audio_tokens, build_stream, image_tokens
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import Modality

logger = logging.getLogger(__name__)

N_NAMED = 5  # Items that a message names.
MAX_LEFT_OUT = 0.05  # Fraction of the streams that may be too long for the model; more are an error.

Caches = Mapping[str, ImageLatentDataset | AudioLatentDataset]


@dataclass(frozen=True)
class Task:
    """A kind of stream, such as text and then an image, and how often each item comes in it per epoch."""

    modalities: tuple[Modality, ...]
    weight: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """The modalities in their order, `text-image`."""
        return "-".join(self.modalities)

    def n_rows(self, place: int) -> int:
        """Rows per epoch of the item at a place: with weight 2.5 they are 2, 3, 2, 3, ..."""
        return int((place + 1) * self.weight) - int(place * self.weight)


def parse_task(text: str) -> Task:
    """A task from `text-image`, `text-image:3` or `text-image-text:0.2`.

    Raises: ValueError: an unknown modality, a weight that is no positive number, two parts of one modality in a row.
    """
    name, _, weight = text.partition(":")
    modalities = cast(tuple[Modality, ...], tuple(name.split("-")))
    known = get_args(Modality)
    if unknown := [modality for modality in modalities if modality not in known]:
        raise ValueError(f"task {text!r}: {unknown[0]!r} is no modality; join {', '.join(known)} by '-'")
    if any(first == second for first, second in zip(modalities, modalities[1:])):
        raise ValueError(f"task {text!r} has two parts of one modality in a row")
    if weight and not (weight.replace(".", "", 1).isdecimal() and Fraction(weight) > 0):
        raise ValueError(f"task {text!r}: the weight {weight!r} must be a number above 0 in digits, such as 3 or 0.2")
    return Task(modalities, Fraction(weight or 1))


@dataclass
class Item:
    """What one thing has: its text, and where its latents are in the caches."""

    key: str
    text: str = ""
    places: dict[str, int] = field(default_factory=dict)  # cache -> index
    stem: str = ""  # of its sources' names

    def has(self, task: Task) -> bool:
        """Whether the item has all that a task needs."""
        return all(self.text if name == "text" else name in self.places for name in task.modalities)


def join_items(caches: Caches) -> list[Item]:
    """The items of some caches: entries belong together where their sources have the same name without the ending of a
    file (`v1.5_take.png` and `v1.5_take.wav`), and they are the same copy and part of it. Of several such entries in
    one cache, such as a source with several captions or a recording in pieces, each is an item, with those of the same
    text in the other caches.

    Raises: ValueError: entries that belong together have different texts.
    """
    items: dict[tuple, list[Item]] = {}
    for name, cache in caches.items():
        groups: dict[tuple, list[int]] = {}
        for index, entry in enumerate(cache.entries):
            groups.setdefault((stem_of_entry(entry), entry.get("copy", 0), entry.get("part", 0)), []).append(index)
        for key, indices in groups.items():
            texts = [cache.entries[index]["caption"].strip() for index in indices]
            known = items.setdefault(key, [])
            others = [item.text for item in known if item.text]
            if others and any(texts) and not set(texts) & set(others):
                raise ValueError(
                    f"{cache.folder}: {key[0]!r} has the text {next(filter(None, texts))!r}, but in "
                    f"{caches[next(iter(known[0].places))].folder} it is {others[0]!r}; give both the same text, or "
                    "different file names"
                )
            for index, text in zip(indices, texts):
                item = free_item(known, name, text)
                if item is None:
                    item = Item("_".join(map(str, (*key, *([len(known) + 1] if known else [])))), stem=key[0])
                    known.append(item)
                item.text = item.text or text
                item.places[name] = index
    return [item for known in items.values() for item in known]


def stem_of_entry(entry: Mapping[str, Any]) -> str:
    """The name of an entry's source without the ending of its file."""
    return stem_of(entry.get("source") or entry["key"])


def torn_items(training: Caches, held_out: Caches) -> set[str]:
    """Names that are trained on in one cache and held out in another, as where a hash of `a.png` and one of `a.flac`
    chose the splits: their texts would be on both sides. Names that a cache has in both of its splits are of different
    things, such as `train/1.png` and `test/1.png`."""
    trained, validated = set[str](), set[str]()
    for name, cache in training.items():
        stems, held_out_stems = ({stem_of_entry(entry) for entry in part.entries} for part in (cache, held_out[name]))
        trained |= stems - held_out_stems
        validated |= held_out_stems - stems
    return trained & validated


def free_item(items: Sequence[Item], cache: str, text: str) -> Item | None:
    """The first item without an entry of a cache that has the same text, or else where one of the texts is empty."""
    free = [item for item in items if cache not in item.places]
    same = [item for item in free if item.text == text]
    return next(iter(same or [item for item in free if not (item.text and text)]), None)


class MultimodalDataset(Dataset):
    """Rows of streams: an item in a task, or a window of text. Training repeats the rows of a task by its weight;
    validation does not.

    A row is a dict with `index`, `task` (its number), `text` (list of ids), and where the task has them `image` and
    `audio`: mean and std of the posterior as tokens, (2, m, W). Validation adds `other_text`, the text of an item that
    says something else. Rows of a window have `documents`, the number of each token's document, and `n_bytes`, UTF-8
    bytes of the targets.

    Args:
        caches: `image`, `audio` or both, of one split.
        tasks: kinds of streams.
        tokenizer: of the texts.
        config: of the model.
        is_training: whether weights count.
        windows: of further text, which the task `text` has in place of the items' texts.
        held_out: names of items that are left out, see `torn_items`.
    Attributes: items, rows (number of the item or of the window, task number), lengths (tokens of each row),
        fingerprint, entries (`key`, `caption`) of the rows.
    Raises: ValueError: no item has what a task needs; more than a few streams, or all of a task, are too long for the
        model, or their audio is.
    """

    def __init__(
        self,
        caches: Caches,
        tasks: Sequence[Task],
        tokenizer: PreTrainedTokenizerFast,
        *,
        config: MegaTransformerConfig,
        is_training: bool,
        windows: TextDataset | None = None,
        held_out: Collection[str] = (),
    ):
        self.caches, self.tasks, self.config, self.windows = caches, list(tasks), config, windows
        self.items = [item for item in join_items(caches) if item.stem not in held_out]
        self.is_training = is_training
        core = document_encoder(tokenizer)
        self.texts = [encoding.ids for encoding in core.encode_batch([item.text for item in self.items])]
        self.rows = [row for number in range(len(self.tasks)) for row in self.rows_of(number)]
        folders = [cache.fingerprint for cache in caches.values()]
        content = [*folders, tokenizer_hash(tokenizer), *(f"{task.name}:{task.weight}" for task in self.tasks)]
        content += sorted(held_out)
        if windows is not None:
            content += [windows.fingerprint, str(windows.sequence_length)]
        self.fingerprint = fingerprint_of_bytes([part.encode() for part in content])
        self.lengths = self.measure_rows()
        self.describe_unused()

    def rows_of(self, number: int) -> list[tuple[int, int]]:
        """The rows of a task. Raises: ValueError: there is none."""
        task = self.tasks[number]
        if self.is_window(number):
            assert self.windows is not None
            chosen: Sequence[int] = range(len(self.windows))
        else:
            chosen = [place for place, item in enumerate(self.items) if item.has(task)]
        folders = ", ".join(str(cache.folder) for cache in self.caches.values())
        if not chosen:
            names = ", ".join(dict.fromkeys(task.modalities))
            raise ValueError(f"--tasks {task.name}: no item in {folders} has {names}")
        counts = [task.n_rows(order) if self.is_training else 1 for order in range(len(chosen))]
        rows = [(place, number) for place, count in zip(chosen, counts) for _ in range(count)]
        if not rows:
            raise ValueError(
                f"--tasks {task.name}:{float(task.weight):g} gives no row of {len(chosen)} items in {folders}; raise "
                f"the weight to {1 / len(chosen):.2g} or more, or leave the task out"
            )
        return rows

    def is_window(self, task: int) -> bool:
        """Whether the rows of a task are windows of text."""
        return self.windows is not None and self.tasks[task].modalities == ("text",)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """`key` and `caption` of each row; a window has no caption."""
        keys = [{"key": item.key, "caption": item.text} for item in self.items]
        return [
            {**self.windows.entries[place], "caption": ""} if self.windows and self.is_window(task) else keys[place]
            for place, task in self.rows
        ]

    def describe_unused(self) -> None:
        """Name the items that come in no task in the log."""
        used = {place for place, task in self.rows if not self.is_window(task)}
        unused = [place for place, item in enumerate(self.items) if place not in used]
        if not unused:
            return
        named = []
        for item in (self.items[place] for place in unused[:N_NAMED]):
            lacking = ", ".join(name for name in ("text", *self.caches) if not self.has(item, name))
            named.append(f"{item.key} {f'lacks {lacking}' if lacking else 'is too long, or not drawn'}")
        shown = "; ".join(named)
        logger.info(
            "%d of %d items come in no row of --tasks: %s%s",
            *(len(unused), len(self.items), shown, "; ..." if len(unused) > N_NAMED else ""),
        )

    def has(self, item: Item, modality: str) -> bool:
        """Whether an item has a modality."""
        return item.has(Task((modality,)))  # type: ignore[arg-type]

    def measure_rows(self) -> list[int]:
        """Tokens of each row; a few rows that are too long are left out, with a warning.

        Raises: ValueError: see the class.
        """
        lengths, problems = {}, {}
        for row in dict.fromkeys(self.rows):
            try:
                lengths[row] = self.measure(*row)
            except ValueError as error:
                problems[row] = f"{error}"
        emptied = set(range(len(self.tasks))) - {task for _, task in lengths}
        if problems and (emptied or len(problems) > MAX_LEFT_OUT * (len(lengths) + len(problems))):
            raise ValueError(next(problem for row, problem in problems.items() if not emptied or row[1] in emptied))
        if problems:
            logger.warning(
                "%d of %d streams are too long and are left out, the first: %s",
                *(len(problems), len(lengths) + len(problems), next(iter(problems.values()))),
            )
        self.rows = [row for row in self.rows if row in lengths]
        return [lengths[row] for row in self.rows]

    def measure(self, place: int, task: int) -> int:
        """Tokens of a row. Raises: ValueError: it is too long for the model."""
        if self.windows is not None and self.is_window(task):
            key, length = f"{self.windows.folder}", self.windows.sequence_length
        else:
            key, length = self.items[place].key, self.measure_stream(place, task)
        if length > (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"{key} gives a stream of {length} tokens, more than max_position_embeddings={limit}; give "
                f"--override max_position_embeddings={length}"
            )
        return length

    def measure_stream(self, item: int, task: int) -> int:
        """Tokens of an item's stream. Raises: ValueError: its audio is too long."""
        parts = [
            Part(name, ids=self.texts[item], n_tokens=self.n_tokens(item, name))
            for name in self.tasks[task].modalities
        ]
        try:
            return len(build_stream(self.config, parts))
        except ValueError as error:
            raise ValueError(
                f"{self.items[item].key}: {error}; raise it with --override audio_max_tokens=..., or "
                "audio_encoder_patch_size, or leave long clips out of the cache"
            ) from error

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
        place, task = self.rows[index]
        row: dict[str, Any] = {"index": torch.tensor(index), "task": torch.tensor(task)}
        if self.windows is not None and self.is_window(task):
            window = self.windows[place]
            n_tokens = int((window["segment_ids"] >= 0).sum())  # The rest is padding.
            row |= {"text": window["input_ids"][:n_tokens].tolist(), "n_bytes": window["n_bytes"]}
            row["documents"] = window["segment_ids"][:n_tokens].tolist()
        else:
            row |= {"text": self.texts[place], **self.latents_of(place, task)}
        if not self.is_training:
            row["other_text"] = row["text"] if "documents" in row else self.other_text(place)
        return row

    def latents_of(self, item: int, task: int) -> dict[str, Tensor]:
        """Latents of the modalities that a task has, as tokens."""
        tokens = {}
        for name in set(self.tasks[task].modalities) - {"text"}:
            sample = self.caches[name][self.items[item].places[name]]
            patch = getattr(self.config, f"{name}_encoder_patch_size")
            to_tokens = image_tokens if name == "image" else audio_tokens
            tokens[name] = torch.stack([to_tokens(sample[part], patch) for part in ("mean", "std")])
        return tokens

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

    Returns: `index`, `task`, `n_bytes` (B,) int64; `text`, `documents`, and in validation `other_text`: B lists of
    ids, without documents None; and for each modality that a row has `image` or `audio`, a dict with `latents` (n, 2,
    m, W), padded with zeros, `lengths` (n,), and `rows` (n,), those that they belong to.
    """
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in ("index", "task")}
    batch["n_bytes"] = torch.tensor([int(row.get("n_bytes", 0)) for row in rows])
    batch |= {name: [row[name] for row in rows] for name in ("text", "other_text") if name in rows[0]}
    batch["documents"] = [row.get("documents") for row in rows]
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
