"""Images read as they are needed, equal to preprocessed ones."""

import pytest
import torch

from dataset_loading.image.folder import ImageFolderDataset
from dataset_loading.image.pixels import ImageDataset


def test_a_folder_gives_what_preprocessing_gives(image_folder, image_cache):
    cache = ImageDataset(image_cache, "validation")
    folder = ImageFolderDataset(str(image_folder), "", sizes=[(32, 32)])
    index = next(i for i, entry in enumerate(folder.entries) if entry["key"] == cache.entries[0]["source"])
    assert torch.equal(folder[index]["image"], cache[0]["image"])
    assert folder[index]["index"] == index and len(folder) == 72


def test_metadata_gives_captions(image, tmp_path):
    image("a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a red square\n")
    assert ImageFolderDataset(str(tmp_path), "", sizes=[(16, 16)]).entries == [
        {"key": "a.png", "caption": "a red square"}
    ]


def test_the_split_must_be_named_where_there_are_several(image, tmp_path):
    image("train/a.png")
    image("test/b.png")
    with pytest.raises(ValueError, match="train"):
        ImageFolderDataset(str(tmp_path), "", sizes=[(16, 16)])
    assert [entry["key"] for entry in ImageFolderDataset(str(tmp_path), "test", sizes=[(16, 16)]).entries] == ["b.png"]


def test_a_damaged_image_is_named(image, tmp_path):
    file = image("deep/a.png", size=(200, 200))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"deep/a\.png in .* cannot be read"):
        ImageFolderDataset(str(tmp_path), "", sizes=[(16, 16)])[0]
