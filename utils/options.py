"""Declared options: each field of a configuration states its type, default, meaning, bounds and conditions once.

`option()` declares a field, `validate_fields()` checks a whole object, `check_effects()` refuses options that the
others switch off, and `GivenFlags` refuses flags that are given twice.
The stages' command-line flags (`megatransformer_utils.StageArguments`) are declared with the same `option()`.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import inspect
import logging
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

logger = logging.getLogger(__name__)

# Bound -> its sign in messages, and the test of a value.
BOUNDS = {
    "gt": (">", lambda value, bound: value > bound),
    "ge": (">=", lambda value, bound: value >= bound),
    "lt": ("<", lambda value, bound: value < bound),
    "le": ("<=", lambda value, bound: value <= bound),
}


Condition = tuple[str, Any]  # (name of another option, its value, a tuple of values, or a predicate of it)


def option(
    default: Any,
    meaning: str,
    *,
    bare: Any = None,
    only_with: Condition | list[Condition] | None = None,
    aliases: tuple[str, ...] | None = None,
    adds_up: bool = False,
    **bounds: float,
) -> Any:
    """A dataclass field with its meaning, bounds and conditions.

    A subclass that declares the option anew, such as with another default, inherits `only_with` and `aliases` unless
    it states its own.

    Args:
        default: the default; a list or dict is copied for each object.
        meaning: one line with the unit, shown by `--help` and in the generated documentation.
        bare: what the command-line flag means when it is given without a value.
        only_with: condition of another option without which this one has no effect, such as `("use_ema", True)`; a
            list of conditions must hold together; `[]` lifts inherited ones. See `is_met`.
        aliases: former names, which the command line still accepts.
        adds_up: whether the flag may be given several times, of a list, whose items add up.
        bounds: any of `gt`, `ge`, `lt`, `le`; None values and non-numbers are not compared.
    """
    unknown = set(bounds) - set(BOUNDS)
    assert not unknown, f"option() takes {sorted(BOUNDS)}, not {sorted(unknown)}"
    # A list of conditions, or None: the base class decides, see `inherited`.
    conditions = [only_with] if isinstance(only_with, tuple) else only_with
    metadata = {"meaning": meaning, "bounds": bounds, "bare": bare, "only_with": conditions, "aliases": aliases}
    metadata["adds_up"] = adds_up
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """Title of the options below it, and a condition that all of them share. See `declared_sections`."""

    title: str = ""
    only_with: Condition | None = None


class GivenFlags(argparse.Namespace):
    """The flags of a command line, each given once: argparse alone keeps the last value. For parsers whose
    `argument_default` is `argparse.SUPPRESS`, so that only what was given is set.

    Raises: argparse.ArgumentError: a flag is given twice; names it and both values.
    """

    def __setattr__(self, name: str, value: Any):
        if name in vars(self) and name != "local_rank":  # which launchers append
            first, second = flag_text(name, getattr(self, name)), flag_text(name, value)
            raise argparse.ArgumentError(None, f"--{name} is given twice: {first} and {second}; leave one out")
        super().__setattr__(name, value)


def flag_text(name: str, value: Any) -> str:
    """A flag with its value as a command line has it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])


def flag_words(name: str, value: Any) -> list[str]:
    """A flag with its value as words of a command line; a value that begins with - is joined to its flag by =."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    items = value if isinstance(value, list) else [value]
    texts = [f"{item:g}" if isinstance(item, float) and float(f"{item:g}") == item else str(item) for item in items]
    if texts and texts[0].startswith("-"):
        assert len(texts) == 1, f"--{name}: of several values the first must not begin with -"
        return [f"--{name}={texts[0]}"]
    return [f"--{name}", *texts]


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or the list of known names where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def import_extra(name: str, extra: str, purpose: str) -> Any:
    """A package that `requirements.txt` leaves out, since only some functions need it.

    Args:
        name: of the module.
        extra: of the file that has it, `requirements-<extra>.txt`.
        purpose: what needs it, as the subject of the error's message.
    Raises: ValueError: it cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{purpose} needs the package {name!r}, which cannot be imported ({error}); "
            f"pip install -r requirements-{extra}.txt"
        ) from error


def check_type(value: Any, annotation: Any) -> bool:
    """Whether `value` fits the annotation: scalars, Literal, unions, and list[...] of these. A bool is not an int."""
    # Python counts True as an int and an int as no float; here a bool is only a bool, and a float may be written 1.
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(check_type(value, part) for part in parts)
    if origin is Literal:
        # The types must match too, since True == 1 == 1.0.
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(check_type(item, parts[0]) for item in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, types.NoneType if annotation is None else annotation)


def type_name(annotation: Any) -> str:
    """The annotation as a reader writes it: `int`, `list[int]`, `one of 'a', 'b'`."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(part) for part in typing.get_args(annotation))
    parts = typing.get_args(annotation)
    if types.NoneType in parts and typing.get_origin(parts[0]) is Literal:
        return type_name(parts[0])  # A choice that may be left open.
    if typing.get_origin(annotation) is typing.Union and any(typing.get_origin(part) is Literal for part in parts):
        return " or ".join(map(type_name, parts)).replace("one of ", "")  # A number or a word.
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def declared_fields(owner: Any) -> list[dataclasses.Field]:
    """The fields declared by `option()`, in order of declaration."""
    return [field for field in dataclasses.fields(owner) if "meaning" in field.metadata]


def declared_sections(owner: Any) -> dict[Section, list[dataclasses.Field]]:
    """The declared fields by section, in order of declaration.

    A section begins at a class variable `SECTION_...`, whose value is a `Section`. Fields before the first one are in
    a section without a title.
    """
    fields = {field.name: field for field in declared_fields(owner)}
    sections: dict[Section, list[dataclasses.Field]] = {}
    # Base classes first. A field that a subclass declares anew stays in the section of its base.
    for base in reversed((owner if isinstance(owner, type) else type(owner)).__mro__):
        section = Section()
        for name in inspect.get_annotations(base):
            if name.startswith("SECTION_"):
                section = getattr(base, name)
            elif name in fields:
                sections.setdefault(section, []).append(fields.pop(name))  # once, in the section of its base
    return sections


def inherited(owner: type, name: str, key: str) -> Any:
    """What the nearest declaration of an option says under a key of its metadata; None where none says anything."""
    # `dataclasses.fields` gives only the last declaration of a field; the earlier ones are still in the base classes.
    for base in owner.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata.get(key) is not None:
            return field.metadata[key]
    return None


@functools.cache
def effect_conditions(owner: type) -> dict[str, list[Condition]]:
    """The conditions under which the options of a class have an effect: those of their section, and their own."""
    conditions = {}
    for section, fields in declared_sections(owner).items():
        shared = [section.only_with] if section.only_with else []
        for field in fields:
            conditions[field.name] = [*shared, *(inherited(owner, field.name, "only_with") or [])]
    # Options that always have an effect are left out.
    return {name: rows for name, rows in conditions.items() if rows}


def other_than_none(value: Any) -> bool:
    """A predicate for `only_with`; errors quote its name."""
    return value is not None


def other_than_one(value: float) -> bool:
    """A predicate for `only_with`; errors quote its name."""
    return value != 1


def above_one(value: float) -> bool:
    """A predicate for `only_with`; errors quote its name."""
    return value > 1


def is_met(required: Any, value: Any) -> bool:
    """Whether an option's value meets a condition.

    A tuple lists acceptable values, a function decides (`bool`: neither zero nor empty), and of an option that is a
    list one entry must be the required value.
    """
    # `bool`, or one of the predicates above.
    if callable(required):
        return bool(required(value))
    if isinstance(required, tuple):
        return any(is_met(choice, value) for choice in required)
    return value == required or (isinstance(value, list) and required in value)


def condition_text(condition: Condition) -> str:
    """A condition as a reader writes it: `use_ema=True`, `kind='a' or 'b'`."""
    name, required = condition
    if required is bool:
        return f"{name} other than 0 or empty"
    if callable(required):
        return f"{name} {required.__name__.replace('_', ' ')}"
    choices = required if isinstance(required, tuple) else (required,)
    return f"{name}={' or '.join(map(repr, choices))}"


def check_effects(owner: Any, names: Collection[str], spelling: str = "{name}={value!r}") -> None:
    """Check that options have an effect together with the others, by the `only_with` of their declarations.

    Args:
        owner: the object with all options.
        names: the options that were set by somebody.
        spelling: how the message writes an option, `"--{name}"` for flags.
    Raises:
        ValueError: names the option, and the other one that switches it off.
    """
    # Only options that were set are checked: a default without effect is no mistake.
    for name, conditions in effect_conditions(type(owner)).items():
        for other, required in conditions if name in names else ():
            value = getattr(owner, other)
            if not is_met(required, value):
                subject = spelling.format(name=name, value=getattr(owner, name))
                remedy = condition_text((other, required))
                raise ValueError(f"{subject} has no effect with {other}={value!r}; it needs {remedy}")


def default_value(field: dataclasses.Field) -> Any:
    """The default of a declared field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def validate_fields(owner: Any, spelling: str = "{}") -> None:
    """Check type, bounds and finiteness of every declared field, then call every `validate_<section>` method.

    Args:
        owner: a dataclass instance whose fields were declared by `option()`.
        spelling: how the message writes a field's name, `"--{}"` for flags.
    Raises:
        ValueError: names the field, its value and the rule.
    """
    for field in declared_fields(owner):
        # Type, with the first wrong item of a list and the closest name of a mistyped choice.
        value, name = getattr(owner, field.name), spelling.format(field.name)
        assert not isinstance(field.type, str), f"{name}: postponed annotations switch the type checks off"
        if not check_type(value, field.type):
            wrong, rule, given = value, field.type, f"{name}={value!r}"
            if isinstance(value, list) and typing.get_origin(rule) is list:
                (rule,) = typing.get_args(rule)
                wrong = next(item for item in value if not check_type(item, rule))
                given += f": {wrong!r}"
            hint = suggest(wrong, typing.get_args(rule)) if is_literal_typo(wrong, rule) else ""
            raise ValueError(f"{given} must be {type_name(rule)}{hint}")
        # Numbers are finite and within their bounds, each item of a list.
        numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError(f"{name}={value!r} must be finite")
        for kind, bound in field.metadata["bounds"].items():
            sign, holds = BOUNDS[kind]
            for item in numbers:
                if not holds(item, bound):
                    raise ValueError(f"{name}={value!r} must be {sign} {bound}")
    # Relations between fields.
    for method_name in dir(owner):
        if method_name.startswith("validate_") and inspect.ismethod(getattr(owner, method_name)):
            getattr(owner, method_name)()


def is_literal_typo(value: Any, annotation: Any) -> bool:
    """Whether the value is a string and the annotation a Literal, so that a suggestion makes sense."""
    return isinstance(value, str) and typing.get_origin(annotation) is Literal


def expect_preset(name: str, presets: Mapping[str, Any]) -> None:
    """Raises: ValueError: the name is not in the table; the message lists the names and suggests one."""
    if name not in presets:
        names = [key for key, row in presets.items() if isinstance(row, dict)]
        raise ValueError(f"unknown preset {name!r}{suggest(name, names)} (presets: {', '.join(names)})")


def from_preset(config_class: type, presets: dict[str, Any], name: str, **overrides: Any) -> Any:
    """Build `config_class` from a row of a preset table, with some fields replaced.

    Args:
        presets: rows of fields and of `parameters`, the number of parameters of the model; or the new name of a
            renamed row.
    Raises:
        ValueError: the name is not in the table; the message lists the names and suggests one.
    """
    expect_preset(name, presets)
    # The value of a former name is the new one.
    if isinstance(new_name := presets[name], str):
        logger.warning("preset %r has been renamed to %r", name, new_name)
        name = new_name
    # Overrides replace the fields of the row.
    fields = {field: value for field, value in presets[name].items() if field != "parameters"}
    return config_class(**{**fields, **overrides})
