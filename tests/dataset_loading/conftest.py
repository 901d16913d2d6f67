"""Small picture folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of one colour under the test's folder: `picture("train/a.png", "red")`."""

    def write(name: str, color="red", size=(24, 24), mode="RGB") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, color).save(file)
        return file

    return write
