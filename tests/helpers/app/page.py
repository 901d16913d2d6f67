"""A page over checkpoints of a test, a visitor of it, and the command lines that it shows."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import changed
from utils.app.arguments import AppArguments
from utils.app.server import serve
from utils.command_line import parse_arguments


@contextlib.contextmanager
def visitor(runs: Path, **flags: Any) -> Iterator[Any]:
    """A client of a page of its own."""
    gradio_client = pytest.importorskip("gradio_client")
    page = serve(AppArguments(runs=str(runs), port=0, **{"max_upload_mb": 1, **flags}))
    try:
        yield gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False)
    finally:
        page.close()


def upload(file: Path) -> Any:
    """A file as a visitor sends it."""
    return pytest.importorskip("gradio_client").handle_file(file)


def flags_of(line: str, script: str, arguments_class: type, *others: str | Path) -> Any:
    """The flags of a shown command line, with others in place of some."""
    program, name, *words = shlex.split(line)
    assert (program, name) == ("python", script)
    return parse_arguments(arguments_class, changed(words, *map(str, others)), "")
