"""Small image folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Path]:
    """Writes an image of one colour under the test's folder: `image("train/a.png", "red")`."""

    def write(name: str, color="red", *, size=(24, 24), mode="RGB") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, color).save(file)
        return file

    return write
