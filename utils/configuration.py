"""Declared options: each field of a configuration states its type, default, meaning and bounds once.

`option()` declares a field, `validate_fields()` checks a whole object, and `StrictConfig` is the base of every model
configuration: a transformers `PreTrainedConfig` that refuses unknown names instead of storing them.
The stages' command-line flags (`megatransformer_utils.StageArguments`) are declared with the same `option()`.
"""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from transformers import PreTrainedConfig

BOUNDS = {
    "gt": (">", lambda value, bound: value > bound),
    "ge": (">=", lambda value, bound: value >= bound),
    "lt": ("<", lambda value, bound: value < bound),
    "le": ("<=", lambda value, bound: value <= bound),
}


def option(default: Any, meaning: str, *, bare: Any = None, **bounds: float) -> Any:
    """A dataclass field with its meaning and bounds.

    Args:
        default: the default; a list or dict is copied for each object.
        meaning: one line with the unit, shown by `--help` and in the generated documentation.
        bare: what the command-line flag means when it is given without a value.
        bounds: any of `gt`, `ge`, `lt`, `le`; None values and non-numbers are not compared.
    """
    unknown = set(bounds) - set(BOUNDS)
    assert not unknown, f"option() takes {sorted(BOUNDS)}, not {sorted(unknown)}"
    metadata = {"meaning": meaning, "bounds": bounds, "bare": bare}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or the list of known names where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def check_type(value: Any, annotation: Any) -> bool:
    """Whether `value` fits the annotation: scalars, Literal, unions, and list[...] of these. A bool is not an int."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(check_type(value, part) for part in parts)
    if origin is Literal:
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
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def declared_fields(owner: Any) -> list[dataclasses.Field]:
    """The fields declared by `option()`, in order of declaration."""
    return [field for field in dataclasses.fields(owner) if "meaning" in field.metadata]


def validate_fields(owner: Any, spelling: str = "{}") -> None:
    """Check every declared field's type and bounds, then every `validate_<section>` method of the object.

    Args:
        owner: a dataclass instance whose fields were declared by `option()`.
        spelling: how the message writes a field's name, `"--{}"` for flags.
    Raises:
        ValueError: names the field, its value and the rule.
    """
    for field in declared_fields(owner):
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
        for kind, bound in field.metadata["bounds"].items():
            sign, holds = BOUNDS[kind]
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int | float) and not holds(item, bound):
                    raise ValueError(f"{name}={value!r} must be {sign} {bound}")
    for method_name in dir(owner):
        if method_name.startswith("validate_") and inspect.ismethod(getattr(owner, method_name)):
            getattr(owner, method_name)()


def is_literal_typo(value: Any, annotation: Any) -> bool:
    """Whether a suggestion makes sense: a string given where a Literal of strings is wanted."""
    return isinstance(value, str) and typing.get_origin(annotation) is Literal


def from_preset(config_class: type, presets: dict[str, dict], name: str, **overrides: Any) -> Any:
    """Build `config_class` from a row of a preset table, with some fields replaced.

    Raises:
        ValueError: the name is not in the table; the message lists the names and suggests one.
    """
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}{suggest(name, presets)} (presets: {', '.join(presets)})")
    return config_class(**{**presets[name], **overrides})


class StrictConfig(PreTrainedConfig):
    """A model configuration whose fields are declared by `option()`; wrong names, types and bounds raise ValueError.

    Subclasses add fields and `validate_<section>(self)` methods for the relations between fields. `config.json` round
    trips; keys that transformers itself writes are accepted.
    """

    def __post_init__(self, **kwargs: Any):
        known = {field.name for field in declared_fields(self)}
        for name in kwargs:
            if name not in TRANSFORMERS_KEYS and not name.startswith("_"):
                raise ValueError(f"{type(self).__name__} has no field {name!r}{suggest(name, known)}")
        super().__post_init__(**kwargs)
        validate_fields(self)

    def replace(self, **changes: Any) -> "StrictConfig":
        """A validated copy with some fields changed; unknown names raise ValueError with a suggestion."""
        fields = {field.name: getattr(self, field.name) for field in declared_fields(self)}
        return type(self)(**{**fields, **changes})

    def describe(self) -> str:
        """All declared fields, one per line: `name = value   # meaning`."""
        rows = [
            (field.name, repr(getattr(self, field.name)), field.metadata["meaning"]) for field in declared_fields(self)
        ]
        width = max(len(name) + len(value) for name, value, _ in rows) + 3
        return "\n".join(f"{f'{name} = {value}':<{width}}  # {meaning}" for name, value, meaning in rows)


TRANSFORMERS_KEYS = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "torch_dtype",
    "use_cache",
}
