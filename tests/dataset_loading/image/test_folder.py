"""Pictures read as they are needed, equal to preprocessed ones."""

import pytest
import torch

from dataset_loading.image.folder import PictureFolder, find_pictures
from dataset_loading.image.pixels import ImageDataset


def test_a_folder_gives_what_preprocessing_gives(picture_folder, picture_cache):
    cache = ImageDataset(picture_cache, "validation")
    folder = PictureFolder(str(picture_folder), "", image_size=32)
    index = next(i for i, entry in enumerate(folder.entries) if entry["key"] == cache.entries[0]["source"])
    assert torch.equal(folder[index]["image"], cache[0]["image"])
    assert folder[index]["index"] == index and len(folder) == 72


def test_metadata_gives_captions(picture, tmp_path):
    picture("a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a red square\n")
    assert PictureFolder(str(tmp_path), "", image_size=16).entries == [{"key": "a.png", "caption": "a red square"}]


def test_the_split_must_be_named_where_there_are_several(picture, tmp_path):
    picture("train/a.png")
    picture("test/b.png")
    with pytest.raises(ValueError, match="train"):
        PictureFolder(str(tmp_path), "", image_size=16)
    assert [entry["key"] for entry in PictureFolder(str(tmp_path), "test", image_size=16).entries] == ["b.png"]


def test_a_damaged_picture_is_named(picture, tmp_path):
    file = picture("deep/a.png", size=(200, 200))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"deep/a\.png in .* cannot be read"):
        PictureFolder(str(tmp_path), "", image_size=16)[0]


def test_pictures_of_one_name_are_kept_apart(picture, tmp_path):
    files = [picture("one/a.png"), picture("two/a.png"), picture("two/deep/a.jpg")]
    found = find_pictures([str(files[0]), str(tmp_path / "two"), str(files[1])])
    assert sorted(found) == ["a", "a_1", "a_3", "deep__a"] and set(found.values()) == set(files)


def test_nothing_to_find_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pictures in"):
        find_pictures([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        find_pictures([str(tmp_path / "gone")])
