"""Texts in tars of WebDataset's layout."""

import json

import fsspec
import pytest

from dataset_loading.text.sources import open_text
from tests.dataset_loading.test_tars import tar_bytes

MEMBERS = {
    "0001.txt": "\ufeffone\n".encode(),
    "0001.json": json.dumps({"text": "not this"}).encode(),
    "0002.json": json.dumps({"text": "two", "body": "zwei"}).encode(),
    "0003.json": json.dumps({"id": 3}).encode(),
    "0004.md": b"\xff\xff",
    "0005.txt": b"  ",
    "0006.pth": b"never read",
}


def documents(name, **options):
    source = open_text(str(name), **options)
    return [(document.key, document.text or document.problem) for document in source.read()], source


def test_a_sample_is_a_document_by_its_text_or_a_field_of_its_json(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(MEMBERS))
    read, source = documents(tmp_path)
    assert read[:2] == [("a.tar/0001.txt", "one\n"), ("a.tar/0002", "two")]
    assert [text for _, text in read[2::2]] == ["empty", "empty"] and "UTF-8" in read[3][1]
    assert source.left_out.counts == {"ending .pth may run code and is never read": 1} and len(read) == 5
    list(source.read())
    assert source.left_out.counts["ending .pth may run code and is never read"] == 1  # Not once per reading.
    read, _ = documents(tmp_path / "a.tar", text_column="body")
    assert read[1] == ("a.tar/0002", "zwei") and "'body'" in read[2][1] and "id" in read[2][1]


def test_tars_at_addresses_and_of_patterns_have_splits_and_a_damaged_one_is_a_problem(tmp_path):
    whole = tar_bytes({f"{i}.txt": f"text {i}".encode() for i in range(3)})
    for name, content in {"train-0": whole, "train-1": whole[:1536], "val-0": whole}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with fsspec.open(f"memory://texts/{name}.tar", "wb") as file:
            file.write(content)
    for name in (f"{tmp_path}/*.tar", "memory://texts", f"{tmp_path}/{{train-0,train-1,val-0}}.tar"):
        read, source = documents(name)
        assert sorted(source.splits) == ["train", "validation"] and source.n_files == 2
        assert [text for _, text in read[:3]] == ["text 0", "text 1", "text 2"]
        damage = [document for document in open_text(name).read() if document.is_file]
        assert len(damage) == 1 and damage[0].key == "train-1.tar" and "damaged" in damage[0].problem
    assert len(documents(f"{tmp_path}/*.tar", split="validation")[0]) == 3
    with pytest.raises(ValueError, match="test"):
        open_text(f"{tmp_path}/*.tar", split="test")
    with pytest.raises(FileNotFoundError, match=r"\*"):
        open_text(f"{tmp_path}/none-*.tar")


def test_a_server_that_does_not_answer_is_no_missing_file():
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1/a\.tar cannot be reached.*network"):
        open_text("http://127.0.0.1:1/a.tar")


def test_texts_beside_tars_are_read_instead_of_them(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(MEMBERS))
    (tmp_path / "b.txt").write_text("plain")
    assert documents(tmp_path)[0] == [("b.txt", "plain")]
