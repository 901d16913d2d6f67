"""Rows with several captions and several rows of one file: samples of stages that encode captions, and of others."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from dataset_loading.content import stem_of
from dataset_loading.sources import Source
from preprocess_image_vae_dataset import ImageVAEPreprocess
from utils.command_line import parse_arguments
from utils.preprocessing.rows import merge_rows

NAMES = [f"image {i}.png" for i in range(10)]


class CaptionedPreprocess(ImageVAEPreprocess):
    """Images whose tensors are meant to depend on their captions."""

    encodes_captions = True


def prepare(stage: type[ImageVAEPreprocess], raw: Path, out: Path, *flags: str) -> dict:
    words = f"--dataset_name {raw} --output_dir {out} --image_size 16".split()
    return stage(parse_arguments(stage.arguments_class, [*words, *flags], "")).run()


def write_rows(folder: Path, rows: list[tuple[str, object]]) -> Path:
    """Images of different greys, and rows with their captions."""
    folder.mkdir()
    for number, name in enumerate(dict(rows)):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("n_workers", ["0", "2"])
def test_a_row_with_several_captions_counts_once(tmp_path, n_workers):
    raw = write_rows(tmp_path / "raw", [(name, [f"{name} {k}" for k in range(3)]) for name in NAMES])

    def run(out: str, *flags: str) -> dict:
        return prepare(CaptionedPreprocess, raw, tmp_path / out, "--num_workers", n_workers, *flags)

    manifest = run("out", "--limit", "4", "--validation_fraction", "1e-9")
    assert [len(manifest["entries"][split]) for split in ("train", "validation")] == [9, 3]  # One row is held out.
    captions = [entry["caption"] for entries in manifest["entries"].values() for entry in entries]
    assert sorted(captions) == [f"{name} {k}" for name in NAMES[:4] for k in range(3)]
    # A broken row is one of ten, and named once; so is one that is skipped.
    (raw / NAMES[1]).write_bytes(b"broken")
    Image.new("RGB", (4, 4)).save(raw / NAMES[2])
    with pytest.raises(ValueError, match=r"^1 of 10 raw files are broken"):
        run("few", "--max_broken_fraction", "0.09")
    manifest = run("most", "--max_broken_fraction", "0.1", "--validation_fraction", "0")
    assert len(manifest["entries"]["train"]) == 24
    assert [[row["source"] for row in manifest[kind]] for kind in ("broken", "skipped")] == [[NAMES[1]], [NAMES[2]]]
    assert [group["count"] for group in manifest["left_out"].values()] == [1, 1]


@pytest.mark.parametrize(("stage", "n_samples"), [(CaptionedPreprocess, 30), (ImageVAEPreprocess, 10)])
def test_rows_of_one_file_stay_together(tmp_path, stage, n_samples):
    raw = write_rows(tmp_path / "raw", [(name, f"view {view}") for view in range(3) for name in NAMES])
    manifest = prepare(stage, raw, tmp_path / "out", "--num_workers", "0", "--validation_fraction", "0.3")
    sources, keys = (
        {split: [entry[name] for entry in entries] for split, entries in manifest["entries"].items()}
        for name in ("source", "key")
    )
    assert sources["validation"] and not set(sources["train"]) & set(sources["validation"])
    assert sum(len(set(keys[split])) for split in keys) == n_samples


def test_a_file_with_a_row_for_each_caption_is_one_sample(tmp_path):
    rows = [("a", "red"), ("b", "blue"), ("a", "crimson"), ("a", "red"), ("a", ""), ("c", "green"), ("b", None)]
    raw = write_rows(tmp_path / "raw", [(f"{name}.png", text) for name, text in rows])
    flags = ("--validation_fraction", "0", "--limit", "2", "--num_workers", "0")
    first, second = prepare(ImageVAEPreprocess, raw, tmp_path / "out", *flags)["entries"]["train"]
    assert (first["source"], first["caption"], first["captions"]) == ("a.png", "red", ["red", "crimson"])
    assert (second["source"], second["caption"]) == ("b.png", "blue") and "captions" not in second


def test_captions_that_a_row_has_lost_leave_the_manifest(tmp_path):
    raw = write_rows(tmp_path / "raw", [("a.png", ["red", "crimson"]), ("b.png", ["blue", "navy"])])
    flags = ("--validation_fraction", "0", "--num_workers", "0")
    prepare(ImageVAEPreprocess, raw, tmp_path / "out", *flags)
    rows = [{"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": ["blue", "azure"]}]
    (raw / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = prepare(ImageVAEPreprocess, raw, tmp_path / "out", *flags)["entries"]["train"]
    assert first["caption"] == "red" and "captions" not in first and second["captions"] == ["blue", "azure"]
    assert [first, second] == prepare(ImageVAEPreprocess, raw, tmp_path / "fresh", *flags)["entries"]["train"]


@pytest.mark.parametrize(("first", "second", "is_same"), [
    ("a.wav", "a.MP3", True), ("x/a.b.png", "x/a.b.jpg", True), ("take.1", "take.2", False), ("No. 1", "No. 2", False),
])  # fmt: skip
def test_endings_of_media_alone_are_cut(first, second, is_same):
    assert (stem_of(first) == stem_of(second)) == is_same


def test_rows_of_one_file_name_it_and_take_linear_time(tmp_path):
    media, n_rows = {"path": "a.png", "bytes": None}, 20_000
    source = Source(
        "folder", "", "image", ["image", "text"], [{"image": media, "text": f"{i}"} for i in range(n_rows)]
    )
    started = time.process_time()
    (row,) = merge_rows(source, "text", ()).rows
    assert row["text"] == [f"{i}" for i in range(n_rows)] and time.process_time() - started < 2  # Else minutes.
    source.rows[1]["text"] = {"a": 1}
    with pytest.raises(ValueError, match=r"folder: a\.png, column 'text': a caption is \{'a': 1\}"):
        merge_rows(source, "text", ())
