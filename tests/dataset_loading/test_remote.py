"""Packed caches at a URL, by fsspec's file system in memory."""

import json
import os
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.cached import CachedDataset
from dataset_loading.pack import convert
from dataset_loading.packs import pack_name
from dataset_loading.remote import RemotePacks, local_path, open_remote

URL = "memory://bucket/my_cache"
N, N_BYTES = 40, 4096


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A packed cache of ten packs with 4 samples each, whose copy is at the URL."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "plain", 0)
    convert(tmp_path / "plain", tmp_path / "packed", 4)
    yield upload(tmp_path / "packed")
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def make(folder: Path, seed: int) -> None:
    generator, entries = torch.Generator().manual_seed(seed), []
    (folder / "train").mkdir(parents=True)
    for number in range(N):
        tensors = {"x": torch.randint(0, 256, (N_BYTES,), generator=generator, dtype=torch.uint8)}
        entries.append({"key": f"{number}", "caption": "", **save_tensors(folder / f"train/{number}.pt", tensors)})
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text("{}")
    header = {"schema": 1, "stage": "x", "fingerprint": f"{seed}", "settings": {}, "command": ["make.py"]}
    write_manifest(folder, {**header, "entries": {"train": entries, "validation": []}, "duplicates": []})


def upload(folder: Path) -> Path:
    system = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"/bucket/my_cache/{file.relative_to(folder)}", file.read_bytes())
    return folder


def packs_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("train/*.safetensors"))


def test_items_are_those_of_the_cache_and_packs_come_when_they_are_read(cache):
    folder = open_remote(URL, 1)
    assert folder == local_path(URL) and local_path("a/b") == open_remote("a/b", 1) == Path("a/b")
    data, expected = CachedDataset(folder, "train"), CachedDataset(cache, "train")
    assert data.fingerprint == expected.fingerprint and list(data.entries) == list(expected.entries)
    assert (folder / "vae/config.json").read_text() == "{}" and packs_in(folder) == []
    assert torch.equal(data[9]["x"], expected[9]["x"]) and packs_in(folder) == [pack_name(2)]
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(data, expected, strict=True))


def test_the_disk_is_bounded_and_keeps_what_was_used_last(cache):
    limit = 3.5 * (4 * N_BYTES + 200)
    folder = open_remote(URL, limit / 1e9)
    data = CachedDataset(folder, "train")
    data.in_memory = None
    for index in (0, 4, 8, 0, 12, 16):
        data.packs.opened.clear()
        assert len(data[index]["x"]) == N_BYTES
        assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= limit
    assert packs_in(folder) == [pack_name(0), pack_name(3), pack_name(4)]


def test_another_content_replaces_the_former_one(cache, tmp_path):
    first = CachedDataset(open_remote(URL, 1), "train")
    former = first[0]["x"]
    make(tmp_path / "other", 1)
    convert(tmp_path / "other", tmp_path / "other_packed", 4)
    upload(tmp_path / "other_packed")
    assert not torch.equal(CachedDataset(open_remote(URL, 1), "train")[0]["x"], former)
    # A pack that is gone, and one that was cut short.
    system = fsspec.filesystem("memory")
    system.rm(f"/bucket/my_cache/train/{pack_name(5)}")
    data = CachedDataset(local_path(URL), "train")
    with pytest.raises(ValueError, match=f"{pack_name(5)} cannot be read"):
        data[20]
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of 10 packs, the first is {pack_name(5)}"):
        CachedDataset(open_remote(URL, 1), "train")


def test_sizes_that_a_listing_lacks_are_asked_for(cache, monkeypatch):
    system, listing = fsspec.filesystem("memory"), MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem, "ls", lambda *args, **kwargs: [{**entry, "size": None} for entry in listing(*args, **kwargs)]
    )
    assert system.ls("/bucket/my_cache/train", detail=True)[0]["size"] is None
    data = CachedDataset(open_remote(URL, 1), "train")
    assert torch.equal(data[9]["x"], CachedDataset(cache, "train")[9]["x"])


def test_packs_that_others_delete_come_again_and_remains_go(cache, monkeypatch):
    folder = open_remote(URL, 1)
    data = CachedDataset(folder, "train")
    (folder / "train").mkdir()
    old, new = folder / "train/.00003.safetensors.1.tmp", folder / "train/.00003.safetensors.2.tmp"
    old.touch(), new.touch()
    os.utime(old, (1, 1))
    # Another process makes room as soon as a pack has come, twice.
    fetched, bring = [], RemotePacks.bring

    def bring_and_lose(self, name):
        file = bring(self, name)
        fetched.append(name)
        if len(fetched) < 3:
            file.unlink()
        return file

    monkeypatch.setattr(RemotePacks, "bring", bring_and_lose)
    assert torch.equal(data[0]["x"], CachedDataset(cache, "train")[0]["x"]) and fetched == [pack_name(0)] * 3
    assert new.exists() and not old.exists()


def test_what_is_no_packed_cache_is_refused(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/nothing holds no manifest\.json"):
        open_remote("memory://bucket/nothing", 1)
    with pytest.raises(ValueError, match="nosuch://bucket/x cannot be read"):
        open_remote("nosuch://bucket/x", 1)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    upload(tmp_path / "plain")
    with pytest.raises(ValueError, match="has a file per sample; pack it first"):
        open_remote(URL, 1)
    assert not (local_path(URL) / "manifest.json").exists()
    assert json.loads((tmp_path / "plain/manifest.json").read_text())["fingerprint"] == "0"
