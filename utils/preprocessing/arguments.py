"""Flags of all preprocessing."""

import dataclasses
from typing import Any

from utils.options import declared_fields, option
from utils.preprocessing.shards import HOW_WRITTEN, Shard


@dataclasses.dataclass
class PreprocessArguments:
    """Flags of all preprocessing. A stage declares its further flags in a subclass."""

    # Raw data.
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

    # Validation split.
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

    # Output.
    output_dir: str = option("", "output folder; default: cached_datasets/<stage>")
    num_augmented_copies: int = option(0, "augmented copies of a training sample, in addition to the original", ge=0)
    seed: int = option(42, "seed of the augmentation", ge=0, lt=2**63)
    num_workers: int = option(-1, "worker processes; 0: the main process alone; -1: one per CPU", ge=-1)
    max_broken_fraction: float = option(0.01, "maximum fraction of broken raw files", ge=0, le=1)
    keep_duplicates: bool = option(False, "also train on files that equal one of the validation split")

    # Several processes or machines.
    shard: str = option("", "i/n: only the i-th of n shards, 1/n to n/n, written to <output_dir>.shard-i-of-n")
    merge: list[str] = option([], "folders of all shards to join in --output_dir; other flags are those of the shards")

    pack: int = option(0, "samples per file of a packed cache; 0: a file per sample", ge=0, only_with=("shard", ""))

    def validate_shard(self):
        Shard.parse(self.shard)

    def validate_source(self):
        if not self.dataset_name:
            raise ValueError("--dataset_name is missing: give a hub name, a folder, or an index file (.csv, .jsonl)")
        if self.limit == 0:
            raise ValueError("--limit=0 reads nothing; give a positive number, or -1 for all")


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
