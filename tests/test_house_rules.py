"""Layers, sizes and copies: what keeps the repository readable in an evening, checked on the syntax trees."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.split()
SOURCES = [Path(name) for name in sorted(TRACKED) if (ROOT / name).is_file()]
CODE = [path for path in SOURCES if path.parts[0] != "tests"]
TREES = {path: ast.parse((ROOT / path).read_text(), str(path)) for path in SOURCES}

FOLDERS = ("model", "dataset_loading", "utils", "inference", "benchmarks")
# What each layer may import of ours. utils/configuration.py is the lowest layer; scripts at the root the highest.
ALLOWED = {
    "configuration": set(),
    "model": {"configuration", "model"},
    "dataset_loading": {"configuration", "model", "dataset_loading"},
    "utils": {"configuration", "model", "dataset_loading", "utils"},
    "script": {"configuration", "model", "dataset_loading", "utils"},
    "inference": {"configuration", "model", "dataset_loading", "utils", "inference"},
    "benchmarks": {"configuration", "model", "dataset_loading", "utils", "benchmarks", "script"},
}
SCRIPT_NAMES = {path.stem for path in CODE if len(path.parts) == 1}


def layer(path: Path) -> str:
    if path in (Path("utils/options.py"), Path("utils/configuration.py")):
        return "configuration"
    return path.parts[0] if len(path.parts) > 1 else "script"


def imported_layers(tree: ast.AST) -> set[tuple[str, int]]:
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            head = name.split(".")[0]
            if name in ("utils.options", "utils.configuration"):
                found.add(("configuration", node.lineno))
            elif head in FOLDERS:
                found.add((head, node.lineno))
            elif head in SCRIPT_NAMES:
                found.add(("script", node.lineno))
    return found


@pytest.mark.parametrize("path", CODE, ids=str)
def test_layers_import_downwards(path):
    wrong = [(name, line) for name, line in imported_layers(TREES[path]) if name not in ALLOWED[layer(path)]]
    assert not wrong, f"{path} is of layer {layer(path)} and must not import {wrong}"


def test_sizes():
    too_long = []
    for path in SOURCES:
        n_lines = len((ROOT / path).read_text().splitlines())
        limit = 120 if layer(path) == "script" else 80 if layer(path) == "inference" else 500
        if n_lines > limit:
            too_long.append(f"{path}: {n_lines} lines, limit {limit}")
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 80:
                too_long.append(
                    f"{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines, limit 80"
                )
    assert not too_long, "\n".join(too_long)


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of code with their numbers: no blank lines, comments, docstrings or imports."""
    tree, skipped = TREES[path], set()
    for node in ast.walk(tree):
        text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate((ROOT / path).read_text().splitlines(), 1)
    return [
        (n, line.strip())
        for n, line in lines
        if n not in skipped and line.strip() and not line.strip().startswith("#")
    ]


def test_no_ten_equal_lines_in_two_files():
    seen: dict[tuple[str, ...], tuple[Path, int]] = {}
    copies = []
    for path in SOURCES:
        lines = code_lines(path)
        for start in range(len(lines) - 9):
            window = tuple(line for _, line in lines[start : start + 10])
            other = seen.setdefault(window, (path, lines[start][0]))
            if other[0] != path:
                copies.append(f"{path}:{lines[start][0]} repeats {other[0]}:{other[1]}")
    assert not copies, "\n".join(copies[:10])


def test_print_only_in_scripts():
    wrong = [
        f"{path}:{node.lineno}"
        for path in CODE
        if layer(path) not in ("script", "inference", "benchmarks")
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, f"print belongs into scripts, use logging: {wrong}"


def test_package_files_stay_empty():
    assert not [path for path in SOURCES if path.name == "__init__.py" and (ROOT / path).read_text().strip()]


def test_public_functions_of_the_library_say_what_they_do():
    silent = []
    for path in CODE:
        if layer(path) in ("script", "inference", "benchmarks"):
            continue
        for node in TREES[path].body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path}:{node.lineno}: {node.name}")
    assert not silent, "\n".join(silent)
