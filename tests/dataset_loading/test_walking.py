import os
from pathlib import Path

import pytest

from dataset_loading.sources import read_media
from dataset_loading.walking import is_outside, regular_state, walk


def touch(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    return file


def names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in walk(folder, (".png",))]


def test_links_in_circles_end_and_every_file_comes_once(tmp_path):
    root = tmp_path / "data/train"
    touch(root / "a/1.png"), touch(root / "b.PNG"), touch(tmp_path / "data/validation/2.png")
    touch(tmp_path / "other/deep/3.png"), touch(root / ".store/4.png")
    for name, target in {
        "self": root,
        "a/up": root.parent,
        "0_again": root / "a",
        "far": tmp_path / "other",
        "far_again": tmp_path / "other/deep",
        "hidden": root / ".store",
        "nowhere": tmp_path / "gone",
        "loop.png": "loop.png",
    }.items():
        os.symlink(target, root / name)
    os.symlink(tmp_path / "data", tmp_path / "other/back")
    assert names(root) == ["b.PNG", "a/1.png", "far/deep/3.png", "hidden/4.png"]


def test_only_regular_files_are_read(tmp_path):
    touch(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.symlink("/dev/zero", tmp_path / "c.png")
    assert names(tmp_path) == ["a.png"]
    for name, kind in (("b.png", "named pipe"), ("c.png", "device")):
        with pytest.raises(OSError, match=rf"{name} is a {kind}"):
            read_media({"path": str(tmp_path / name), "bytes": None})
        with pytest.raises(OSError, match=kind):
            regular_state(tmp_path / name)


@pytest.mark.parametrize(
    "name, outside",
    [
        ("a.png", False),
        ("sub/a.png", False),
        ("out.png", True),
        ("link/a.png", True),
        ("in.png", False),
        ("../a.png", True),
    ],
)
def test_what_lies_outside_of_a_folder(tmp_path, name, outside):
    root = tmp_path / "root"
    for file in ("root/a.png", "root/sub/a.png", "elsewhere/a.png", "a.png"):
        touch(tmp_path / file)
    os.symlink(tmp_path / "a.png", root / "out.png"), os.symlink("a.png", root / "in.png")
    os.symlink(tmp_path / "elsewhere", root / "link")
    assert is_outside(os.path.normpath(root / name), root) == outside
