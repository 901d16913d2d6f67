"""The command line: declared options as flags, overrides of a configuration, errors that a user can cause."""

import contextlib
import contextvars
import dataclasses
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from utils.flags.config_file import read_settings, words_of
from utils.flags.parser import StrictParser, build_parser
from utils.options import check_effects, declared_fields, effect_conditions, is_met, suggest, validate_fields

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
        from utils.distributed import launched_rank  # It imports torch, which --help need not wait for.

        if launched_rank() == 0:
            logger.error("%s", error)
        raise SystemExit(1) from error
    except Exception as error:
        message = explanation_of(error)
        if os.environ.get("MEGATRANSFORMER_TRACEBACK") or message is None:
            raise
        logger.error("%s", message)
        raise SystemExit(2) from error  # as argparse ends on a wrong command line


def explanation_of(error: Exception) -> str | None:
    """What to tell of an error that a user can cause, see `explained_errors`; None of any other, a mistake of ours."""
    from dataset_loading.integrity import is_out_of_memory  # It imports torch, too.

    if is_out_of_memory(error):
        return memory_message(error)
    is_lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PROCESS)
    return message_of(error) if is_lost or isinstance(error, ValueError | OSError | FloatingPointError) else None


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


def check_flags(arguments_class: type, description: str | None) -> None:
    """Answer `--help` and end on wrong flags: at the beginning of a script, before imports that take seconds. Its main
    program parses the same flags again.

    Raises: SystemExit: with status 0 after the help, 2 with a message for any wrong input.
    """
    parser, parsed = read_flags(arguments_class, None, description or "")
    # The flags of a resumed run are checked together with those of its checkpoint, by the main program.
    if not getattr(parsed, "resume_from_checkpoint", ""):
        check_values(parser, parsed)


def parse_arguments(
    arguments_class: type,
    argv: list[str] | None,
    description: str,
    *,
    complete: Callable[[Any], None] = lambda arguments: None,
) -> Any:
    """Parse the command line into a dataclass of `option()` fields.

    Booleans become `--flag` and `--no_flag`, and take true or false; lists take several values. Prefixes of flags are
    allowed. A flag is given once, unless its values add up. `--config_file` names a file of flags, over which the
    command line wins. `--local_rank`, which launchers append, is accepted. Flags given explicitly, also by the file,
    are listed in the attribute `given`.

    Args: complete: called before values are checked; it may set flags that were not given.
    Raises:
        SystemExit: with status 2 and a message naming flag, value and rule, for any wrong input.
    """
    parser, parsed = read_flags(arguments_class, argv, description)
    for notice in parser.notices:
        logger.warning("%s", notice)
    complete(parsed)
    check_values(parser, parsed)
    PARSED.set(parsed)
    return parsed


def read_flags(arguments_class: type, argv: list[str] | None, description: str) -> tuple[StrictParser, Any]:
    """The flags of the command line and of its file, of the right types but not checked against each other."""
    parser = build_parser(arguments_class, description)
    # SUPPRESS as the default leaves out flags that were not given: what is there was given.
    values = vars(parser.parse_args(argv))
    values.pop("local_rank", None)
    file = values.pop("config_file", "")
    settings = read_config_file(parser, arguments_class, file) if file else {}
    values |= left_by_command(arguments_class, settings, values)
    parsed = arguments_class(**values)
    parsed.given = sorted(values)
    parser.settings = dict.fromkeys(settings, file)
    return parser, parsed


def read_config_file(parser: StrictParser, arguments_class: type, file: str) -> dict[str, Any]:
    """The flags of a file, by the rules of the command line."""
    try:
        settings = read_settings(file, arguments_class)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    parser.source = f"{file}: "
    known = [field.name for field in declared_fields(arguments_class)]
    known += [name.removeprefix("--") for name in parser.renamed]
    for name in settings:
        if name not in known:
            parser.refuse_foreign(f"--{name}")
            parser.error(f"unknown key {name}{suggest(name, known)}")
    words = [word for name, value in settings.items() for word in words_of(name, value)]
    values = vars(parser.parse_args(words))
    parser.source = ""
    return values


def left_by_command(arguments_class: type, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a file that those of the command line leave in effect; of values that add up, such as `key=value`,
    those that the command line does not give."""
    left = {name: value for name, value in settings.items() if name not in given}
    for field in declared_fields(arguments_class):
        if field.metadata["adds_up"] and field.name in settings and field.name in given:
            keys = {pair.partition("=")[0] for pair in given[field.name]}
            forgotten = [pair for pair in settings[field.name] if pair.partition("=")[0] not in keys]
            left[field.name] = [*forgotten, *given[field.name]]
    # A given length replaces the other one.
    if "num_train_epochs" in given:
        left.pop("max_steps", None)
    # What the command line switches off, and what that switches off in turn.
    defaults, conditions = dataclasses.asdict(arguments_class()), effect_conditions(arguments_class)
    decided = set(given)
    while off := {
        name
        for name in left.keys() - decided
        for other, required in conditions.get(name, [])
        if other in decided and not is_met(required, {**defaults, **left, **given}[other])
    }:
        left = {name: value for name, value in left.items() if name not in off}
        decided |= off
    return left


def check_values(parser: StrictParser, parsed: Any) -> None:
    """Types and bounds, then flags that the others switch off. Raises: SystemExit: names flag, value and rule."""
    try:
        validate_fields(parsed, "--{}")
        check_effects(parsed, parsed.given, "--{name}")
    except ValueError as error:
        named = [name for name in parser.settings if re.search(rf"--{name}\b", str(error))]
        parser.error(f"{error} (--{named[0]} is given in {parser.settings[named[0]]})" if named else str(error))


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
