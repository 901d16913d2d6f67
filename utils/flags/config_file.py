"""Files of flags: YAML or JSON with names of flags as keys, or the `stage.json` of a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from utils.options import effect_conditions, is_met

# What belongs to one command, not to what it trains: it is not taken from the record of a run.
OF_THE_COMMAND = ("run_name", "output_dir", "resume_from_checkpoint", "dry_run", "measure")


class TextLoader(yaml.BaseLoader):
    """Reads scalars as they are written, since a flag's type says what they are; a key stands once in a mapping."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        refuse_repeated(keys)
        return super().construct_mapping(node, deep=True)


def refuse_repeated(keys: list[Any]) -> None:
    """Raises: ValueError: a key of a mapping stands in it twice; names it."""
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice; leave one out")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file."""
    refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def read_settings(file: str, arguments_class: type) -> dict[str, Any]:
    """The settings of a file by flag; of a run's record those that are not the defaults and have an effect.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no mapping, has a key twice, or is the record of another stage.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"--config_file={file!r} is a folder; give a file, such as checkpoint-1000/stage.json in it")
    if not path.is_file():
        raise ValueError(f"--config_file={file!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        settings = json.loads(text, object_pairs_hook=unique) if is_json else yaml.load(text, TextLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must be a mapping of flags to values, such as `batch_size: 16`")
    # The record of a run.
    if not ("stage" in settings and isinstance(settings.get("arguments"), dict)):
        return settings
    if settings["stage"] != getattr(arguments_class, "stage", ""):
        raise ValueError(
            f"{file} is the record of a run of stage {settings['stage']!r}, whose flags are those of "
            f"pretrain_{settings['stage']}.py"
        )
    defaults, conditions = dataclasses.asdict(arguments_class()), effect_conditions(arguments_class)
    recorded = {**defaults, **settings["arguments"]}
    return {
        name: value
        for name, value in settings["arguments"].items()
        if name not in OF_THE_COMMAND
        and not (name in defaults and value == defaults[name])
        and all(is_met(required, recorded[other]) for other, required in conditions.get(name, []))
    }


def words_of(name: str, value: Any) -> list[str]:
    """A setting as words of a command line; a mapping as `key=value` of a list."""
    if isinstance(value, dict):
        value = [f"{key}={json_text(item)}" for key, item in value.items()]
    if isinstance(value, list):
        return [f"--{name}", *map(text_of, value)]
    return [f"--{name}={text_of(value)}"]


def text_of(value: Any) -> str:
    """A value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def json_text(value: Any) -> str:
    """A value of a mapping as JSON, where it is text that a `TextLoader` read as well."""
    if isinstance(value, list):
        return f"[{', '.join(map(json_item, value))}]"
    return text_of(value)


def json_item(value: Any) -> str:
    """An item of a list as JSON: text that is JSON as it is, other text in quotation marks."""
    if isinstance(value, list | dict):
        return json_text(value)
    try:
        json.loads(text_of(value))
        return text_of(value)
    except ValueError:
        return json.dumps(value)
