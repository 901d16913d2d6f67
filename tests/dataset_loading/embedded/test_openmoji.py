import csv
import hashlib

import pytest
from PIL import Image

from dataset_loading.embedded.openmoji import build_embedded, caption, main, named_pictograms


def rows(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_small_set_is_an_imagefolder_with_captions(tmp_path):
    counts = build_embedded(tmp_path / "set", image_size=32, limit=40)
    assert sum(counts.values()) == 40
    for split in ("train", "test"):
        listed = rows(tmp_path / "set" / split / "metadata.csv")
        assert {row["file_name"] for row in listed} == {file.name for file in (tmp_path / "set" / split).glob("*.png")}
        assert len(listed) == counts[split] and all(row["text"] for row in listed)
        for row in listed:
            image = Image.open(tmp_path / "set" / split / row["file_name"])
            assert image.size == (32, 32) and image.mode == "RGB"
    assert "CC BY-SA 4.0" in (tmp_path / "set/LICENSE.txt").read_text(encoding="utf-8").split("\n")[0]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_building_twice_changes_nothing_and_gives_the_same_images(tmp_path):
    for name in ("a", "b", "a"):
        build_embedded(tmp_path / name, image_size=16, limit=12)
    files = [sorted((tmp_path / name).rglob("*.*")) for name in "ab"]
    digests = [[hashlib.sha256(file.read_bytes()).hexdigest() for file in listed] for listed in files]
    assert digests[0] == digests[1] and len(digests[0]) == 12 + 4


def test_other_size_and_foreign_folders_are_refused(tmp_path, capsys):
    build_embedded(tmp_path / "set", image_size=16, limit=4)
    with pytest.raises(ValueError, match=r"'image_size': 16.*not with.*'image_size': 32"):
        build_embedded(tmp_path / "set", image_size=32, limit=4)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--image_size", "16"])
    assert "was not made by this command" in capsys.readouterr().err


def test_whole_set_has_its_usual_size():
    names = named_pictograms()
    assert len(names) == 1863 + 230
    assert names["1F436"] == "dog face"
    assert not any("skin tone" in name for name in names.values())


def test_captions():
    assert caption("\U0001f415\u200d\U0001f9ba") == "service dog"
    assert caption("\u2614") == caption("\u2614\ufe0f") == "umbrella with rain drops"
    assert caption("\ue000") == ""
