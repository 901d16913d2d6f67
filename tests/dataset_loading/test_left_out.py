import os
import shutil
import tempfile
from pathlib import Path

import pytest

from dataset_loading.image.pixels import IMAGE_SUFFIXES
from dataset_loading.left_out import NAMES, LeftOut, reason_group
from dataset_loading.sources import open_source


def left_out(folder, split="train"):
    return open_source(str(folder), split, "image", suffixes=IMAGE_SUFFIXES).left_out


def test_everything_beside_the_samples_is_counted_by_reason(tmp_path, image):
    image("a.png"), image("sub/b.png")
    for name in ("photo.HEIC", "sub/plan.svg", "README.md", ".hidden", "LICENSE"):
        (tmp_path / name).write_text("x")
    for name in ("gone.png", "latest.log"):
        (tmp_path / name).symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "sub/again").symlink_to(tmp_path)
    counts = {reason: group["names"] for reason, group in left_out(tmp_path).as_dict().items()}
    assert counts == {
        "ending .heic is not read": ["photo.HEIC"],
        "ending .svg is not read": ["sub/plan.svg"],
        "ending .log is not read": ["latest.log"],
        "link leads nowhere": ["gone.png"],
        "pipe, socket or device": ["pipe.png"],
    }


def test_files_beside_split_folders_and_unlisted_ones(tmp_path, image):
    image("train/a.png"), image("train/c.png"), image("b.png"), image("test/d.png")
    (tmp_path / "IMG_1.HEIC").write_text("x")
    (tmp_path / "train/metadata.csv").write_text("file_name,text\na.png,A\n")
    assert {reason: group["names"] for reason, group in left_out(tmp_path).as_dict().items()} == {
        "beside the folders of the splits": ["IMG_1.HEIC", "b.png"],
        "no row of the metadata names it": ["c.png"],
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_without_permission_is_named(tmp_path, image):
    image("a.png"), image("closed/b.png")
    # pytest closes its own folder for other users whenever it starts.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(shutil.copytree(tmp_path, Path(place, "open")))
        folder.chmod(0o755), (folder / "closed").chmod(0)
        os.seteuid(65534)
        try:
            group = left_out(folder).as_dict()["folder cannot be read: Permission denied"]
        finally:
            os.seteuid(0)
    assert group["count"] == 1 and group["names"][0].endswith("closed")


def test_names_are_bounded_and_counts_are_not():
    one, other = LeftOut(), LeftOut()
    one.update("silent", map(str, range(30)))
    other.add("silent", "x", n=5)
    other.add("clipped", "y")
    one.merge(other)
    assert one.counts == {"silent": 35, "clipped": 1} and len(one.names["silent"]) == NAMES
    assert str(one) == "35 silent (0); 1 clipped (y)"
    assert reason_group("too short: 0.1 s, less than 0.25 s") == "too short"
    assert reason_group("8x9 pixels, the shorter side is under 16") == "#x# pixels, the shorter side is under #"
