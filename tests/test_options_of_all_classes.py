"""Every class of declared options in the repository: its conditions name existing fields."""

import dataclasses
import importlib
import subprocess
from pathlib import Path

import pytest

from utils.options import declared_fields, effect_conditions

ROOT = Path(__file__).resolve().parent.parent


def option_classes() -> dict[str, type]:
    """All dataclasses with declared options outside the tests, by module and name."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    classes = {}
    for file in map(Path, files.split()):
        if file.parts[0] == "tests" or "option(" not in (ROOT / file).read_text():
            continue
        module = importlib.import_module(".".join(file.with_suffix("").parts))
        for name, member in vars(module).items():
            if isinstance(member, type) and member.__module__ == module.__name__ and dataclasses.is_dataclass(member):
                classes[f"{module.__name__}.{name}"] = member
    return {name: member for name, member in classes.items() if declared_fields(member)}


CLASSES = option_classes()


def test_the_walk_finds_flags_and_configurations():
    assert {"utils.megatransformer_utils.StageArguments", "utils.configuration.MegaTransformerConfig"} <= set(CLASSES)
    assert len(CLASSES) > 40


@pytest.mark.parametrize("owner", CLASSES.values(), ids=CLASSES)
def test_conditions_name_other_existing_fields(owner):
    known = {field.name for field in declared_fields(owner)}
    for name, conditions in effect_conditions(owner).items():
        for other, _ in conditions:
            assert other in known - {name}, f"{name} is only with {other!r}, which {owner.__name__} does not declare"
