import json

import pytest
import torch

from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.cached import CachedDataset
from dataset_loading.image.pixels import ImageDataset

COMMAND = ["preprocess_image_vae_dataset.py", "--dataset_name", "raw", "--image_size", "4", "--resize_mode", "pad"]


@pytest.fixture
def folder(tmp_path):
    """Three training images of 4x4 pixels: all 0, all 51, all 102; no validation."""
    entries = [
        {"key": f"k{i}", "source": f"{i}.png", "copy": 0, "caption": f"number {i}", "length": 4} for i in range(3)
    ]
    (tmp_path / "set/train").mkdir(parents=True)
    for i, entry in enumerate(entries):
        save_tensors(
            tmp_path / f"set/train/{entry['key']}.pt", {"image": torch.full((3, 4, 4), 51 * i, dtype=torch.uint8)}
        )
    (tmp_path / "set/progress.jsonl").touch()
    header = {
        "schema": 1,
        "stage": "image_vae",
        "fingerprint": "abc",
        "settings": {"image_size": 4},
        "command": COMMAND,
    }
    write_manifest(tmp_path / "set", {**header, "entries": {"train": entries, "validation": []}})
    return tmp_path / "set"


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_items_follow_the_manifest(folder):
    data = ImageDataset(folder, "train").expect(image_size=4)
    assert len(data) == 3 and data.fingerprint == "abc"
    for i, item in enumerate(data[k] for k in range(3)):
        assert item["index"].dtype == torch.int64 and item["index"].item() == i
        assert item["image"].dtype == torch.float32
        assert torch.allclose(item["image"], torch.full((3, 4, 4), 0.4 * i - 1))
        assert data.entries[i]["caption"] == f"number {i}"


def test_base_class_gives_the_tensors_as_they_are(folder):
    data = CachedDataset(folder, "train")
    assert data[-1]["image"].dtype == torch.uint8 and data[-1]["index"].item() == 2
    with pytest.raises(IndexError):
        data[3]


def test_large_files_are_mapped_and_equal(folder):
    image = torch.arange(3 * 1200 * 1200, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 1200, 1200)
    save_tensors(folder / "train/k1.pt", {"image": image})
    assert torch.equal(CachedDataset(folder, "train")[1]["image"], image)


def test_another_size_is_refused_with_the_command_that_makes_it(folder):
    with pytest.raises(ValueError, match="image_size=4, but image_size=64 is needed") as caught:
        ImageDataset(folder, "train").expect(image_size=64)
    command = "python preprocess_image_vae_dataset.py --dataset_name raw --resize_mode pad --image_size 64"
    assert f"{command} --output_dir {folder}_image_size_64" in str(caught.value)


def test_missing_and_empty_folders_name_the_command(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, state in (("gone", "does not exist"), ("empty", "is empty")):
        with pytest.raises(FileNotFoundError, match=f"{name} {state}.*preprocess_image_vae_dataset.py"):
            ImageDataset(tmp_path / name, "train")


def test_interrupted_preprocessing_is_refused(folder):
    (folder / "manifest.json").rename(folder / "progress.jsonl")
    with pytest.raises(FileNotFoundError, match=r"incomplete.*preprocess_image_vae_dataset\.py again"):
        ImageDataset(folder, "train")


def test_absent_split_is_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no samples in split 'validation'.*--validation_fraction"):
        ImageDataset(folder, "validation")


def test_lost_files_are_counted(folder):
    (folder / "train/k1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 files, the first is k1\.pt"):
        ImageDataset(folder, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema version 99, this code reads 1"),
        ({"stage": "audio_vae"}, "made for stage 'audio_vae', not for 'image_vae'"),
    ],
)
def test_other_layouts_and_stages_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        ImageDataset(folder, "train")


def test_damaged_files_are_named(folder):
    content = (folder / "train/k1.pt").read_bytes()
    (folder / "train/k1.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"k1\.pt is damaged .*delete it and run: python preprocess"):
        ImageDataset(folder, "train")[1]
    (folder / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ImageDataset(folder, "train")
