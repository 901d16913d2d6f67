"""Settings of the page as flags of the scripts: what a tab computes is what the shown command line computes."""

import dataclasses
import math
import shlex
from typing import Any, Generic, TypeVar

from utils.options import check_effects, declared_fields, default_value, flag_words, validate_fields

Arguments = TypeVar("Arguments")
MAX_SEED = 2**63  # The flags take smaller ones.


@dataclasses.dataclass
class Command(Generic[Arguments]):
    """A call of a script.

    Attributes:
        script: its path, such as `inference/text_to_image.py`.
        arguments: its checked flags, as `utils.command_line.parse_arguments` returns them.
    """

    script: str
    arguments: Arguments

    def __str__(self) -> str:
        """The command line, quoted for a shell; flags that have their defaults are left out."""
        words = ["python", self.script]
        for name in self.arguments.given:
            words += flag_words(name, getattr(self.arguments, name))
        return shlex.join(words)


def command(script: str, arguments_class: type[Arguments], **values: Any) -> Command[Arguments]:
    """The call of a script with flags, checked as its command line is.

    Args: values: of flags; those that are defaults count as not given.
    Raises: ValueError: a type, bound or combination that the script refuses; names flag, value and rule.
    """
    fields = {field.name: field for field in declared_fields(arguments_class)}
    given = {name: value for name, value in values.items() if value != default_value(fields[name])}
    arguments: Any = arguments_class(**given)
    arguments.given = sorted(given, key=list(fields).index)
    validate_fields(arguments, "--{}")
    check_effects(arguments, arguments.given, "--{name}")
    return Command(script, arguments)


def whole_number(name: str, value: float | None, most: int) -> int:
    """A whole number that a visitor gives, for a flag that checks its lower bound.

    Raises: ValueError: there is none, or it is more than the page allows.
    """
    if value is None or not math.isfinite(value):
        raise ValueError(f"{name} is no number; give one of at most {most}")
    if value > most:
        raise ValueError(f"{name}={value:g} must be at most {most}; the command line takes more")
    return int(value)


def real_number(name: str, value: float | None) -> float:
    """A number that a visitor gives. Raises: ValueError: there is none."""
    if value is None:
        raise ValueError(f"{name} is no number; give one")
    return float(value)
