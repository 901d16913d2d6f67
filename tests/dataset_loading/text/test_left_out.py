"""What of a text source is read, and what is left out: endings, damaged files, duplicates, documents that are cut."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from dataset_loading.text.sources import open_text
from dataset_loading.text.tokenizers import load_tokenizer
from dataset_loading.text.windows import TextDataset, prepare_text

TEXTS = [f"Document {number} says {number * 7}." for number in range(40)]


def read(name, **options):
    return [document.problem or document.text for document in open_text(str(name), **options).read()]


def prepare(source, folder, **options):
    prepare_text(str(source), folder, "bytes", **options)
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt.gz", gzip.compress(b"one\r\n", mtime=0)),
        ("t.txt", "one\r\n".encode("utf-16")),
        ("t.json", b'[{"text": "one\\r\\n"}]'),
        ("t.json", b'{"text": "one\\r\\n"}\n'),
        ("t.tsv", b'id\tText\n1\t"one\r\n"\n'),
        ("t.csv.gz", gzip.compress(b'text;id\n"one\r\n";1\n', mtime=0)),
    ],
)
def test_endings_and_forms(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == read(tmp_path) == ["one\r\n"]


def test_settings_beside_texts_are_no_table(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "b.pdf").write_text("x")
    assert read(tmp_path) == ["one"]
    counts = open_text(str(tmp_path)).left_out.counts
    assert counts == {"ending .json is not read": 1, "ending .pdf is not read": 1}


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl.gz"])
def test_a_damaged_shard_counts_as_a_file(tmp_path, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    table = pyarrow.table({"text": TEXTS})
    parquet.write_table(table, raw / "a.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    whole = (raw / "a.parquet").read_bytes() if name == "b.parquet" else gzip.compress(lines, mtime=0)
    (raw / name).write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=rf"1 of 2 files have no text.*{name}.*is damaged"):
        prepare(raw, tmp_path / "out", max_broken_fraction=0.2)
    manifest = prepare(raw, tmp_path / "out", max_broken_fraction=0.5)
    assert manifest["left_out"]["unreadable, or no text"]["names"][0].startswith(name)


def test_duplicates_and_empty_documents_are_named(tmp_path, caplog):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " ", TEXTS[0]]))
    manifest = prepare(file, tmp_path / "out")
    names = {reason: group["names"] for reason, group in manifest["left_out"].items()}
    assert names.pop("empty") == ["t.jsonl:41"] and list(names.values()) == [["t.jsonl:42"]]
    assert "t.jsonl:41" in caplog.text and "t.jsonl:42" in caplog.text


def test_documents_are_cut_with_a_warning_or_not_at_all(tmp_path, caplog):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(f"Line {line} of {number}.\n" for line in range(600)))
    (tmp_path / "raw").mkdir()
    assert prepare(tmp_path, tmp_path / "cut", document_bytes=1024)["cut"]["documents"] > 20
    assert "--document_bytes" in caplog.text
    caplog.clear()
    manifest = prepare(tmp_path, tmp_path / "whole", document_bytes=0)
    assert manifest["cut"] is None and "--document_bytes" not in caplog.text
    assert (
        TextDataset(tmp_path / "whole", "validation", 8).n_documents,
        manifest["totals"]["train"]["documents"],
    ) == (1, 2)


def test_a_tokenizer_json_alone(tmp_path):
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path / "tokenizer.json", tmp_path):
        tokenizer = load_tokenizer(str(name))
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert tokenizer.encode("a b", add_special_tokens=False) == [2, 3]


def test_links_that_lead_nowhere_count_as_files(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1 of 41 files have no text.*gone\.txt \(link leads nowhere"):
        prepare(tmp_path, tmp_path / "out")
    manifest = prepare(tmp_path, tmp_path / "out", max_broken_fraction=0.1)
    assert manifest["left_out"] == {"link leads nowhere": {"count": 1, "names": ["gone.txt"]}}


def test_links_count_as_files_only_with_an_ending_that_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for name in ("gone.pt", "gone.tar.gz", "gone.txt.GZ"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    left_out = open_text(str(tmp_path)).left_out
    assert left_out.unreadable() == [("link leads nowhere", "gone.txt.GZ")]
    assert left_out.counts["ending .pt is not read"] == left_out.counts["ending .gz is not read"] == 1


def test_a_folder_of_held_out_texts_needs_no_split_in_its_names(tmp_path):
    for folder, texts in (("raw", TEXTS), ("held out", ["One held-out text.", "Another."])):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(text)
    manifest = prepare(tmp_path / "raw", tmp_path / "out", validation_source=str(tmp_path / "held out"))
    assert [manifest["totals"][split]["documents"] for split in ("train", "validation")] == [40, 2]
    with pytest.raises(ValueError, match="has no split 'test'; there is: train"):
        prepare(
            tmp_path / "raw",
            tmp_path / "other",
            validation_source=str(tmp_path / "held out"),
            validation_split="test",
        )


def test_what_lies_beside_splits_counts_once(tmp_path):
    raw = tmp_path / "raw"
    for name, texts in (("train/a.txt", "one"), ("val/b.txt", "two"), ("photo.heic", "x")):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(texts)
    manifest = prepare(raw, tmp_path / "out")
    assert manifest["left_out"] == {"ending .heic is not read": {"count": 1, "names": ["photo.heic"]}}


def test_bytes_of_a_table_that_are_not_utf8_say_what_to_do(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"text\ncaf\xe9\n")
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "half \\ud83d"}\n')
    assert "byte 0xe9 is not UTF-8; convert the file with iconv" in read(tmp_path / "t.csv")[0]
    assert r"not UTF-8: character 6 is half of a pair, \ud83d; remove" in read(tmp_path / "t.jsonl")[0]
