"""Packed caches: the same items, and back to the same bytes."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.cached import CachedDataset
from dataset_loading.pack import main, unpack_in_place
from dataset_loading.packs import pack_name

CAPTIONS = ["a cat", "", "zwei Hunde, für «dich»", "\udcff no UTF-8", "tab\tand\nline"]


def samples(n: int):
    """Entries of different fields with tensors of fixed, different and no size, some of which lack one."""
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        entry = {"key": f"sample-{i}", "source": f"{i}.wav", "copy": 0, "caption": CAPTIONS[i % len(CAPTIONS)]}
        length = i % 4
        tensors = {
            "mean": torch.randn(3, length, generator=generator).half(),
            "n_frames": torch.tensor(length),
            "image": torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8),
        }
        if i % 3:
            tensors["states"] = torch.randn(i % 2 + 1, 5, generator=generator).bfloat16()
            entry["captions"] = ["one", "two"]
        entry |= {"speaker": "ab"[i % 2], "seconds": i / 7, "length": length, "odd": i if i % 2 else float(i)}
        yield entry, tensors


@pytest.fixture
def cache(tmp_path) -> Path:
    folder, entries = tmp_path / "cache", {}
    for split, n in (("train", 11), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        entries[split] = []
        for entry, tensors in samples(n):
            digest = save_tensors(folder / split / f"{entry['key']}.pt", tensors)
            entries[split].append({**entry, **digest})
    other = {"key": "equal", "source": "e", "copy": 0, "caption": "", "same_as": "0.wav"}
    other |= save_tensors(folder / "train/equal.pt", {"mean": torch.ones(2, 2)})
    (folder / "aligner.safetensors").write_bytes(b"aligner")
    header = {
        "schema": 1,
        "stage": "audio_vae",
        "fingerprint": "f",
        "settings": {"image_size": 4},
        "command": ["x.py"],
    }
    write_manifest(folder, {**header, "totals": {}, "entries": entries, "duplicates": [other], "left_out": {}})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_items(first: CachedDataset, second: CachedDataset) -> bool:
    assert len(first) == len(second) and list(first.entries) == list(second.entries)
    for a, b in zip(first, second):
        assert list(a) == list(b)
        assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    return True


def test_packs_hold_the_same_items_and_turn_back_into_the_same_files(cache, tmp_path):
    main([str(cache), str(tmp_path / "packed"), "--pack", "4"])
    assert not list((tmp_path / "packed").rglob("*.pt"))
    for split in ("train", "validation"):
        plain, packed = CachedDataset(cache, split), CachedDataset(tmp_path / "packed", split)
        assert same_items(plain, packed) and same_items(plain, pickle.loads(pickle.dumps(packed)))
        assert packed.fingerprint == plain.fingerprint and packed.entries[-1] == plain.entries[-1]
        assert packed.distinct("speaker") == plain.distinct("speaker") == ["a", "b"]
        assert packed.numbers("length") == plain.numbers("length") and packed.value(1, "seconds") == 1 / 7
        assert packed.n_empty_captions() == plain.n_empty_captions() > 0
        assert packed.value(0, "captions") is None and packed.value(1, "captions") == ["one", "two"]
    # Others can read a pack.
    pack = safetensors.torch.load_file(tmp_path / "packed/train" / pack_name(1))
    assert pack["image"].shape == (4, 3, 4, 4) and torch.equal(pack["image"][2], plain_image(cache, 6))
    main([str(tmp_path / "packed"), str(tmp_path / "back")])
    assert contents(tmp_path / "back") == contents(cache)


def plain_image(cache: Path, index: int) -> torch.Tensor:
    return torch.load(cache / f"train/sample-{index}.pt", weights_only=True)["image"]


def damaged(packed: Path, index: int = 0) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        CachedDataset(packed, "train")[index]
    return str(error.value)


def test_damage_is_found_and_named(cache, tmp_path):
    packed = tmp_path / "packed"
    main([str(cache), str(packed), "--pack", "4"])
    pack, index = packed / "train" / pack_name(2), packed / "train.arrow"
    content, rows = pack.read_bytes(), index.read_bytes()
    remedy = f"python x.py --output_dir {packed} --pack 4"
    # A byte of the last tensor, which only a sample of this pack sees.
    pack.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "CRC-32" in (text := damaged(packed, 10)) and str(pack) in text and remedy in text
    assert len(CachedDataset(packed, "train")[0]) > 1
    pack.write_bytes(content[:-1])
    assert str(pack) in damaged(packed) and f"{len(content)} were written" in damaged(packed)
    pack.unlink()
    assert f"lacks 1 of 3 packs, the first is {pack.name}" in damaged(packed) and remedy in damaged(packed)
    pack.write_bytes(content)
    index.write_bytes(rows[:-20] + bytes([rows[-20] ^ 1]) + rows[-19:])
    assert f"{index} is damaged" in damaged(packed) and "SHA-256" in damaged(packed)
    index.write_bytes(rows[:-1])
    assert f"{index} is damaged" in damaged(packed)
    index.unlink()
    assert f"{index} is missing" in damaged(packed)


def test_what_cannot_be_packed_is_refused(cache, tmp_path, capsys, caplog):
    def refused(*words: str) -> str:
        caplog.clear()
        with pytest.raises(SystemExit) as error:
            main(list(words))
        assert error.value.code == 2
        return caplog.text + capsys.readouterr().err

    packed = str(tmp_path / "packed")
    assert "--pack=0 must be > 0" in refused(str(cache), packed, "--pack", "0")
    assert "are the same folder" in refused(str(cache), str(cache))
    assert "does not exist" in refused(str(tmp_path / "nothing"), packed)
    main([str(cache), packed])
    assert "holds a cache already" in refused(str(cache), packed)
    assert "--pack=5 has no effect" in refused(packed, str(tmp_path / "back"), "--pack", "5")
    shutil.rmtree(packed)
    # Another type than in the samples before, and a damaged file.
    file, entries = cache / "train/sample-4.pt", json.loads((cache / "manifest.json").read_text())["entries"]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert f"{file} is damaged" in refused(str(cache), packed)
    assert "is incomplete" in damaged(tmp_path / "packed")
    save_tensors(file, {"mean": torch.zeros(3, 1)})
    assert entries["train"][4]["key"] == "sample-4"


def test_a_repair_keeps_what_can_be_read(cache, tmp_path, caplog):
    packed = tmp_path / "packed"
    main([str(cache), str(packed), "--pack", "4"])
    expected = contents(cache)
    # Of 11 samples: a pack that is gone, one without its last byte, and no index of the sample that equals another.
    (packed / "train" / pack_name(0)).unlink()
    (packed / "duplicates.arrow").unlink()
    file = packed / "train" / pack_name(1)
    file.write_bytes(file.read_bytes()[:-1])
    unpack_in_place(packed, json.loads((cache / "manifest.json").read_text()))
    lost = {f"train/sample-{n}.pt" for n in range(4)}
    cut = {f"train/sample-{n}.pt" for n in range(4, 8)}
    assert lost < expected.keys() - contents(packed).keys() < {*lost, *cut, "train/equal.pt"}
    assert all(expected[name] == content for name, content in contents(packed).items())
    assert caplog.text.count("of this pack") == 2 and "duplicates.arrow is missing" in caplog.text
