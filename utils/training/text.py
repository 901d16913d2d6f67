"""Texts of a stage: tokenisation, and checks that model, tokenizer and data belong together."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset_loading.text.sources import check_path
from dataset_loading.text.tokenizers import document_ends
from dataset_loading.text.windows import TextDataset, prepare_text
from utils.checkpoints import read_stage, resolve_checkpoint
from utils.configuration import MegaTransformerConfig
from utils.generation.foreign_weights import format_of
from utils.generation.text import check_tokenizer

logger = logging.getLogger(__name__)


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder of another library holds a tokenizer."""
    return any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def take_tokenizer(args: Any) -> None:
    """Texts are tokenised by the tokenizer of a Llama that a run starts from, unless another one is named."""
    is_open = args.text_dataset and args.init_from and "tokenizer" not in args.given
    if is_open and format_of(args.init_from) and has_tokenizer(args.init_from):
        args.tokenizer = args.init_from


def tokenize_texts(args: Any, folder: Path) -> None:
    """Tokenise the texts that the flags name into a folder, or find that they are there; nothing without a name.

    Raises: FileNotFoundError: no texts are named, and the folder is not there.
    """
    # Raises where there are neither texts nor a cache.
    untokenized(args, folder)
    if not args.text_dataset:
        return
    prepare_text(
        args.text_dataset,
        folder,
        args.tokenizer,
        vocab_size=args.tokenizer_vocab_size if args.tokenizer == "bpe" else None,
        text_column=args.text_column,
        dataset_config=args.text_config,
        dataset_split=args.text_split,
        validation_source=args.validation_dataset,
        validation_split=args.validation_split,
        validation_fraction=args.validation_fraction,
        keep_duplicates=args.keep_duplicates,
        document_bytes=args.document_bytes,
        max_broken_fraction=args.max_broken_fraction,
    )


def untokenized(args: Any, folder: Path) -> str:
    """What `tokenize_texts` would write, in words; "" where the folder is there.

    Raises: FileNotFoundError: no texts are named, or they do not exist, and the folder is not there.
    """
    if folder.exists():
        return ""
    if not args.text_dataset:
        raise FileNotFoundError(f"{folder} does not exist; name texts with --text_dataset, which are prepared there")
    for name in filter(None, (args.text_dataset, args.validation_dataset)):
        check_path(name)
    trained = f", which is trained for {args.tokenizer_vocab_size:,} tokens" if args.tokenizer == "bpe" else ""
    return f"{args.text_dataset}, tokenised by {args.tokenizer!r}{trained}, in {folder}"


def check_checkpoint(path: str | Path, dataset: TextDataset) -> None:
    """Check that a run can go on from a checkpoint.

    Args:
        path: run or checkpoint folder, or that of a Llama, which may lack its tokenizer.
        dataset: the texts of this run.
    Raises: ValueError: it is of another stage or tokenizer.
    """
    if format_of(path):
        if not has_tokenizer(path):
            logger.warning(
                "%s has no tokenizer: the ids of %s must be those that it was trained on", path, dataset.folder
            )
            return
        advice = f"prepare them with --tokenizer {path} and another --cached_dataset"
        check_tokenizer(Path(path), dataset, advice)
        return
    folder = resolve_checkpoint(path)
    record = read_stage(folder)
    if record["stage"] != "multimodal":
        raise ValueError(
            f"{folder} is of stage {record['stage']!r}, a language model goes on from checkpoints of stage "
            "'multimodal': name one of them, or leave --init_from and --resume_from_checkpoint out"
        )
    # The tokenizer must be that of the checkpoint: ids mean nothing to another one.
    advice = f"prepare them with --tokenizer {folder} and another --cached_dataset, or train a new model"
    check_tokenizer(folder, dataset, advice)


def check_core_flags(args: Any, config: MegaTransformerConfig) -> None:
    """Raises: ValueError: flags of the recurrent core for a model without one, or more steps than the core takes."""
    # Flags that act on a recurrent core alone.
    names = ("recurrent_steps_per_rank", "recurrent_curriculum", "eval_thinking_steps")
    given = [name for name in names if getattr(args, name)]
    if given and not config.n_recurrent_layers:
        raise ValueError(f"--{given[0]} has no effect: --config {args.config} has no recurrent core")
    # A fixed number of steps is not sampled.
    is_fixed = config.recurrent_steps_distribution == "fixed"
    if args.recurrent_steps_per_rank and is_fixed:
        raise ValueError("--recurrent_steps_per_rank has no effect with recurrent_steps_distribution='fixed'")
    # The core takes no more steps than its maximum.
    limit = config.recurrent_max_thinking_steps
    if args.eval_thinking_steps and max(args.eval_thinking_steps) > limit:
        raise ValueError(f"--eval_thinking_steps={args.eval_thinking_steps}: recurrent_max_thinking_steps={limit}")


def fit_to_tokenizer(
    config: MegaTransformerConfig, dataset: TextDataset, overrides: Sequence[str]
) -> MegaTransformerConfig:
    """The configuration with the vocabulary and special tokens of tokenised texts.

    Args: overrides: the `key=value` that the user gave; one of vocab_size may round the vocabulary up.
    Raises: ValueError: an override contradicts the tokenizer, or windows are longer than the model's positions.
    """
    # What the tokenizer requires; an override may only agree, or round the vocabulary up.
    begin, end = document_ends(dataset.tokenizer)
    required = {"vocab_size": dataset.vocab_size, "pad_token_id": dataset.padding}
    required |= {"bos_token_id": begin, "eos_token_id": end}
    for name in {pair.partition("=")[0] for pair in overrides} & required.keys():
        value = getattr(config, name)
        if name == "vocab_size" and value >= required[name]:
            required[name] = value  # Rounded up, as matrices of some sizes are faster.
        elif value != required[name]:
            rule = "at least " if name == "vocab_size" else ""
            raise ValueError(
                f"--override {name}={value} does not fit the tokenizer of {dataset.folder}: "
                f"{name} must be {rule}{required[name]}"
            )
    # Every token of a window needs a position.
    if dataset.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"--sequence_length={dataset.sequence_length} exceeds max_position_embeddings="
            f"{config.max_position_embeddings}; give --override max_position_embeddings={dataset.sequence_length}"
        )
    return dataclasses.replace(config, **required)
