import bz2
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from dataset_loading.tables import iterate_table, read_table, suffix_of, table_columns

ROW = {"file_name": "a.png", "text": "a red square"}


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "file_name,text\na.png,a red square\n"),
        ("t.csv", '\ufeff"file_name", "text"\r\na.png, a red square\r\n\r\n'),
        ("t.csv", " File_Name ;TEXT\na.png;a red square\n"),
        ("t.csv", "sep=;\r\nfile_name;text\r\na.png;a red square\r\n"),  # As for Excel.
        ("t.csv", "file_name\ttext\na.png\ta red square"),
        ("t.csv", "file_name|text\na.png|a red square"),
        ("t.csv", ",file_name,text\n0,a.png,a red square\n"),  # As pandas writes it with its index.
        ("t.csv", "file_name,text,\na.png,a red square,\n"),
        ("t.csv", "file_name,text\ra.png,a red square\r"),
        ("t.csv", "file_name,text\r\na.png,a red square\r\n".encode("utf-16")),
        ("t.csv", "file_name,text\r\na.png,a red square\r\n".encode("utf-16-le")),
        ("t.tsv", "file_name\ttext\na.png\ta red square\n"),
        ("t.json", '[{"file_name": "a.png", "text": "a red square"}]'),
        ("t.json", '{"file_name": "a.png", " Text ": "a red square"}\n'),
        ("t.jsonl", '\n [{"file_name": "a.png",\n "text": "a red square"}]'),
        ("t.csv.gz", gzip.compress(b"file_name,text\n", mtime=0) + gzip.compress(b"a.png,a red square\n", mtime=0)),
        ("t.jsonl.zst", zstd(b'{"file_name": "a.png", "text": "a red square"}\n')),
        ("t.tsv.bz2", bz2.compress(b"file_name\ttext\na.png\ta red square\n")),
    ],
)
def test_forms_of_the_same_table(tmp_path, name, content):
    file = write(tmp_path, name, content)
    assert read_table(file) == [ROW]
    assert table_columns(file) in ([], list(ROW))


@pytest.mark.parametrize(
    ("name", "content", "place", "remedy"),
    [
        ("t.csv", "file_name,text\na.png,a cat, on a mat\n", "line 2 has 3 cells, the header 2", "double quotes"),
        ("t.csv", 'file_name,text\na.png,"a\nb"\nb.png\n', "line 4 has 1 cells, the header 2", "give each column"),
        ("t.csv", 'file_name,text\na.png,"a cat\nb.png,a dog\n', "line 2 cannot be read", "close the quotes"),
        ("t.csv", 'file_name,text\na.png,"a cat\nb.png,"a dog"\n', "line 2 cannot be read", "close the quotes"),
        ("t.csv", "file_name,text\na.png,A\nb.png,é\n".encode("latin-1"), "line 3 is not UTF-8", "iconv"),
        ("t.csv", "file_name,text\na.png,A\0B\n", "line 2 has a NUL byte", "remove it"),
        ("t.csv", "file_name,text,text\na.png,A,B\n", "two columns are named 'text'", "rename"),
        ("t.jsonl", '{"file_name": "a.png"}\nnull\n', "line 2 is null, no object", "one object per line"),
        ("t.jsonl", '{"file_name": "a.png"}\n{"file', "line 2 is not JSON", "one object per line"),
        ("t.json", '[{"file_name": "a.png"},\n{"file', "line 2: the array is not JSON", "repair"),
        ("t.json", '["a.png"]', 'entry 1 is "a.png", no object', "an object"),
        ("t.json", "[" * 100_000, "line 1: the array is not JSON", "repair"),
        ("t.jsonl.gz", gzip.compress(b'{"text": 1}\n' * 1000, mtime=0)[:-20], "is damaged", "copy it again"),
        ("t.jsonl.zst", zstd(b'{"text": 1}\n' * 1000)[:-5], "is damaged", "copy it again"),
        ("t.parquet", b"PAR1 cut off", "is damaged", "copy it again"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, place, remedy):
    with pytest.raises(ValueError) as error:
        read_table(write(tmp_path, name, content))
    assert f"{name}" in str(error.value) and place in str(error.value) and remedy in str(error.value)


def test_quotes_are_characters_in_tables_that_are_not_quoted(tmp_path):
    plain = write(tmp_path, "plain.tsv", 'text\tage\n"Yes" he said\t5"\n')
    quoted = write(tmp_path, "quoted.tsv", 'text\tage\n"""Yes"" he said"\t5\n')
    assert read_table(plain) == [{"text": '"Yes" he said', "age": '5"'}]
    assert read_table(quoted) == [{"text": '"Yes" he said', "age": "5"}]


def test_long_cells_and_column_names_of_others(tmp_path):
    file = write(tmp_path, "t.csv", f"file_name,Title Case\na.png,{'long ' * 40_000}\n")
    assert read_table(file) == [{"file_name": "a.png", "Title Case": "long " * 40_000}]
    assert suffix_of(file.with_name("a.b.JSONL.GZ")) == ".jsonl" and suffix_of(file.with_name("a.gz")) == ".gz"


def test_columns_keep_their_capitals_where_asked_for_or_where_two_would_be_one(tmp_path):
    named = write(tmp_path, "named.csv", "ID,Text\n1,one\n")
    assert [row.value for row in iterate_table(named, ["Text"])] == [{"ID": "1", "Text": "one"}]
    assert table_columns(named, ["Text"]) == ["ID", "Text"] and table_columns(named, ["text"]) == ["ID", "text"]
    row = {"Text": "one", "text": "two", "Label": "three"}
    lines = write(tmp_path, "t.jsonl", json.dumps(row))
    array = write(tmp_path, "t.json", json.dumps([row]))
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    for file in (lines, array, tmp_path / "t.parquet"):
        assert read_table(file) == [{"Text": "one", "text": "two", "label": "three"}]
        (asked,) = (value for _, value in iterate_table(file, ["Text"]))
        assert asked["Text"] == "one"
    assert table_columns(tmp_path / "t.parquet") == ["Text", "text", "label"]
