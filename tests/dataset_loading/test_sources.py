import json
import zipfile

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dataset_loading.image.pixels import IMAGE_SUFFIXES
from dataset_loading.sources import has_file, open_source, read_media


def open_images(name, split="train", **options):
    return open_source(str(name), split, "image", suffixes=IMAGE_SUFFIXES, **options)


def names_and(column, source):
    return [(name, row.get(column)) for name, row in source]


def test_plain_folder_lists_every_image_and_labels_by_parent(tmp_path, image):
    for name in ("b.PNG", "cats/freight-train.png", "cats/test 1.png", "dogs/ä.png", ".hidden/x.png"):
        image(name)
    (tmp_path / "notes.txt").write_text("no image")
    assert names_and("label", open_images(tmp_path)) == [
        ("b.PNG", None),
        ("cats/freight-train.png", "cats"),
        ("cats/test 1.png", "cats"),
        ("dogs/ä.png", "dogs"),
    ]


def test_metadata_csv_per_split_keeps_awkward_captions(tmp_path, image):
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        image(name)
    (tmp_path / "train/metadata.csv").write_text('\ufefffile_name,text\na.png,None\nb.png,"red, or ""null"""\n')
    (tmp_path / "val/metadata.csv").write_text("file_name,text\nc.png,\n")
    assert names_and("text", open_images(tmp_path)) == [("a.png", "None"), ("b.png", 'red, or "null"')]
    assert names_and("text", open_images(tmp_path, "validation")) == [("c.png", "")]


def test_metadata_above_the_splits_is_divided(tmp_path, image):
    for name in ("train/a.png", "test/b.png"):
        image(name)
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.png,first\ntest/b.png,second\n")
    assert names_and("text", open_images(tmp_path, "test")) == [("b.png", "second")]


def test_jsonl_alone_keeps_line_separators_inside_strings(tmp_path, image):
    image("images/a.png")
    line = json.dumps({"file_name": "images/a.png", "text": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_text(line + "\n\n", encoding="utf-8")
    source = open_images(tmp_path / "list.jsonl")
    assert names_and("text", source) == [("images/a.png", "one\u2028two")]
    assert Image.open(read_media(source.rows[0]["image"])).size == (24, 24)


def test_one_jsonl_per_split(tmp_path, image):
    image("images/a.png")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"image": "images/a.png", "text": split}) + "\n")
    assert names_and("text", open_images(tmp_path, "test")) == [("images/a.png", "test")]


def test_nested_metadata_parquet_and_unlisted_files(tmp_path, image, caplog):
    image("part1/a.png"), image("part1/forgotten.png")
    datasets.Dataset.from_dict({"file_name": ["a.png"], "text": ["A"]}).to_parquet(tmp_path / "part1/metadata.parquet")
    assert names_and("text", open_images(tmp_path)) == [("part1/a.png", "A")]
    assert "1 files" in caplog.text and "forgotten.png" in caplog.text


def test_missing_listed_file_does_not_stop_the_listing(tmp_path, image):
    image("a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,A\ngone.png,B\n")
    (_, _), (_, gone) = open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_media(gone["image"])


def test_parquet_and_saved_data_sets_give_bytes_and_class_names(tmp_path, image):
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    file = {"path": "a.png", "bytes": image("raw/a.png", "blue").read_bytes()}
    data = datasets.Dataset.from_dict({"img": [file, file], "kind": [1, 0]}, features=features)
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet/train-00000-of-00001.parquet")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "parquet")
    assert source.media == "img" and names_and("kind", source) == [("a.png", "dog"), ("a.png", "cat")]
    assert Image.open(read_media(source.rows[0]["img"])).getpixel((0, 0)) == (0, 0, 255)
    assert len(open_images(tmp_path / "saved", "test", media="img")) == 2


def test_zip_archive_is_read(tmp_path, image):
    file = image("raw/a.png")
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set/images.zip", "w") as archive:
        archive.write(file, "a.png")
    ((_, row),) = open_images(tmp_path / "set")
    assert Image.open(read_media(row["image"])).size == (24, 24)


def test_licence_is_the_first_line(tmp_path, image):
    image("a.png")
    (tmp_path / "LICENSE.txt").write_text("CC0, example.org\nmore")
    assert open_images(tmp_path).licence == "CC0, example.org"


@pytest.mark.parametrize(
    ("files", "split", "error", "message"),
    [
        ([], "train", FileNotFoundError, "no image files under"),
        (["train/a.png", "test/b.png"], "dev", ValueError, "has no split 'dev'; there is: test, train"),
        (["train/a.png", "test/b.png"], "", ValueError, "has several splits"),
        (["train/a.png", "cars/b.png"], "train", ValueError, r"others with files \(cars\)"),
    ],
)
def test_wrong_folders_say_what_is_there(tmp_path, image, files, split, error, message):
    for name in files:
        image(name)
    with pytest.raises(error, match=message):
        open_images(tmp_path, split)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metadata.csv", "file_name,text\na.png,A\n,B\n", "row 2 has no 'file_name'"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file', "line 2 is not JSON"),
    ],
)
def test_damaged_index_is_named_with_its_line(tmp_path, image, file, text, message):
    image("a.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        open_images(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_of_a_table_with_several_kinds_of_files_belong_together(tmp_path, suffix):
    rows = [
        {"image": "pictures/a.png", "audio": "b.wav", "text": "both"},
        {"image": None, "audio": "c.wav", "text": "sound"},
        {"image": "pictures/a.png", "audio": None, "text": None},
        {"image": None, "audio": None, "text": "words"},
    ]
    file = tmp_path / f"metadata{suffix}"
    if suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(value or "" for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    elif suffix == ".jsonl":  # What is missing is not named.
        lines = [json.dumps({name: value for name, value in row.items() if value}) for row in rows]
        file.write_text("\n".join(lines))
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    for kind, other in (("image", "audio"), ("audio", "image")):
        source = open_source(str(tmp_path), "train", kind, suffixes=(".png",) if kind == "image" else (".wav",))
        names, listed = zip(*source)
        assert names == ("row-00000001", "row-00000002", "row-00000003", "row-00000004")
        has = [has_file(row[kind]) for row in listed]
        assert has == [row[kind] is not None for row in rows] and listed[0][other] == rows[0][other]
        with pytest.raises(FileNotFoundError, match="has no file"):
            read_media(listed[3][kind])


def test_rows_of_a_parquet_file_with_files_inside_belong_together(tmp_path):
    content = {"path": "a.png", "bytes": b"content"}
    rows = {"image": [content, None], "audio": [None, {**content, "path": "b.wav"}], "text": ["one", "two"]}
    types = {"image": datasets.Image(), "audio": datasets.Audio(), "text": datasets.Value("string")}
    schema = datasets.Features(types).arrow_schema  # Whose metadata says what the columns are.
    parquet.write_table(pyarrow.table(rows, schema=schema), tmp_path / "train.parquet")
    for kind, has in (("image", [True, False]), ("audio", [False, True])):
        source = open_source(str(tmp_path), "train", kind, suffixes=(".png",))
        assert [name for name, _ in source] == ["00000000", "00000001"]
        assert [has_file(row[kind]) for row in source.rows] == has


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "data/sets/mine", "list.jsonl"])
def test_missing_paths_do_not_ask_the_hub(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images(name)


def test_a_name_without_an_owner_is_none_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"there is no {tmp_path}/mine, and .* hub is named user/name"):
        open_images("mine")


@pytest.mark.parametrize("address", ["nowhere://a.png", "http://127.0.0.1:9/a.png", "memory://missing.png"])
def test_addresses_that_cannot_be_read_are_named(address):
    with pytest.raises(OSError, match=rf"{address} is an address .*download"):
        read_media({"path": address, "bytes": None})


def test_single_parquet_files_and_archives_of_plain_bytes(tmp_path, image):
    content = image("raw/a.png", "blue").read_bytes()
    for number, values in enumerate(([content], [{"bytes": content, "path": "a.png"}])):
        pyarrow_table = pyarrow.table({"picture": values, "text": ["blue"]})
        parquet.write_table(pyarrow_table, tmp_path / f"{number}.parquet")
        ((_, row),) = open_images(tmp_path / f"{number}.parquet")
        assert read_media(row["picture"]).getvalue() == content and row["text"] == "blue"
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", content)
    ((_, row),) = open_images(tmp_path / "images.zip")
    assert read_media(row["image"]).getvalue() == content


def test_damaged_shards_and_folders_without_images_say_what_is_there(tmp_path):
    for folder, name in (("shards", "train-0.parquet"), ("phone", "IMG_1.HEIC")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"PAR1 cut off")
    with pytest.raises(FileNotFoundError, match=r"train-0\.parquet is damaged .*copy it again"):
        open_images(tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match=r"1 ending \.heic is not read \(IMG_1\.HEIC\)"):
        open_images(tmp_path / "phone")


def test_metadata_in_capitals_and_names_that_no_system_takes(tmp_path, image):
    image("a.png")
    (tmp_path / "METADATA.CSV").write_text(f"file_name,text\na.png,A\n{'b' * 3000}.png,B\n")
    assert [text for _, text in names_and("text", open_images(tmp_path))] == ["A", "B"]


@pytest.mark.parametrize("name", ["metadata.csv", "."])
def test_metadata_without_a_column_of_files_is_refused(tmp_path, image, name):
    image("a.png")
    (tmp_path / "metadata.csv").write_text("place,text\na.png,A\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: row 1 has no 'file_name'; its columns: place, text"):
        open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.json", '{"images": [{"file_name": "a.png"}], "annotations": []}'),
        ("train.json", '{\n  "images": [],\n  "annotations": []\n}\n'),
        ("metadata.json", '{\n  "licence": "CC0"\n}\n'),
        ("test.csv", "id,prob\n1,0.5\n"),
    ],
)
def test_tables_that_name_no_files_are_passed_over(tmp_path, image, caplog, name, text):
    image("cats/a.png")
    (tmp_path / name).write_text(text)
    assert names_and("label", open_images(tmp_path)) == [("cats/a.png", "cats")]
    assert f"{name} is passed over" in caplog.text


def test_of_several_metadata_files_the_first_ending_counts(tmp_path, image):
    image("a.png")
    (tmp_path / "metadata.json").write_text('[{"file_name": "a.png", "text": "json"}]')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "jsonl"}')
    source = open_images(tmp_path)
    assert names_and("text", source) == [("a.png", "jsonl")]
    assert source.left_out.as_dict() == {"metadata that is not read": {"count": 1, "names": ["metadata.json"]}}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metadata.csv", "file_name,text\n", r"metadata\.csv has no rows; .* remove it"),
        ("metadata.csv", "", r"metadata\.csv has no rows"),
        ("metadata.csv", "file_name,text\na.png,A\n,\n", r"row 2 has no 'file_name', its cell is empty; .* remove"),
        ("metadata.jsonl", '{"file_name": 5}\n', r"row 1 has no 'file_name' but 5; write"),
        ("metadata.jsonl", '{"file_name": ["a.png", "b.png"]}\n', r"row 1 has no 'file_name' but \['a\.png'"),
        ("metadata.csv", "file_name\na.png\nhttps://x.org/b.png\n", r"row 2 names a URL, https://x\.org/b\.png; down"),
    ],
)
def test_rows_without_a_file_say_what_is_there_instead(tmp_path, image, file, text, message):
    image("a.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


def test_backslashes_of_a_table_from_windows_separate_folders(tmp_path, image):
    image("red/a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n.\\red\\a.png,A\n")
    assert names_and("text", open_images(tmp_path)) == [("red/a.png", "A")]
    (tmp_path / "metadata.csv").write_text("file_name,text\nred\\..\\..\\b.png,A\n")
    image("../b.png")
    with pytest.raises(ValueError, match="--allow_outside"):
        open_images(tmp_path)


@pytest.mark.parametrize("name", ["x" * 251, "é" * 125])
def test_names_of_the_maximum_length_have_no_sidecars(tmp_path, image, name):
    image(f"{name}.png")
    image("b.png")
    (tmp_path / "b.txt").write_text("B")
    assert len(names_and("text", open_images(tmp_path))) == 2


@pytest.mark.parametrize("name", [".", "metadata.csv"])
def test_a_column_split_of_a_table_holds_rows_out(tmp_path, image, name):
    for file in "abcd":
        image(f"{file}.png")
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,split\na.png,A,train\nb.png,B,Val\nc.png,C,test\nd.png,D,\n"
    )
    source = open_images(tmp_path / name)
    assert names_and("text", source) == [("a.png", "A"), ("d.png", "D")]
    assert source.splits == ["train", "validation", "test"]
    assert names_and("text", open_images(tmp_path / name, "validation")) == [("b.png", "B")]


def test_a_column_split_with_other_values_is_said_to_tell_nothing(tmp_path, image, caplog):
    image("a.png")
    image("b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,split\na.png,A,train\nb.png,B,left\n")
    assert len(open_images(tmp_path)) == 2
    assert "'left'" in caplog.text and "2 rows are taken together" in caplog.text


def test_two_folders_of_one_split_are_refused(tmp_path, image):
    for name in ("train/a.png", "training/b.png"):
        image(name)
    with pytest.raises(ValueError, match=r"train and .*training are both the split 'train'; put"):
        open_images(tmp_path)


@pytest.mark.parametrize("place", ["a.zip", "."])
def test_a_damaged_archive_is_named(tmp_path, place):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4, and nothing else")
    with pytest.raises(FileNotFoundError, match=r"a\.zip is damaged \(File is not a zip file\); copy it again"):
        open_images(tmp_path / place)


@pytest.mark.parametrize("name", ["a.png", "a.tar.gz", "list.txt"])
def test_a_file_that_is_no_table_asks_for_its_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=rf"{name} is no table or archive of image files .*; give its folder"):
        open_images(tmp_path / name)


def test_a_folder_and_a_table_of_one_split_are_no_contradiction(tmp_path, image):
    for name in ("train/a.png", "valid/b.png"):
        image(name)
    (tmp_path / "val.csv").write_text("file_name,text\nvalid/b.png,B\n")
    assert names_and("text", open_images(tmp_path, "validation")) == [("valid/b.png", "B")]
    (tmp_path / "train.csv").write_text("file_name,text\ntrain/a.png,A\n")
    assert names_and("text", open_images(tmp_path, "train")) == [("train/a.png", "A")]
