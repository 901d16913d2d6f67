"""Shards of a cache, joined: the bytes that one process writes."""

import json
import multiprocessing
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_loading.image.pixels import ImageDataset
from preprocess_image_vae_dataset import ImageVAEPreprocess
from utils.preprocessing.shards import Shard


@pytest.fixture
def raw(tmp_path) -> Path:
    """24 images with captions: one equals another, whatever split they fall into, two are too small, one is broken."""
    folder, rng = tmp_path / "raw", np.random.default_rng(0)
    folder.mkdir()
    for i in range(24):
        side = 8 if i in (5, 6) else 16
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    for i in range(12, 24):
        shutil.copy(folder / f"{i}.png", folder / f"copy {i}.png")
    (folder / "12.png").write_bytes(b"no image")
    (folder / "notes.xyz").touch()
    names = sorted(path.name for path in folder.glob("*.png"))
    rows = [
        json.dumps({"file_name": name, "text": ["a cat", f"{name}"] if i % 3 else ""}) for i, name in enumerate(names)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def flags_of(raw: Path, out: Path) -> list[str]:
    argv = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "8", "--num_workers", "0"]
    argv += [
        "--validation_fraction",
        "0.3",
        "--max_broken_fraction",
        "0.5",
        "--num_augmented_copies",
        "1",
        "--rotation",
    ]
    return argv


def prepare(raw: Path, out: Path, *flags: str) -> dict:
    return ImageVAEPreprocess.main([*flags_of(raw, out), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(out: Path, *folders: Path) -> dict:
    return ImageVAEPreprocess.main(["--merge", *map(str, folders), "--output_dir", str(out)])


def shards_of(raw: Path, out: Path, n: int) -> list[Path]:
    for i in range(1, n + 1):
        prepare(raw, out, "--shard", f"{i}/{n}")
    return [out.with_name(f"{out.name}.shard-{i}-of-{n}") for i in range(1, n + 1)]


def test_joined_shards_are_what_one_process_writes(raw, tmp_path):
    out = tmp_path / "out"
    whole = prepare(raw, out)
    assert whole["duplicates"] and whole["broken"] and whole["skipped"] and whole["left_out"]
    expected = contents(out)
    shutil.rmtree(out)
    shards = shards_of(raw, out, 3)
    joined = merge(out, shards[2], shards[0], shards[1])
    assert contents(out) == expected and joined["fingerprint"] == whole["fingerprint"]
    # Again, and as an ordinary cache that the same command brings up to date.
    assert merge(out, *shards)["fingerprint"] == whole["fingerprint"] and contents(out) == expected
    (raw / "3.png").unlink(), (raw / "metadata.jsonl").unlink()
    assert prepare(raw, out)["fingerprint"] != whole["fingerprint"]


def test_shards_of_machines_with_other_paths_are_joined(raw, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere/raw"
    whole = prepare(raw, out)
    shutil.copytree(raw, elsewhere)
    prepare(raw, out, "--shard", "1/2"), prepare(elsewhere, out, "--shard", "2/2")
    joined = merge(tmp_path / "joined", *(tmp_path / f"out.shard-{i}-of-2" for i in (1, 2)))
    assert joined["settings"] == whole["settings"] and joined["totals"] == whole["totals"]
    files = [{name: content for name, content in contents(folder).items() if name.endswith(".pt")} for folder in
             (out, tmp_path / "joined")]  # fmt: skip
    assert files[0] == files[1]
    # A single shard is one all the same.
    prepare(raw, tmp_path / "one", "--shard", "1/1")
    one = merge(tmp_path / "one", tmp_path / "one.shard-1-of-1")
    assert one["fingerprint"] == whole["fingerprint"]


def test_a_shard_is_finished_by_its_own_command_and_is_no_cache(raw, tmp_path):
    out = tmp_path / "out"
    first = prepare(raw, out, "--shard", "2/2")
    folder = tmp_path / "out.shard-2-of-2"
    before = contents(folder)
    next((folder / "train").glob("*.pt")).unlink()
    assert prepare(raw, out, "--shard", "2/2")["fingerprint"] == first["fingerprint"] and contents(folder) == before
    with pytest.raises(ValueError, match=r"shard 2/2 .*--merge"):
        ImageDataset(folder, "train")


def test_wrong_shards_are_refused(raw, tmp_path, caplog):
    out = tmp_path / "out"
    first, second = shards_of(raw, out, 2)
    other = shards_of(raw, tmp_path / "other", 3)[2]

    def refused(*folders: Path) -> str:
        caplog.clear()
        with pytest.raises(SystemExit) as error:
            merge(out, *folders)
        assert error.value.code == 2 and not (out / "manifest.json").exists()
        return caplog.text

    assert "lacks the shards 2/2" in refused(first)
    assert f"{second} and {second} are both shard 2/2" in refused(first, second, second)
    assert "one of 3 shards" in refused(first, other)
    assert "does not exist" in refused(first, tmp_path / "nothing")
    # Another setting, another file, a damaged sample.
    prepare(raw, tmp_path / "small", "--shard", "2/2", "--resize_mode", "pad")
    assert "resize_mode='crop' there, 'pad' now" in refused(first, tmp_path / "small.shard-2-of-2")
    prepare(raw, tmp_path / "limited", "--shard", "2/2", "--limit", "20")
    assert "limit=-1 there, 20 here" in refused(first, tmp_path / "limited.shard-2-of-2")
    sample = next((second / "train").glob("*.pt"))
    sample.write_bytes(sample.read_bytes()[:-1] + b"x")
    assert f"{sample} is damaged" in refused(first, second)
    Image.new("RGB", (32, 32)).save(raw / "0.png", compress_level=0)
    shutil.rmtree(second)
    prepare(raw, out, "--shard", "2/2")
    assert "other raw files" in refused(first, second)
    # What a refused call has written is no obstacle.
    prepare(raw, out, "--shard", "1/2")
    assert merge(out, first, second)["fingerprint"] == prepare(raw, tmp_path / "whole")["fingerprint"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_shards_are_written_i_of_n(text):
    with pytest.raises(ValueError, match=f"--shard='{text}' must be i/n"):
        Shard.parse(text)


def test_merge_takes_no_other_flags(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ImageVAEPreprocess.main(["--merge", "a", "--image_size", "8"])
    assert "--image_size" in capsys.readouterr().err


def test_packed_caches_follow_their_files_and_repair_themselves(raw, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    whole = prepare(raw, plain)
    assert prepare(raw, out, "--pack", "5")["fingerprint"] == whole["fingerprint"]
    packed, data = ImageDataset(out, "train"), ImageDataset(plain, "train")
    assert [sample["image"].tolist() for sample in packed] == [sample["image"].tolist() for sample in data]
    assert not list(out.rglob("*.pt"))
    expected = contents(out)
    # Damage, repaired by the command that the error names.
    pack = out / "train/00001.safetensors"
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged.*--pack 5"):
        ImageDataset(out, "train")
    prepare(raw, out, "--pack", "5")
    assert contents(out) == expected
    (out / "train.arrow").write_bytes(b"ARROW1")
    prepare(raw, out, "--pack", "5")
    assert contents(out) == expected
    # A file that is gone, then the other form.
    (raw / "metadata.jsonl").unlink(), (raw / "3.png").unlink()
    assert prepare(raw, out, "--pack", "5")["fingerprint"] == prepare(raw, plain)["fingerprint"]
    prepare(raw, out)
    names = ("arguments", "command", "sha256")  # Those of the other folder.
    assert changed_manifest(out, names) == changed_manifest(plain, names)
    assert set(contents(out)) == set(contents(plain))


def changed_manifest(folder: Path, left_out: tuple[str, ...]) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: value for name, value in manifest.items() if name not in left_out}


def test_joined_shards_may_be_packed(raw, tmp_path):
    out = tmp_path / "out"
    prepare(raw, out, "--pack", "5")
    expected = contents(out)
    shutil.rmtree(out)
    shards = shards_of(raw, out, 2)
    ImageVAEPreprocess.main(["--merge", *map(str, shards), "--output_dir", str(out), "--pack", "5"])
    assert contents(out) == expected
    # Refused commands leave a packed cache as it is: flags that exclude each other, other settings, fewer samples.
    for flags in (["--pack", "5", "--shard", "1/2"], ["--resize_mode", "pad"], ["--limit", "3"]):
        with pytest.raises(SystemExit):
            prepare(raw, out, *flags)
    prepare(raw, tmp_path / "few", "--shard", "1/1", "--limit", "20")
    with pytest.raises(SystemExit):
        merge(out, tmp_path / "few.shard-1-of-1")
    assert contents(out) == expected


@pytest.mark.slow
@pytest.mark.launch
def test_processes_of_a_launcher_are_shards(raw, tmp_path, monkeypatch):
    out, context = tmp_path / "out", multiprocessing.get_context("spawn")
    prepare(raw, out, "--pack", "7")
    expected = contents(out)
    shutil.rmtree(out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in ("0", "1"):
        for name, value in {**launch, "RANK": rank, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        argv = [*flags_of(raw, out), "--pack", "7"]
        processes.append(context.Process(target=ImageVAEPreprocess.main, args=(argv,)))
        processes[-1].start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert contents(out) == expected
