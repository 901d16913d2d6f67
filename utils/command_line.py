"""The command line: declared options as flags, overrides of a configuration, errors that a user can cause."""

import argparse
import contextlib
import contextvars
import dataclasses
import json
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from dataset_loading.integrity import is_out_of_memory
from utils.distributed import launched_rank
from utils.options import (
    GivenFlags,
    check_effects,
    declared_fields,
    effect_conditions,
    inherited,
    is_met,
    suggest,
    type_name,
    validate_fields,
)

logger = logging.getLogger(__name__)


# What this command was asked, for errors that name its flags.
PARSED: contextvars.ContextVar[Any] = contextvars.ContextVar("PARSED", default=None)

# What gloo and NCCL say in the other processes when one ends in the middle of a run.
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")

# Flags that limit what is in memory at once, and a limit that is low for most models.
LIMITS = {
    "segment_frames": 64,
    "sequence_length": 256,
    "max_clip_frames": 250,
    "chunk_frames": 500,
    "max_new_tokens": 256,
    "max_pixels": 1_000_000,
    "n_beams": 1,
    "contact_sheet": 0,
    "num_workers": 0,
    "max_samples": 256,
}


@contextlib.contextmanager
def explained_errors(logger: logging.Logger) -> Iterator[None]:
    """Around a command: errors that a user can cause end it with their message and exit status 2, as do full memory,
    with the flags that help, and the loss of another process of the same run, which has said why it ended. A training
    whose numbers are no longer finite ends with its message and exit status 1, whatever launched it; rank 0 says it
    for all processes.

    The environment variable MEGATRANSFORMER_TRACEBACK=1 shows the traceback instead.
    """
    try:
        yield
    except FloatingPointError as error:
        if os.environ.get("MEGATRANSFORMER_TRACEBACK"):
            raise
        if launched_rank() == 0:
            logger.error("%s", error)
        raise SystemExit(1) from error
    except Exception as error:
        is_full = is_out_of_memory(error)
        is_lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PROCESS)
        is_explained = is_full or is_lost or isinstance(error, ValueError | OSError)
        if os.environ.get("MEGATRANSFORMER_TRACEBACK") or not is_explained:
            raise
        logger.error("%s", memory_message(error) if is_full else message_of(error))
        raise SystemExit(2) from error  # as argparse ends on a wrong command line


def memory_message(error: Exception) -> str:
    """What a command that is out of memory says: the allocator's words, and the flags that help."""
    functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    flags = memory_flags(PARSED.get(), is_evaluation=bool(functions & {"evaluate", "show"}))
    if "DataLoader worker" in str(error):
        flags = list(dict.fromkeys(["--num_workers 0", *flags]))[:3]
    remedy = f"give {', or '.join(flags)}" if flags else "use a smaller model, or a machine with more memory"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"out of memory ({reason[:300]}); {remedy}"


def memory_flags(args: Any, *, is_evaluation: bool = False) -> list[str]:
    """The three flags, with their values, that lower the memory of a command most: of those that it has, that have an
    effect and that are not set so already.

    Args:
        args: the parsed command; None: not known.
        is_evaluation: whether memory was full in the evaluation of a training.
    """
    values = {} if args is None else {field.name: getattr(args, field.name) for field in declared_fields(args)}
    conditions = {} if args is None else effect_conditions(type(args))
    values = {
        name: value
        for name, value in values.items()
        if all(is_met(required, getattr(args, other)) for other, required in conditions.get(name, []))
    }
    flags = []
    # Fewer samples at once; more micro-batches of a training leave its numbers as they are.
    names = ("batch_frames", "batch_tokens", "batch_size")
    names = ("eval_batch_size",) if is_evaluation and "eval_batch_size" in values else names
    if name := next((name for name in names if values.get(name)), None):
        n_parts = 2 * values.get("gradient_accumulation_steps", 0)
        parts = f" --gradient_accumulation_steps {n_parts}" if n_parts and not is_evaluation else ""
        flags += [f"--{name} {values[name] // 2}{parts}"] if values[name] not in (1, "auto") else []
    # Fewer numbers of each sample; 0 is no limit.
    switches = ("bf16",) if is_evaluation else ("use_gradient_checkpointing", "bf16")
    flags += [f"--{name}" for name in switches if values.get(name) is False]
    for name, most in LIMITS.items():
        limit = min(most, values.get(name, 0) // 2 or most)
        flags += [f"--{name} {limit}"] if name in values and values[name] not in (1, limit) else []
    flags += ["--no_use_ema"] if values.get("use_ema") else []
    return flags[:3]


def message_of(error: Exception) -> str:
    """The message of an error, also of one that a DataLoader's worker raised: torch wraps that in its traceback."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return f"another process of this run has ended, its message says why ({text.strip().splitlines()[-1]})"
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.\n", text):
        return text
    # The traceback ends with "<type>: <message>", after those of the errors that caused it.
    last = list(re.finditer(rf"^([\w.]+\.)?{type(error).__name__}: ", text, re.MULTILINE))
    return text[last[-1].end() :].rstrip() if last else text


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the closest known flag for an unknown one, refuses flags that are given twice,
    and accepts former names of flags.

    Attributes:
        renamed: former flag -> flag, such as `{"--n_pictures": "--n_images"}`. `--help` does not show the former ones.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.renamed: dict[str, str] = {}

    def current_name(self, word: str) -> str:
        """A word of the command line, a former flag in it replaced by today's, with a notice."""
        flag, equals, value = word.partition("=")
        if flag not in self.renamed:
            return word
        logger.warning("%s is now called %s; the former name still works", flag, self.renamed[flag])
        return f"{self.renamed[flag]}{equals}{value}"

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = [self.current_name(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace or GivenFlags())
        # argparse would only name the unknown flag; the closest known one helps more.
        if unknown:
            flags = [text for action in self._actions for text in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{suggest(unknown[0].split('=')[0], flags)}")
        return parsed


def parse_arguments(
    arguments_class: type,
    argv: list[str] | None,
    description: str,
    *,
    complete: Callable[[Any], None] = lambda arguments: None,
) -> Any:
    """Parse the command line into a dataclass of `option()` fields.

    Booleans become `--flag` and `--no_flag`, lists take several values. Prefixes of flags are allowed. A flag is given
    once, unless its values add up. `--local_rank`, which launchers append, is accepted. Flags given explicitly are
    listed in the attribute `given`.

    Args: complete: called before values are checked; it may set flags that were not given.
    Raises:
        SystemExit: with status 2 and a message naming flag, value and rule, for any wrong input.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=formatter,
        argument_default=argparse.SUPPRESS,
    )
    # A flag per declared field, and the one that launchers append.
    defaults = arguments_class()
    for field in declared_fields(arguments_class):
        add_flag(parser, field, getattr(defaults, field.name))
        aliases = inherited(arguments_class, field.name, "aliases") or ()
        # Former names are not flags of their own, which would make abbreviations ambiguous.
        parser.renamed |= {f"--{alias}": f"--{field.name}" for alias in aliases}
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # SUPPRESS as the default leaves out flags that were not given: what is there was given.
    values = vars(parser.parse_args(argv))
    values.pop("local_rank", None)
    parsed = arguments_class(**values)
    parsed.given = sorted(values)
    complete(parsed)
    try:
        # Types and bounds, then flags that the others switch off.
        validate_fields(parsed, "--{}")
        check_effects(parsed, parsed.given, "--{name}")
    except ValueError as error:
        parser.error(str(error))
    PARSED.set(parsed)
    return parsed


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, default: Any) -> None:
    """Add the flag of one declared field."""
    # `int | None` is parsed as int; None is only a default.
    kinds = [part for part in typing.get_args(field.type) if part is not types.NoneType]
    optional = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    kind = kinds[0] if optional else field.type
    # The help text; argparse reads a single % as a format.
    meaning = field.metadata["meaning"].replace("%", "%%")
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    text = f"{meaning} (default: {shown})" if shown else meaning
    if kind is bool:
        parser.add_argument(f"--{field.name}", action="store_true", help=text)
        parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is Literal:
        # Not argparse's `choices`: `validate_fields` also suggests the closest one.
        parser.add_argument(f"--{field.name}", help=f"{text}; {type_name(kind)}")
    elif typing.get_origin(kind) is list:
        # Choices are parsed as strings, which `validate_fields` checks.
        item = typing.get_args(kind)[0]
        item = str if typing.get_origin(item) is Literal else item
        action = AddUp if field.metadata["adds_up"] else "store"
        parser.add_argument(f"--{field.name}", nargs="*", type=item, help=text, action=action)
    else:
        words = [word for part in kinds if typing.get_origin(part) is Literal for word in typing.get_args(part)]
        kind = number_or(words, kind) if optional and words else kind
        # A flag that is given without a value takes `bare`, where the option has one.
        bare = field.metadata["bare"]
        parser.add_argument(
            f"--{field.name}", type=kind, help=text, **({} if bare is None else {"nargs": "?", "const": bare})
        )


def number_or(words: list[str], kind: type) -> Callable[[str], Any]:
    """A parser of numbers or some words, named as argparse's errors call what it reads."""

    def parse(text: str) -> Any:
        return text if text in words else kind(text)

    parse.__name__ = f"{kind.__name__} or {' or '.join(words)}"
    return parse


class AddUp(argparse.Action):
    """A list of all values of a flag that may be given several times."""

    def __call__(self, parser, namespace, values, option_string=None):
        # Past `GivenFlags.__setattr__`, which takes a flag once.
        vars(namespace).setdefault(self.dest, []).extend(values)


def parse_overrides(pairs: list[str], config_fields: dict[str, Any]) -> dict[str, Any]:
    """`["n_layers=2", "use_x=true"]` as a dict; values are read as JSON where they are JSON, else as strings.

    Raises:
        ValueError: a pair without `=`, a name that is not among `config_fields` (a suggestion is added), or a name
            with two values.
    """
    overrides: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--override {pair!r} must read key=value")
        if name not in config_fields:
            raise ValueError(f"--override: the configuration has no field {name!r}{suggest(name, config_fields)}")
        if texts.setdefault(name, text) != text:
            raise ValueError(f"--override gives {name} twice: {name}={texts[name]} and {pair}; leave one out")
        # Numbers, lists, true, false and null are JSON; a bare word is not, and stays a string.
        try:
            overrides[name] = json.loads(text)
        except json.JSONDecodeError:
            overrides[name] = text
    return overrides
