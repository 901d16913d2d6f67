"""What preprocessing leaves out or loses, what it keeps of several captions, and what it holds out of few files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess_image_vae_dataset import ImageVAEPreprocess
from utils.command_line import parse_arguments
from utils.preprocessing.samples import is_validation, smallest_name


def prepare(raw: Path, out: Path, *flags: str) -> dict:
    """Run the image stage in this process."""
    argv = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "16", "--num_workers", "0", *flags]
    return ImageVAEPreprocess(parse_arguments(ImageVAEPreprocess.arguments_class, argv, "")).run()


@pytest.fixture
def raw(tmp_path) -> Path:
    """20 images of different greys with captions."""
    (tmp_path / "raw/sub").mkdir(parents=True)
    rows = [{"file_name": f"sub/image {i}.png", "text": f"caption {i}"} for i in range(20)]
    return write_table(tmp_path / "raw", rows)


def write_table(folder: Path, rows: list[dict]) -> Path:
    """Images with a metadata.jsonl."""
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        Image.fromarray(np.full((20, 20, 3), number, dtype=np.uint8)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_what_is_left_out_is_counted_by_reason_in_manifest_and_log(raw, tmp_path, caplog):
    (raw / "photo.HEIC").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(raw / "sub/image 0.png")
    (raw / "sub/image 1.png").write_bytes(b"damaged!")
    manifest = prepare(raw, tmp_path / "out", "--max_broken_fraction", "0.1")
    assert manifest["left_out"] == {
        "#x# pixels, the shorter side is under #": {"count": 1, "names": ["sub/image 0.png"]},
        "broken: no image of a known format (# bytes)": {"count": 1, "names": ["sub/image 1.png"]},
        "ending .heic is not read": {"count": 1, "names": ["photo.HEIC"]},
    }
    line = next(line for line in caplog.messages if line.startswith("left out or lost"))
    assert all(name in line for name in ("photo.HEIC", "image 0.png", "image 1.png"))


def test_links_that_lead_nowhere_count_as_broken(raw, tmp_path):
    (raw / "sub/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1 of 20 raw files are broken.*sub/gone\.png \(OSError: link leads nowhere"):
        prepare(raw, tmp_path / "out")
    manifest = prepare(raw, tmp_path / "out", "--max_broken_fraction", "0.1")
    assert manifest["left_out"] == {"link leads nowhere": {"count": 1, "names": ["sub/gone.png"]}}


def test_several_captions_are_kept(tmp_path):
    rows = [{"file_name": "a.png", "text": ["red", "crimson"]}, {"file_name": "b.png", "text": float("nan")}]
    manifest = prepare(write_table(tmp_path / "raw", rows), tmp_path / "out", "--validation_fraction", "0")
    first, second = manifest["entries"]["train"]
    assert first["captions"] == ["red", "crimson"] and first["caption"] == "red"
    assert second["caption"] == "" and "captions" not in second
    assert manifest["left_out"] == {"without a text, though others have one": {"count": 1, "names": ["b.png"]}}
    assert prepare(tmp_path / "raw", tmp_path / "out", "--validation_fraction", "0") == manifest


def test_one_of_few_files_is_held_out(tmp_path, caplog):
    raw = write_table(tmp_path / "raw", [{"file_name": f"{name}.png", "text": name} for name in "abc"])
    manifest = prepare(raw, tmp_path / "out")
    assert not any(is_validation(f"{name}.png", 0.05) for name in "abc")
    (held_out,) = manifest["entries"]["validation"]
    assert held_out["source"] == smallest_name(["a.png", "b.png", "c.png"]) and len(manifest["entries"]["train"]) == 2
    one = write_table(tmp_path / "one", [{"file_name": "a.png", "text": "a"}])
    assert "held out" not in caplog.text
    assert not prepare(one, tmp_path / "other")["entries"]["validation"]
    assert "no sample is held out: a single file" in caplog.text
    # The one that is held out cannot be used.
    caplog.clear()
    Image.new("RGB", (8, 8)).save(raw / held_out["source"])
    assert not prepare(raw, tmp_path / "small")["entries"]["validation"]
    assert f"no validation sample is left: none of the 1 held-out samples can be used: {held_out['source']} (8x8" in (
        caplog.text
    )
    assert "no sample is held out" not in caplog.text


def test_a_validation_split_that_is_not_read_is_said(raw, tmp_path, caplog):
    (tmp_path / "set").mkdir()
    raw.rename(tmp_path / "set/train")
    write_table(tmp_path / "set/val", [{"file_name": "held out.png", "text": "a"}])
    prepare(tmp_path / "set", tmp_path / "out")
    flags = ["--validation_dataset", str(tmp_path / "set"), "--validation_split", "validation"]
    assert f"split 'validation', which is not read; validate on it with {' '.join(flags)}" in caplog.text
    caplog.clear()
    manifest = prepare(tmp_path / "set", tmp_path / "both", *flags)
    assert [entry["source"] for entry in manifest["entries"]["validation"]] == ["held out.png"]
    assert "not read" not in caplog.text


def test_a_set_that_is_all_held_out_says_so(raw, tmp_path):
    with pytest.raises(
        ValueError, match=r"no training samples among 1 raw ones; 1 are held out; .*validation_fraction"
    ):
        prepare(raw, tmp_path / "out", "--limit", "1", "--validation_fraction", "0.999")


def test_a_caption_that_is_no_text_is_named_with_its_file(tmp_path):
    rows = [{"file_name": "a.png", "text": {"en": "A"}}]
    with pytest.raises(
        ValueError, match=r"a\.png, column 'text': a caption is \{'en': 'A'\}, no text; name .*--caption_column"
    ):
        prepare(write_table(tmp_path / "raw", rows), tmp_path / "out")
