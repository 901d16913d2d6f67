"""README, CLAUDE.md and docs name only what exists: files, flags, classes; and their commands parse."""

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

import evaluate
from utils import training_utils
from utils.command_line import parse_arguments
from utils.exporting.stages import MODELS
from utils.options import declared_fields
from utils.preprocessing.arguments import MergeArguments, asks_to_merge

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CLAUDE.md", *sorted((ROOT / "docs").glob("*.md"))]


def arguments_of(script: Path) -> type:
    """The class of a script's flags, which it checks before its slow imports."""
    module = importlib.import_module(".".join(script.relative_to(ROOT).with_suffix("").parts))
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    (check,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "check_flags"]
    names = [node.id for node in ast.walk(check.args[0]) if isinstance(node, ast.Name) and node.id[0].isupper()]
    return getattr(module, names[0])


PROGRAMS = [
    *sorted(ROOT.glob("preprocess_*.py")),
    *sorted(ROOT.glob("pretrain_*.py")),
    ROOT / "evaluate.py",
    *sorted(ROOT.glob("inference/[a-z]*.py")),
]
SCRIPTS = {str(script.relative_to(ROOT)): arguments_of(script) for script in PROGRAMS}
# Made by running the commands, or given by the reader.
MADE = ("runs/", "cached_datasets/", "data/", "my_", "inference/generated", "checkpoint-", ".venv", "/")


def quoted(text: str) -> set[str]:
    """Everything in single backquotes outside code blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)))


def commands(text: str) -> list[str]:
    """Shell lines of the code blocks, or of a whole script, continuations joined."""
    blocks = [text] if text.startswith("#!") else re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@functools.cache
def known_flags() -> set[str]:
    """Every flag of every script: declared options, and strings handed to add_argument."""
    flags = {f"--{field.name}" for arguments in SCRIPTS.values() for field in declared_fields(arguments)}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("inference/*.py"), *ROOT.glob("benchmarks/*.py")]:
        flags |= set(re.findall(r'"(--[a-z_0-9]+)"', path.read_text()))
        flags |= {f"--{name}" for name in re.findall(r"^    (\w+): .*= option\(", path.read_text(), flags=re.M)}
    for path in (ROOT / "dataset_loading").rglob("*.py"):
        flags |= set(re.findall(r'"(--[a-z_0-9]+)"', path.read_text()))
        flags |= {f"--{name}" for name in re.findall(r"^    (\w+): .*= option\(", path.read_text(), flags=re.M)}
    others = {"--num_gpus", "--nproc_per_node", "--help", "--local_rank", "--config_file"}
    return flags | {f"--no_{flag[2:]}" for flag in flags} | others


@functools.cache
def known_classes() -> set[str]:
    """Names of all classes, functions and literal types of the repository."""
    names = set()
    folders = ("model", "utils", "dataset_loading", "inference", "benchmarks", "tests")
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]:
        module = ast.parse(path.read_text())
        names |= {node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        names |= {
            target.id
            for node in module.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    return names


@functools.cache
def files_of_repository() -> list[str]:
    """Paths of all files with a slash in front, those of hidden folders and of results left out."""
    results = ("runs", "cached_datasets", "data")
    children = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in results]
    folders = [path for path in children if path.is_dir()]
    paths = [*children, *(path for folder in folders for path in folder.rglob("*"))]
    return [f"/{path.relative_to(ROOT).as_posix()}" for path in paths]


def exists(name: str) -> bool:
    """Whether a file has this name, or ends in this path."""
    return any(path.endswith(f"/{name}") for path in files_of_repository())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    names = {
        name for name in quoted(document.read_text()) if re.fullmatch(r"[\w./-]+\.(py|json|md|sh|txt|toml)", name)
    }
    produced = {
        "manifest.json",
        "settings.json",
        "stage.json",
        "lora.json",
        "metrics.json",
        "COMPLETE.json",
        "config.json",
        "metadata.csv",
    }
    produced |= {"tokenizer.json"}
    missing = [name for name in names - produced if not name.startswith(MADE) and not exists(name)]
    assert not missing, f"{document.name} names files that do not exist: {sorted(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_flags_exist(document):
    text = document.read_text()
    flags = {word for name in quoted(text) for word in re.findall(r"(?<![\w-])--[a-z_0-9]+", name)}
    assert flags <= known_flags(), f"{document.name} names flags that do not exist: {sorted(flags - known_flags())}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_classes_exist(document):
    foreign = {
        "Trainer",
        "UNet2DConditionModel",
        "TrainingArguments",
        "PreTrainedModel",
        "PreTrainedConfig",
        "AutoencoderKL",
        "AutoTokenizer",
        "AdamW",
        "Makefile",
    }
    names = {name for name in quoted(document.read_text()) if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)}
    missing = names - known_classes() - foreign
    assert not missing, f"{document.name} names classes that do not exist: {sorted(missing)}"


def with_defaults(text: str) -> str:
    """A shell script's variables that are set as NAME=${NAME:-default}, replaced by their defaults."""
    for name, default in re.findall(r"^(\w+)=\$\{\1:?-([^}]*)\}$", text, flags=re.M):
        text = re.sub(rf"\$(?:{name}\b|\{{{name}\}})", default, text)
    return text


def stage_commands() -> list[tuple[str, list[str]]]:
    """Scripts and their words in documents, recipes, and the cards of exported models."""
    found, lines = [], [kind.command for kind in MODELS.values()]
    for document in [*DOCUMENTS, *sorted((ROOT / "recipes").glob("*.sh"))]:
        lines += commands(with_defaults(document.read_text()))
    for words in map(shlex.split, lines):
        for position, word in enumerate(words):
            if word in SCRIPTS:
                found.append((word, words[position + 1 :]))
    return found


def test_documented_commands_parse(capsys):
    assert stage_commands(), "no command of a stage is documented"
    for script, words in stage_commands():
        try:
            parse_arguments(MergeArguments if asks_to_merge(words) else SCRIPTS[script], words, script)
        except SystemExit:
            pytest.fail(f"{script} {' '.join(words)}: {capsys.readouterr().err}")


def test_named_make_targets_exist():
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    targets = {target for rule in rules for target in rule.split()}
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), flags=re.M))
        assert named <= targets, f"{document.name}: {named - targets}"


def test_every_stage_is_named_and_registered():
    """A script without its row in CLAUDE.md, a stage without an evaluator, a trainer that cannot be imported."""
    guide = (ROOT / "CLAUDE.md").read_text()
    assert not [script for script in SCRIPTS if f"`{script}`" not in guide]
    for script in ROOT.glob("pretrain_*.py"):
        module = importlib.import_module(script.stem)
        (stage,) = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == script.stem]
        assert stage.name in evaluate.EVALUATORS and stage.name == stage.arguments_class.stage
        assert stage.presets.items() <= stage.arguments_class.presets.items()
        assert stage.trainer_class is getattr(training_utils, stage.trainer_class.__name__)
