import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_loading.image.pixels import ImageDataset
from preprocess_image_vae_dataset import ImageVAEPreprocess
from utils.command_line import parse_arguments
from utils.resuming.flags import check_data

FLAGS = ["--image_size", "16", "--num_workers", "0"]


def draw(file: Path, seed: int) -> Path:
    """A bitmap: files of one size, whatever they show."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def raw(tmp_path) -> Path:
    for seed in range(6):
        draw(tmp_path / f"raw/{seed}.bmp", seed)
    return tmp_path / "raw"


def prepare(raw: Path, out: Path, *flags: str) -> dict:
    argv = ["--dataset_name", str(raw), "--output_dir", str(out), *FLAGS, *flags]
    if "--validation_dataset" not in flags:
        argv += ["--validation_fraction", "0"]
    return ImageVAEPreprocess(parse_arguments(ImageVAEPreprocess.arguments_class, argv, "")).run()


def stamps(out: Path) -> dict[str, int]:
    return {file.name.partition("-")[0]: file.stat().st_mtime_ns for file in out.rglob("*.pt")}


def test_a_cache_follows_its_files(raw, tmp_path, caplog):
    out = tmp_path / "out"
    first, before = prepare(raw, out), stamps(tmp_path / "out")
    # A file is replaced by one with the same size and time, one is removed, one is added, one is only touched.
    state = (raw / "1.bmp").stat()
    draw(raw / "1.bmp", 100)
    os.utime(raw / "1.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    (raw / "2.bmp").unlink()
    draw(raw / "9.bmp", 9)
    os.utime(raw / "3.bmp")
    second, after = prepare(raw, out), stamps(out)
    assert {name for name in after if after[name] != before.get(name)} == {"1", "9"} and "2" not in after
    assert [entry["source"] for entry in second["entries"]["train"]] == [f"{n}.bmp" for n in (0, 1, 3, 4, 5, 9)]
    assert second["fingerprint"] != first["fingerprint"] == json.loads(json.dumps(first))["fingerprint"]
    assert second["settings_fingerprint"] == first["settings_fingerprint"]
    assert "changed: 1 (1.bmp)" in caplog.text and "gone: 1 (2.bmp)" in caplog.text
    fresh = prepare(raw, tmp_path / "fresh")
    assert fresh["entries"] == second["entries"] and fresh["fingerprint"] == second["fingerprint"]
    # The former content again: the former fingerprint.
    draw(raw / "1.bmp", 1), draw(raw / "2.bmp", 2), (raw / "9.bmp").unlink()
    assert prepare(raw, out)["fingerprint"] == first["fingerprint"]


def test_entries_hold_size_times_and_digest(raw, tmp_path):
    entry, file = prepare(raw, tmp_path / "out")["entries"]["train"][0], (raw / "0.bmp").stat()
    times = entry["source_bytes"], entry["source_mtime_ns"], entry["source_ctime_ns"]
    assert times == (file.st_size, file.st_mtime_ns, file.st_ctime_ns) and len(entry["source_sha256"]) == 32
    os.utime(raw / "0.bmp", ns=(5, 5))
    assert prepare(raw, tmp_path / "out")["entries"]["train"][0]["source_mtime_ns"] == 5


def test_caches_of_earlier_versions_open_and_are_written_anew(raw, tmp_path, caplog):
    out = tmp_path / "out"
    manifest, before = prepare(raw, out), stamps(tmp_path / "out")
    head = {**manifest, "fingerprint": manifest["settings_fingerprint"]}
    for name in ("settings_fingerprint", "duplicates", "sha256"):
        del head[name]
    names = [name for name in manifest["entries"]["train"][0] if not name.startswith("source_")]
    head["entries"] = {"train": [{name: row[name] for name in names} for row in manifest["entries"]["train"]]}
    (out / "manifest.json").write_text(json.dumps(head))
    old = ImageDataset(out, "train")
    assert old.fingerprint == old.settings_fingerprint == head["fingerprint"] and len(old) == len(old[0]["image"]) * 2
    assert prepare(raw, out)["fingerprint"] == manifest["fingerprint"]
    assert not set(stamps(out).items()) & set(before.items()) and "without a digest: 6" in caplog.text


def test_training_samples_that_equal_held_out_ones_are_left_out(raw, tmp_path, caplog):
    held_out, out = tmp_path / "held_out", tmp_path / "out"
    draw(held_out / "x.bmp", 2), draw(held_out / "y.png", 3), draw(held_out / "z.bmp", 50)
    flags = ["--validation_dataset", str(held_out)]
    manifest = prepare(raw, out, *flags)
    assert [entry["source"] for entry in manifest["entries"]["train"]] == ["0.bmp", "1.bmp", "4.bmp", "5.bmp"]
    assert [(row["source"], row["same_as"]) for row in manifest["duplicates"]] == [
        ("2.bmp", "x.bmp"),
        ("3.bmp", "y.png"),
    ]
    assert "2 training samples equal files of the validation split" in caplog.text
    # They are not encoded again, and come back where nothing is held out that equals them.
    before = stamps(out)
    assert prepare(raw, out, *flags)["entries"] == manifest["entries"] and stamps(out) == before
    draw(held_out / "x.bmp", 51)
    changed = prepare(raw, out, *flags)
    assert [row["source"] for row in changed["duplicates"]] == ["3.bmp"] and stamps(out)["2"] == before["2"]
    kept = prepare(raw, out, *flags, "--keep_duplicates")
    assert len(kept["entries"]["train"]) == 6 and not any("same_as" in entry for entry in kept["entries"]["train"])
    with pytest.raises(ValueError, match="6 equal files of the validation split"):
        prepare(raw, tmp_path / "none", "--validation_dataset", str(tmp_path))


def test_a_resume_on_another_content_is_refused(tmp_path, caplog):
    record = {"folder": "cache", "fingerprint": "a", "settings_fingerprint": "s"}
    check_data(tmp_path, record, "a", "s")
    with pytest.raises(ValueError, match=r"former content.*cache, fingerprint a; this cache has b.*--init_from"):
        check_data(tmp_path, record, "b", "s")
    with pytest.raises(ValueError, match="other data"):
        check_data(tmp_path, record, "b", "t")
    # Runs of earlier versions know the settings of their cache alone.
    with caplog.at_level(logging.WARNING):
        check_data(tmp_path, {"folder": "cache", "fingerprint": "s+c"}, "b+c", "s")
    assert "does not say on which content" in caplog.text
    with pytest.raises(ValueError, match="other data"):
        check_data(tmp_path, {"folder": "cache", "fingerprint": "s+c"}, "b+d", "s")
