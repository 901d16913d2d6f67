"""The parser of all command lines: a flag per declared option, and `--help` in the groups of their sections."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from utils.flags.peers import our_flag
from utils.options import (
    BOUNDS,
    Condition,
    GivenFlags,
    condition_text,
    declared_sections,
    effect_conditions,
    inherited,
    suggest,
    type_name,
)

# What a boolean flag takes, in any case.
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# Placeholders of values in --help.
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT"}

# Flags that launchers append.
LAUNCHERS = ("--local_rank", "--local-rank")

CONFIG_FILE = """YAML or JSON file with names of flags as keys, and values as on the command line, which wins over the
file; of the stage.json of a run its arguments, without run_name, output_dir, resume_from_checkpoint, dry_run and
measure: the new run has a name of its own"""


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the closest known flag for an unknown one, answers other trainers' flags with
    its own, refuses abbreviations and flags that are given twice, and accepts former names of flags.

    Attributes:
        renamed: former flag -> flag, such as `{"--n_pictures": "--n_images"}`. `--help` does not show the former ones.
        notices: what to tell of former names that were given.
        source: the file that is being read, at the beginning of messages; empty for the command line.
        settings: flag -> the file that gives it.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.renamed: dict[str, str] = {}
        self.notices: list[str] = []
        self.source = ""
        self.settings: dict[str, str] = {}

    def current_name(self, word: str) -> str:
        """A word of the command line, a former flag in it replaced by today's, with a notice."""
        flag, equals, value = word.partition("=")
        if flag not in self.renamed:
            return word
        self.notices.append(f"{flag} is now called {self.renamed[flag]}; the former name still works")
        return f"{self.renamed[flag]}{equals}{value}"

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = [self.current_name(word) for word in (sys.argv[1:] if args is None else args)]
        for word in words:
            self.refuse_foreign(word.partition("=")[0])
        parsed, unknown = self.parse_known_args(words, namespace or GivenFlags())
        # argparse would only name the unknown flag; the closest known one helps more.
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag not in LAUNCHERS]
            name = unknown[0].partition("=")[0]
            # Flags that it may abbreviate, the shortest first.
            longer = sorted((flag for flag in flags if name.startswith("--") and flag.startswith(name)), key=len)
            hint = f"; did you mean {longer[0]!r}?" if longer and name != "--" else suggest(name, flags)
            self.error(f"unknown argument {unknown[0]}{hint}")
        return parsed

    def refuse_foreign(self, word: str) -> None:
        """End with our name of a flag of another trainer."""
        if not word.startswith("--") or " " in word or word in self._option_string_actions:
            return
        known = {action.dest: action for action in self._actions}
        name = our_flag(word, known)
        if name:
            self.error(f"unknown argument {word}; here it is --{name}: {(known[name].help or '').replace('%%', '%')}")

    def error(self, message: str) -> typing.NoReturn:
        super().error(f"{self.source}{message}")


class Switch(argparse.Action):
    """A boolean: `--flag`, `--no_flag`, or `--flag` with a value of `SWITCH`."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values is None:
            setattr(namespace, self.dest, not str(option_string).startswith("--no_"))
        elif str(option_string).startswith("--no_"):
            raise argparse.ArgumentError(None, f"{option_string} takes no value, not {values!r}; leave it out")
        elif (value := SWITCH.get(str(values).lower())) is None:
            raise argparse.ArgumentError(None, f"--{self.dest}={values!r} must be true or false (yes, no, 1, 0)")
        else:
            setattr(namespace, self.dest, value)


class AddUp(argparse.Action):
    """A list of all values of a flag that may be given several times."""

    def __call__(self, parser, namespace, values, option_string=None):
        # Past `GivenFlags.__setattr__`, which takes a flag once.
        vars(namespace).setdefault(self.dest, []).extend(values)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts as they are, and a boolean flag with its `--no_` form."""

    def _format_action_invocation(self, action):
        if isinstance(action, Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


def build_parser(arguments_class: type, description: str) -> StrictParser:
    """The parser of a class of flags, its groups are the sections of the class."""
    parser = StrictParser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    defaults, conditions = arguments_class(), effect_conditions(arguments_class)
    presets = preset_lines(getattr(arguments_class, "presets", {}))
    for section, fields in declared_sections(arguments_class).items():
        names = [field.name for field in fields]
        shared = shared_conditions(names, conditions)
        about = f"only with {', '.join(map(condition_text, shared))}" if shared else ""
        group = parser.add_argument_group(section.title or "Flags", (presets if "config" in names else about) or None)
        for field in fields:
            own = [condition for condition in conditions.get(field.name, []) if condition not in shared]
            add_flag(group, field, meaning_of(field, getattr(defaults, field.name), own))
            # Former names are not flags of their own: `--help` does not show them.
            aliases = inherited(arguments_class, field.name, "aliases") or ()
            parser.renamed |= {f"--{alias}": f"--{field.name}" for alias in aliases}
    # A file of flags, and the flag that launchers append.
    parser.add_argument("--config_file", metavar="FILE", help=CONFIG_FILE)
    parser.add_argument(*LAUNCHERS, type=int, help=argparse.SUPPRESS)
    return parser


def preset_lines(presets: dict[str, Any]) -> str:
    """A line per preset with its number of parameters; former names are left out."""
    rows = {name: row["parameters"] for name, row in presets.items() if isinstance(row, dict)}
    width = max(map(len, rows), default=0)
    lines = [f"  {name:<{width}}  {n_parameters / 1e6:8,.2f} M parameters" for name, n_parameters in rows.items()]
    return "\n".join(["presets of --config:", *lines]) if rows else ""


def shared_conditions(names: list[str], conditions: dict[str, list[Condition]]) -> list[Condition]:
    """The conditions of all flags of a group, but for the flags that they name: `--help` says them once."""
    first = next((conditions[name] for name in names if name in conditions), []) if len(names) > 2 else []
    return [
        (other, required)
        for other, required in first
        if all(name == other or (other, required) in conditions.get(name, []) for name in names)
    ]


def value_type(field: dataclasses.Field) -> Any:
    """The type of a flag's value: `int | None` is an int, None is only a default."""
    kinds = [part for part in typing.get_args(field.type) if part is not types.NoneType]
    return kinds[0] if typing.get_origin(field.type) in (types.UnionType, typing.Union) else field.type


def meaning_of(field: dataclasses.Field, default: Any, conditions: list[Condition]) -> str:
    """The help of a flag: its meaning, choices, bounds, default and conditions."""
    kind = value_type(field)
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    notes = [
        type_name(kind) if typing.get_origin(kind) is Literal else "",
        " and ".join(f"{BOUNDS[kind][0]} {bound_text(bound)}" for kind, bound in field.metadata["bounds"].items()),
        f"default: {shown}" if shown and default is not None else "",
        f"only with {', '.join(map(condition_text, conditions))}" if conditions else "",
    ]
    noted = "; ".join(filter(None, notes))
    # argparse reads a single % as a format.
    return (f"{field.metadata['meaning']} ({noted})" if noted else field.metadata["meaning"]).replace("%", "%%")


def bound_text(bound: float) -> str:
    """A bound of a number, as a power of two where it is a large one."""
    is_power = isinstance(bound, int) and bound > 1 << 20 and bound & (bound - 1) == 0
    return f"2^{bound.bit_length() - 1}" if is_power else f"{bound:g}"


def add_flag(group: Any, field: dataclasses.Field, text: str) -> None:
    """Add the flag of one declared field."""
    kind, flag = value_type(field), f"--{field.name}"
    if kind is bool:
        group.add_argument(flag, f"--no_{field.name}", dest=field.name, action=Switch, nargs="?", help=text)
    elif typing.get_origin(kind) is Literal:
        # Not argparse's `choices`: `validate_fields` also suggests the closest one.
        group.add_argument(flag, metavar="NAME", help=text)
    elif typing.get_origin(kind) is list:
        # Choices are parsed as strings, which `validate_fields` checks.
        item = typing.get_args(kind)[0]
        item = str if typing.get_origin(item) is Literal else item
        action = AddUp if field.metadata["adds_up"] else "store"
        group.add_argument(flag, nargs="*", type=item, metavar=PLACEHOLDERS[item], help=text, action=action)
    else:
        # A flag that is given without a value takes `bare`, where the option has one.
        bare = field.metadata["bare"]
        value = {} if bare is None else {"nargs": "?", "const": bare}
        words = words_of_type(field)
        metavar = "|".join([PLACEHOLDERS[kind], *words])
        parse = number_or(words, kind) if words else kind
        group.add_argument(flag, type=parse, metavar=metavar, help=text, **value)


def words_of_type(field: dataclasses.Field) -> list[str]:
    """The words that a flag takes beside a number, as those of `int | Literal["auto"]`."""
    is_union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    kinds = typing.get_args(field.type) if is_union else ()
    return [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]


def number_or(words: list[str], kind: type) -> Callable[[str], Any]:
    """A parser of numbers or some words, named as argparse's errors call what it reads."""

    def parse(text: str) -> Any:
        return text if text in words else kind(text)

    parse.__name__ = f"{kind.__name__} or {' or '.join(words)}"
    return parse
