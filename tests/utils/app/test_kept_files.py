"""Uploads and results: the oldest are deleted where they exceed the limits."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.helpers.app.page import request, served, wait_until
from utils.app.arguments import AppArguments
from utils.app.kept_files import kept_folder, trim
from utils.command_line import parse_arguments
from utils.options import validate_fields


def write(folder, name, size, age):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    os.utime(file, (2_000_000_000 - age,) * 2)
    return file


def test_the_oldest_files_are_deleted_with_their_folders(tmp_path):
    files = [write(tmp_path, f"{age}/file.png", 100, age) for age in range(6)]
    beside = write(tmp_path, "5/younger.png", 100, 0)
    assert trim(tmp_path, 700) == 0 and trim(tmp_path, 450) == 3
    assert [file.exists() for file in files] == [True, True, True, False, False, False] and beside.exists()
    assert not files[3].parent.exists() and files[5].parent.exists()
    assert trim(tmp_path, 10**6, max_files=2) == 2 and trim(tmp_path, 0) == 2
    assert tmp_path.exists() and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_upload_deletes_older_ones_beyond_the_limit(runs):
    def upload(page, number):
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = part + bytes([number]) * 450_000 + b"\r\n--x--\r\n"
        kind = "multipart/form-data; boundary=x"
        assert request(page, "POST", "/gradio_api/upload", body, content_type=kind)[0] == 200

    def kept():
        """The numbers of the files, which are deleted after the answer."""
        places = [Path(place) for place, _, names in os.walk(kept_folder()) if "a.png" in names]
        with contextlib.suppress(OSError):
            return {(place / "a.png").read_bytes()[0] for place in places}

    with served(runs, max_kept_mb=1) as page:
        for number in range(5):
            upload(page, number)
            wait_until(lambda last={number - 1, number} - {-1}: kept() == last)
    assert str(kept_folder()) == os.environ["GRADIO_TEMP_DIR"]


def test_a_limit_below_that_of_one_upload_is_refused():
    assert parse_arguments(AppArguments, ["--max_kept_mb", "40"], "").max_kept_mb == 40
    with pytest.raises(ValueError, match="--max_kept_mb=10 must be at least --max_upload_mb=32"):
        validate_fields(AppArguments(max_kept_mb=10), "--{}")
