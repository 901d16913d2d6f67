import re

import datasets
import pytest
from pyarrow import parquet
from pyarrow import table as arrow_table

from dataset_loading.text.sources import (
    SEPARATORS,
    Document,
    cut_document,
    find_validation_split,
    from_rows,
    open_hub,
    open_text,
)


def read(name, **options):
    return [(one.key, one.text or one.problem) for one in open_text(str(name), **options).read()]


def test_a_folder_has_a_document_per_file(tmp_path):
    (tmp_path / "raw/deep").mkdir(parents=True)
    for name, content in {
        "b.txt": b"two\r\n",
        "a.md": b"\xef\xbb\xbf# one",
        "deep/c.py": b"x = 1\0",
        "LICENSE.txt": b"CC0\nmore",
        "image.png": b"no",
        ".hidden.txt": b"no",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "empty.txt": b" \n",
    }.items():
        (tmp_path / "raw" / name).write_bytes(content)
    found = dict(read(tmp_path / "raw"))
    assert re.search(r"latin\.txt: line 1 is not UTF-8 .*0xe9.* convert", found.pop("latin.txt"))
    assert found == {"a.md": "# one", "b.txt": "two\r\n", "deep/c.py": "x = 1\0", "empty.txt": "empty"}
    assert open_text(str(tmp_path / "raw")).licence == "CC0"


def test_tables_have_a_document_per_row(tmp_path):
    lines = [b'{"text": "one"}', b"", b'{"text": "\\ud83d\\ude00 \\u2028"}', b'{"text": "\\ud800"}', b'{"other": 1}']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([*lines, b'{"text": 5}', b'{"text": "\xff"}', b"{", b"[]"]))
    found = [text for _, text in read(tmp_path / "t.jsonl")]
    assert found[:2] == ["one", "😀 \u2028"]
    reasons = (
        "not UTF-8",
        "no 'text'; there is: other",
        "no text but 5",
        "not UTF-8",
        "line 8 is not JSON",
        "line 9 is .*, no object",
    )
    assert all(re.search(reason, text) for text, reason in zip(found[2:], reasons, strict=True))

    (tmp_path / "t.csv").write_text('id,body\n1,"a\r\nb"\n2\n3,' + "long " * 40000)
    first, (key, problem), last = read(tmp_path / "t.csv", text_column="body")
    assert first == ("t.csv:1", "a\r\nb") and last == ("t.csv:3", "long " * 40000)
    assert key == "t.csv:2" and "line 4 has 1 cells, the header 2" in problem
    parquet.write_table(arrow_table({"text": ["x", None, "y"], "n": [1, 2, 3]}), tmp_path / "t.parquet")
    assert [text for _, text in read(tmp_path / "t.parquet")] == ["x", "no text but None", "y"]


def test_hub_rows_are_documents():
    rows = datasets.Dataset.from_dict({"content": ["one", "", "two"], "n": [1, 2, 3]})
    assert [one.text or one.problem for one in from_rows(rows, "a/b:train", "content").read()] == [
        "one",
        "empty",
        "two",
    ]
    with pytest.raises(ValueError, match=r"text_column='text' is no column of a/b:train; there is: content, n"):
        from_rows(rows, "a/b:train", "text")


def test_hub_sets_are_known_by_their_revision_and_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("train", "validation"):
        (tmp_path / f"set/{name}.jsonl").write_text('{"text": "one"}\n')
    source = open_hub(str(tmp_path / "set"), "train")
    assert re.fullmatch(r".*/set:train@[0-9a-f]{16}", source.identity) and next(source.read()).text == "one"
    assert source.identity == open_hub(str(tmp_path / "set"), "train").identity
    assert [find_validation_split(source, split) for split in ("train[:9]", "test+validation[:5%]")] == [
        "validation",
        "",
    ]
    (tmp_path / "set/train.jsonl").write_text('{"text": "other"}\n')
    assert open_hub(str(tmp_path / "set"), "train").identity != source.identity


def test_hub_sets_that_are_scripts_are_explained(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/old.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"cannot load its split 'train': Dataset scripts are no longer supp"):
        open_hub(str(tmp_path / "old"), "train")


def test_tables_leave_out_the_texts_beside_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "README.md").write_text("about")
    assert read(tmp_path) == [("rows.jsonl:1", "one"), ("rows.jsonl:2", "two")]
    (tmp_path / "train").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "train/rows.jsonl")
    (tmp_path / "README.md").unlink()
    assert len(read(tmp_path)) == 2
    with pytest.raises(ValueError, match=r"has no split 'test'; there is: train"):
        open_text(str(tmp_path), split="test")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.txt", "a/b/c", "~/nowhere"])
def test_missing_paths_do_not_ask_the_hub(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_text(name)


def test_a_name_without_an_owner_is_none_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"there is no {tmp_path}/mine, and .* hub is named user/name"):
        open_text("mine")


def test_wrong_sources_are_explained(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(ValueError, match=r"text_column='text' is no column of .*t.csv; there is: a, b"):
        open_text(str(tmp_path / "t.csv"))
    with pytest.raises(FileNotFoundError, match=r"x.png holds no text; known endings: .txt .md"):
        open_text(str(tmp_path / "x.png"))
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none holds no text"):
        open_text(str(tmp_path / "none"))


@pytest.mark.parametrize("mark", [b"", *SEPARATORS, "東".encode()])
def test_cut_documents_are_whole_together(mark):
    whole = Document("k", mark.decode().join(str(number) * 40 for number in range(50)) + "🙂" * 60)
    parts = list(cut_document(whole, 300))
    assert "".join(part.text for part in parts) == whole.text
    sizes = [len(part.text.encode()) for part in parts]
    assert min(sizes) >= 147 and max(sizes) <= 450 and len(parts) > 5
    if mark in SEPARATORS:
        assert sum(part.text.encode().endswith(mark) for part in parts) > len(parts) - 3
    assert list(cut_document(Document("k", "short"), 300)) == [Document("k", "short")]
