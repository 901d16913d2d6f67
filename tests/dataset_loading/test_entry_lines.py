import json
import pickle

import pytest
import torch

from dataset_loading import entry_lines
from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.cached import CachedDataset
from dataset_loading.entry_lines import EntryLines, read_lines
from dataset_loading.files import read_record

CAPTIONS = ["a cat", 'with "quotes", commas,\nand lines', "zwölf", "\udcff no UTF-8", "\n]}", "[\n"]


@pytest.fixture
def cache(tmp_path):
    entries = {"train": [], "validation": []}
    for number, caption in enumerate(CAPTIONS):
        (tmp_path / "train").mkdir(exist_ok=True)
        digest = save_tensors(tmp_path / f"train/{number}.pt", {"x": torch.full((2,), number)})
        entries["train"].append({"key": f"{number}", "caption": caption, "captions": [caption], **digest})
    header = {"schema": 1, "stage": "x", "fingerprint": "f", "settings": {"entries": {"train": [1]}}, "command": ["x"]}
    write_manifest(tmp_path, {**header, "entries": entries, "duplicates": []})
    return tmp_path


@pytest.fixture(autouse=True)
def no_size_is_small(monkeypatch):
    monkeypatch.setattr(entry_lines, "MIN_BYTES", 0)


def test_lines_are_the_entries(cache):
    manifest, expected = read_lines(cache / "manifest.json", ""), read_record(cache / "manifest.json", "")
    lines = manifest["entries"]["train"]
    assert isinstance(lines, EntryLines) and list(lines) == expected["entries"]["train"] == lines[:]
    assert lines[-1] == expected["entries"]["train"][-1] and len(lines) == len(CAPTIONS)
    assert list(manifest) == list(expected) and len(manifest["entries"]["validation"]) == 0
    assert list(pickle.loads(pickle.dumps(lines))) == list(lines)
    assert lines[0].file == cache / "manifest.json"
    with pytest.raises(IndexError):
        lines[len(CAPTIONS)]


def test_datasets_read_them(cache):
    data = CachedDataset(cache, "train")
    assert isinstance(data.entries, EntryLines) and [int(sample["x"][0]) for sample in data] == list(range(6))
    (cache / "train/3.pt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 6 files, the first is 3"):
        CachedDataset(cache, "train")


@pytest.mark.parametrize("old", [b'"key": "4"', b'"fingerprint"'])
def test_damage_is_found(cache, old):
    file = cache / "manifest.json"
    file.write_bytes(file.read_bytes().replace(old, old[:-2] + b"X" + old[-1:]))
    with pytest.raises(ValueError, match="SHA-256"):
        read_lines(file, "do this")


def test_other_layouts_and_fields_are_read_or_named(cache):
    # Written by another program, and without a field.
    file = cache / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"], content["entries"]["train"][2]["caption"]
    file.write_text(json.dumps(content, indent=1))
    assert isinstance(read_lines(file, "")["entries"]["train"], list)
    with pytest.raises(ValueError, match=r"entries.train\[2\] lacks 'caption'"):
        CachedDataset(cache, "train")
