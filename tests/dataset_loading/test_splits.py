import json
import logging
import os
from pathlib import Path

import pytest

from dataset_loading.image.pixels import IMAGE_SUFFIXES
from dataset_loading.sources import open_source
from dataset_loading.splits import group_by_split
from dataset_loading.text.sources import find_validation_split, open_text


def splits(*paths: str, are_media: bool = False) -> dict[str, list[str]]:
    groups = group_by_split(paths, are_media=are_media)
    return {split: [paths[index] for index in indices] for split, indices in groups.items()}


@pytest.mark.parametrize(
    "train, held_out, split",
    [
        (["train.txt"], ["valid.txt"], "validation"),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["data/test-0.parquet"], "test"),
        (["train-00.jsonl"], ["dev-00.jsonl"], "validation"),
        (["wiki.train.raw.txt"], ["wiki.valid.raw.txt"], "validation"),
        (["en_train_1.csv"], ["en_test_1.csv"], "test"),
        (["TRAIN.TXT"], ["Val.txt"], "validation"),
        (["en/train/a.txt", "de/train/b.txt"], ["en/test/a.txt"], "test"),
        (["train2017/1.txt"], ["val2017/1.txt"], "validation"),
        (["train/a.txt"], ["train/validation/a.txt"], "validation"),
        (["train.txt.gz"], ["valid.txt.gz"], "validation"),
        (["train-clean-100/1/a.txt"], ["dev-clean/1/a.txt"], "validation"),
        (["a.txt", "b.txt"], ["test.txt"], "test"),  # No file is named for training.
    ],
)
def test_names_say_the_split(train, held_out, split):
    assert splits(*train, *held_out) == {"train": train, split: held_out}


@pytest.mark.parametrize(
    "paths",
    [["a.txt", "test-driven development.txt"], ["test.txt"], ["latest.txt", "contest.txt"], ["train-0.txt", "b.txt"]],
)
def test_names_that_hold_nothing_out(paths):
    assert splits(*paths) == {}


def test_files_that_name_no_split_beside_others_are_left_out_and_named(caplog):
    assert splits("train.txt", "test.txt", "vocabulary.txt") == {"train": ["train.txt"], "test": ["test.txt"]}
    assert "1 files are left out" in caplog.text and "vocabulary.txt" in caplog.text


def test_names_of_code_and_documents_say_nothing(tmp_path):
    assert splits("train.py", "test.py", "model.py") == splits("training.md", "evaluation.md.gz") == {}
    assert splits("train/test.py", "test/train.py") == {"train": ["train/test.py"], "test": ["test/train.py"]}
    for name in ("train.py", "test.py", "training.md", "evaluation.md", "model.py"):
        (tmp_path / name).write_text(name)
    assert len(list(open_text(str(tmp_path)).read())) == 5


def test_a_few_names_do_not_leave_out_the_files_that_outnumber_them(caplog):
    assert splits("train.txt", "test.txt", "a.txt", "b.txt", "c.txt") == {}
    assert "all 5 files are taken together" in caplog.text
    assert splits("train.txt", "test.txt", "a.txt", "b.txt") == {"train": ["train.txt"], "test": ["test.txt"]}
    in_folders = splits("en/train/1.txt", "en/test/1.txt", "en/a.txt", "en/b.txt", "en/c.txt")
    assert in_folders == {"train": ["en/train/1.txt"], "test": ["en/test/1.txt"]}


def test_names_of_media_count_only_where_all_name_a_split():
    assert splits("train_1.png", "test_1.png", are_media=True) == {"train": ["train_1.png"], "test": ["test_1.png"]}
    assert splits("train_1.png", "test_1.png", "cat.png", are_media=True) == {}
    assert splits("cats/test.png", "cats/1.png", "cats/validation/2.png", are_media=True) == {
        "train": ["cats/test.png", "cats/1.png"],
        "validation": ["cats/validation/2.png"],
    }


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "parquet"])
def test_texts_of_every_kind_are_divided_by_name(tmp_path, ending):
    from datasets import Dataset

    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        file = tmp_path / f"data/{split}-00000-of-00001.{ending}"
        rows = Dataset.from_dict({"text": [f"the words of {split}"]})
        writers = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet, "txt": Path.write_text}
        writers[ending](file, *rows["text"] if ending == "txt" else ())
    source = open_text(str(tmp_path))
    assert [document.text for document in source.read()] == ["the words of train"]
    assert find_validation_split(source, "train") == "validation"
    assert [document.text for document in open_text(str(tmp_path), split="test").read()] == ["the words of test"]


def names(folder, split="train", **options) -> list[str]:
    return [name for name, _ in open_source(str(folder), split, "image", suffixes=IMAGE_SUFFIXES, **options)]


@pytest.mark.parametrize("root", ["", "train"])
def test_a_held_out_folder_inside_the_one_of_training_is_no_training(tmp_path, image, caplog, root):
    folder = tmp_path / root
    for name in ("a.png", "cats/b.png", "validation/c.png", "cats/test/d.png"):
        image(folder / name)
    os.symlink(folder, folder / "cats/again")
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["a.png", "cats/b.png"]
    assert "2 files" in caplog.text and "kept out of training" in caplog.text
    assert names(tmp_path, "validation") == ["c.png"]
    assert names(folder) == ["a.png", "cats/b.png"]


def test_shards_of_an_index_belong_together(tmp_path, image):
    for name in ("a", "b", "c"):
        image(f"images/{name}.png")
    for name, shard in zip("abc", ("train-00", "train-01", "test-00")):
        (tmp_path / f"{shard}.jsonl").write_text(json.dumps({"file_name": f"images/{name}.png"}))
    assert names(tmp_path) == ["images/a.png", "images/b.png"]
    assert names(tmp_path, "test") == ["images/c.png"]


@pytest.mark.parametrize("place", ["../secret.png", "{root}/secret.png", "link.png", "folder/secret.png"])
def test_metadata_that_names_files_outside_is_refused(tmp_path, image, place):
    root = tmp_path / "data"
    image("secret.png"), image("data/a.png")
    os.symlink(tmp_path / "secret.png", root / "link.png"), os.symlink(tmp_path, root / "folder")
    file_name = place.format(root=tmp_path)
    (root / "metadata.csv").write_text(f"file_name,text\na.png,A\n{file_name},B\n")
    with pytest.raises(ValueError, match=r"metadata in .*data names .*\.png.*outside.*--allow_outside"):
        names(root)
    assert len(names(root, allow_outside=True)) == 2


def test_a_table_of_its_own_decides_whatever_folders_it_names(tmp_path, image):
    for name in ("train2014/a.png", "val2014/b.png", "val2014/c.png"):
        image(name)
    (tmp_path / "train.jsonl").write_text('{"image": "train2014/a.png"}\n{"image": "val2014/b.png"}\n')
    (tmp_path / "val.jsonl").write_text('{"image": "val2014/c.png"}\n')
    assert names(tmp_path / "train.jsonl") == ["train2014/a.png", "val2014/b.png"]
    assert names(tmp_path / "val.jsonl", "") == ["val2014/c.png"]
    assert names(tmp_path) == ["train2014/a.png", "val2014/b.png"]


def test_training_rows_that_are_all_held_out_are_refused(tmp_path, image, caplog):
    image("val/a.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.csv").write_text("file_name\n../val/a.png\n")
    with pytest.raises(FileNotFoundError, match="no image files"):
        names(tmp_path)
    assert "kept out of training" in caplog.text and "../val/a.png" in caplog.text
