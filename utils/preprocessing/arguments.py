"""Flags of all preprocessing."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from utils.flags.choices import MAX_PIXELS, ResizeMode
from utils.options import Section, declared_fields, option

# Flags that say how rows are read, where and how samples are written, not which ones: the manifest does not hold them.
HOW_WRITTEN = ("shard", "merge", "pack", "streaming")
# Flags with the names of the fields of `Augmentation`.
AUGMENTATIONS = ("random_resized_crop", "horizontal_flip", "color_jitter", "rotation")


@dataclasses.dataclass
class PreprocessArguments:
    """Flags of all preprocessing. A stage declares its further flags in a subclass."""

    SECTION_DATA: ClassVar = Section("Raw data")
    dataset_name: str = option(
        "", "raw data set: hub name, folder, index file (.csv, .jsonl), or tars by folder, pattern or address"
    )
    dataset_config: str = option("", "configuration of a hub data set")
    dataset_split: str = option("train", "split of the raw data set")
    allow_outside: bool = option(False, "read files outside of the data set's folder, where its metadata names them")
    media_column: str = option("", "column of a hub data set with the media files; default: the only one of its type")
    caption_column: str = option("text", "column with the captions; default: text, caption or captions")
    streaming: bool = option(
        False,
        "read rows of hub data sets and parquet files one by one, not downloaded or listed first; tars always are",
    )
    limit: int = option(-1, "number of rows to read, from the first one; -1: all", ge=-1)

    SECTION_VALIDATION: ClassVar = Section("Validation split")
    validation_fraction: float = option(
        0.05,
        "fraction of the validation split, chosen by a hash of the raw file's name",
        ge=0,
        lt=1,
        only_with=("validation_dataset", ""),
    )
    validation_dataset: str = option("", "hub name or folder of a separate validation set")
    validation_split: str = option(
        "", "split of the validation set; default: its only one", only_with=("validation_dataset", bool)
    )

    SECTION_OUTPUT: ClassVar = Section("Output")
    output_dir: str = option("", "output folder; default: cached_datasets/<stage>")
    num_augmented_copies: int = option(0, "augmented copies of a training sample, in addition to the original", ge=0)
    seed: int = option(42, "seed of the augmentation", ge=0, lt=2**63)
    num_workers: int = option(-1, "worker processes; 0: the main process alone; -1: one per CPU", ge=-1)
    max_broken_fraction: float = option(0.01, "maximum fraction of broken raw files", ge=0, le=1)
    keep_duplicates: bool = option(False, "also train on files that equal one of the validation split")

    SECTION_SHARDS: ClassVar = Section("Several processes or machines")
    shard: str = option("", "i/n: only the i-th of n shards, 1/n to n/n, written to <output_dir>.shard-i-of-n")
    merge: list[str] = option([], "folders of all shards to join in --output_dir; other flags are those of the shards")

    pack: int = option(0, "samples per file of a packed cache; 0: a file per sample", ge=0, only_with=("shard", ""))

    def validate_shard(self):
        read_shard(self.shard)

    def validate_merge(self):
        if self.merge:
            raise ValueError(f"--merge={self.merge} in a file of flags: give --merge on the command line")

    def validate_source(self):
        if not self.dataset_name:
            raise ValueError("--dataset_name is missing: give a hub name, a folder, or an index file (.csv, .jsonl)")
        if self.limit == 0:
            raise ValueError("--limit=0 reads nothing; give a positive number, or -1 for all")


def read_shard(text: str) -> tuple[int, int]:
    """Index and number of shards of `i/n`, 0 of 0 for `""`. Raises: ValueError: names the value and the form."""
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard={text!r} must be i/n with 1 <= i <= n, such as 2/8")
    return int(match[1]), int(match[2])


def command_words(script: str, args: Any) -> list[str]:
    """The command line that gives these arguments: flags that differ from their defaults."""
    words = [script]
    for field in declared_fields(args):
        value, default = getattr(args, field.name), getattr(type(args)(), field.name)
        if value == default or field.name in HOW_WRITTEN:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@dataclasses.dataclass
class BatchedPreprocessArguments(PreprocessArguments):
    """Flags of preprocessing with a model, in batches."""

    SECTION_ENCODER: ClassVar = Section("Encoder")
    batch_size: int = option(32, "samples per batch of the encoder", gt=0)
    bf16: bool = option(False, "bfloat16 autocast in the encoder; often file access is the bottleneck")


@dataclasses.dataclass
class MergeArguments:
    """The flags of the joining; all others are those of the shards."""

    merge: list[str] = option([], "folders of all shards, in any order")
    output_dir: str = option("", "output folder; default: cached_datasets/<stage>")
    pack: int = option(0, "samples per file of a packed cache; 0: a file per sample", ge=0)

    def validate_merge(self):
        if not self.merge:
            raise ValueError("--merge names no folder; give those of all shards, such as <output_dir>.shard-*-of-4")


def asks_to_merge(argv: Sequence[str] | None) -> bool:
    """Whether a command line joins shards."""
    flags = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    return "--merge" in flags


def arguments_or_merge(arguments_class: type, argv: Sequence[str] | None = None) -> type:
    """The flags of a command line of preprocessing: those of the stage, or of joining shards."""
    return MergeArguments if asks_to_merge(argv) else arguments_class


@dataclasses.dataclass
class ImageArguments(PreprocessArguments):
    """Flags of all preprocessing stages that read images."""

    SECTION_IMAGES: ClassVar = Section("Images")
    resize_mode: ResizeMode = option("crop", "how images get the proportions of a square or of their bucket")
    aspect_buckets: list[str] = option(
        [],
        "aspect ratios, such as 1:1 3:2 2:3: an image gets the nearest, at about image_size^2 pixels; none: squares",
    )
    bucket_multiple: int = option(
        32,
        "sides of aspect-ratio buckets are multiples of this: the VAE's compression times 2 per level of the UNet",
        gt=0,
        only_with=("aspect_buckets", bool),
    )
    background_color: str = option("white", "color of transparent pixels and of padding; name or #rrggbb")
    min_image_size: int = option(16, "minimum side in pixels; smaller images are left out", gt=0)
    max_image_pixels: int = option(
        MAX_PIXELS, "maximum number of pixels; larger images count as broken, for lack of memory", gt=0
    )

    def validate_buckets(self):
        if not self.aspect_buckets and "aspect_buckets" in getattr(self, "given", ()):
            raise ValueError("--aspect_buckets is empty; name ratios of width to height, such as 1:1 3:2 2:3")
        if self.aspect_buckets:
            # It imports torch, see below.
            from dataset_loading.image.buckets import parse_ratio

            for ratio in self.aspect_buckets:
                parse_ratio(ratio, "aspect_buckets")

    def validate_background(self):
        # It imports torch, which takes a second that --help and a mistyped flag need not wait for.
        from dataset_loading.image.pixels import check_color

        check_color("background_color", self.background_color)


@dataclasses.dataclass
class ImageVAEPreprocessArguments(ImageArguments):
    """Flags of this stage."""

    SECTION_IMAGES: ClassVar = Section("Images")
    image_size: int = option(128, "side S of square images in pixels", gt=0)

    SECTION_AUGMENTATION: ClassVar = Section("Augmentation of the copies")
    random_resized_crop: float = option(
        1.0,
        "minimum fraction of the area in a random crop; 1: off",
        gt=0,
        le=1,
        bare=0.5,
        only_with=("num_augmented_copies", bool),
    )
    horizontal_flip: float = option(
        0.0, "probability of a horizontal flip", ge=0, le=1, bare=0.5, only_with=("num_augmented_copies", bool)
    )
    color_jitter: float = option(
        0.0,
        "maximum change of brightness, contrast and saturation",
        ge=0,
        lt=1,
        bare=0.2,
        only_with=("num_augmented_copies", bool),
    )
    rotation: float = option(
        0.0, "maximum rotation in degrees", ge=0, le=45, bare=10.0, only_with=("num_augmented_copies", bool)
    )

    def validate_augmentation(self):
        # Copies differ only by augmentations that are on.
        used = [name for name in AUGMENTATIONS if getattr(self, name) != getattr(type(self), name)]
        if self.num_augmented_copies and not used:
            raise ValueError(
                f"--num_augmented_copies needs one of --{', --'.join(AUGMENTATIONS)}, or copies are equal"
            )


@dataclasses.dataclass
class ImageDiffusionPreprocessArguments(ImageArguments, BatchedPreprocessArguments):
    """Flags of this stage."""

    SECTION_ENCODER: ClassVar = Section("Encoder")
    vae_checkpoint: str = option("", "run or checkpoint folder of the VAE; its averaged weights are used")
    vae_config: str = option("", "preset that the VAE must have been trained with; default: any")
    SECTION_IMAGES: ClassVar = Section("Images")
    image_size: int = option(0, "side of the images in pixels, divisible by the compression; 0: the VAE's", ge=0)
    horizontal_flip: bool = option(False, "also store the latents of the mirrored image")
    SECTION_CAPTIONS: ClassVar = Section("Captions")
    max_tokens: int = option(128, "maximum tokens of a caption (bytes or the text encoder's); the rest is cut", gt=0)
    text_encoder: str = option("", "frozen text encoder whose hidden states are stored, too: local folder or hub name")
    seed: int = option(42, "seed of the augmentation", ge=0, lt=2**63, only_with=("num_augmented_copies", bool))

    def validate_vae(self):
        if not self.vae_checkpoint:
            raise ValueError("--vae_checkpoint is missing: give a run of pretrain_image_vae.py, runs/image_vae/NAME")
        if self.num_augmented_copies:
            raise ValueError("--num_augmented_copies has no effect on latents; --horizontal_flip stores mirrored ones")
