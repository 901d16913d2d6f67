"""transformers' own tests of models, from the installed version's source distribution (10 MB, kept in `data/`)."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / f"transformers-{transformers.__version__}-tests"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources() -> Path:
    """The folder that holds the package `transformers_tests`."""
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("transformers' tests need the package parameterized")
    package = FOLDER / "transformers_tests"
    if (package / "__init__.py").exists():
        return FOLDER
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--dest", FOLDER]
    done = subprocess.run([*command, f"transformers=={transformers.__version__}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no source distribution of transformers, offline? {done.stderr.strip()[-300:]}")
    package.mkdir(exist_ok=True)
    with tarfile.open(next(FOLDER.glob("*.tar.gz"))) as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and path.match("transformers-*/tests/test_*_common.py"):
                (package / path.name).write_bytes(archive.extractfile(member).read())
    (package / "__init__.py").touch()
    return FOLDER


@pytest.mark.parametrize("name", ["FlatTest", "RecurrentTest", "UntiedTest"])
def test_transformers_own_tests_pass(sources, name):
    environment = os.environ | {"PYTHONPATH": f"{sources}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    # Without this repository's settings of pytest, which refuse marks that they do not know.
    options = ["-c", os.devnull, "--rootdir", ROOT, "-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/helpers/transformers_mixins.py::{name}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 80
