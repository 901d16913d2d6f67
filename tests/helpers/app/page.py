"""A page over checkpoints of a test, visitors of it, and the command lines that it shows."""

import contextlib
import http.client
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest

from tests.helpers.runs import changed
from utils.app.arguments import AppArguments
from utils.app.server import Page, serve
from utils.command_line import parse_arguments

SECONDS = 120.0  # So long a test waits at most.


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The first true value of a condition. Fails where there is none in time."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"not true within {seconds} s"
        time.sleep(0.02)
    return value


class Visitor:
    """A visitor of a page, with a session of its own; every wait of it ends."""

    def __init__(self, page: Page):
        gradio_client = pytest.importorskip("gradio_client")
        options = {"verbose": False, "analytics_enabled": False, "download_files": tempfile.gettempdir()}
        self.client = gradio_client.Client(page.local_url, **options)

    def submit(self, *values: Any, api_name: str) -> Any:
        """Start a job of the page."""
        return self.client.submit(*values, api_name=api_name)

    def predict(self, *values: Any, api_name: str) -> Any:
        """The last outputs of a job of the page."""
        return self.submit(*values, api_name=api_name).result(timeout=SECONDS)

    def results(self, *values: Any, api_name: str) -> tuple[Any, list[Any]]:
        """The last outputs of a job of the page, and all of them in their order."""
        job = self.submit(*values, api_name=api_name)
        return job.result(timeout=SECONDS), job.outputs()

    def close(self) -> None:
        """Leave. The threads end with the connections, at the latest when the page is closed."""
        self.client._kill_heartbeat.set()
        for executor in (self.client.executor, self.client.helper_executor, self.client.stream_executor):
            executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def served(runs: Path, **flags: Any) -> Iterator[Page]:
    """A page, of which no thread is alive afterwards, since later tests of this process may fork, and none of the
    temporary files: its visitors leave an empty folder for each file that they get."""
    before = set(threading.enumerate())
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
        page = serve(AppArguments(runs=str(runs), port=0, **{"max_upload_mb": 1, **flags}))
        try:
            yield page
        finally:
            page.close()
            check_ended(before)


def check_ended(before: set[threading.Thread], seconds: float = 30) -> None:
    """Fails where threads that were not there before are alive after so long, with the stack of each."""
    left: set[threading.Thread] = set()

    def have_ended() -> bool:
        nonlocal left
        left = {thread for thread in threading.enumerate() if thread not in before}
        return not left

    try:
        wait_until(have_ended, seconds)
    except AssertionError:
        frames = sys._current_frames()
        stacks = [f"{each.name}:\n{''.join(traceback.format_stack(frames.get(each.ident or 0)))}" for each in left]
        pytest.fail("threads are left:\n" + "\n".join(stacks))


@contextlib.contextmanager
def visitor(runs: Path, **flags: Any) -> Iterator[Visitor]:
    """A visitor of a page of its own."""
    with served(runs, **flags) as page, contextlib.closing(Visitor(page)) as client:
        yield client


def request(page: Page, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection(urlsplit(page.local_url).netloc, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def upload(file: Path) -> Any:
    """A file as a visitor sends it."""
    return pytest.importorskip("gradio_client").handle_file(file)


def flags_of(line: str, script: str, arguments_class: type, *others: str | Path) -> Any:
    """The flags of a shown command line, with others in place of some."""
    program, name, *words = shlex.split(line)
    assert (program, name) == ("python", script)
    return parse_arguments(arguments_class, changed(words, *map(str, others)), "")
