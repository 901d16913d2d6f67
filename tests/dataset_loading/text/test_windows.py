import copy
import json
import math
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from dataset_loading.collators import collate_stack
from dataset_loading.text.encoding import encode_pieces
from dataset_loading.text.survey import sample_texts, smallest
from dataset_loading.text.tokenizers import byte_lengths, byte_tokenizer, document_encoder
from dataset_loading.text.windows import TextDataset, bits_per_byte, prepare_text

TEXTS = [f"Document {number}: {'word ' * (number % 13)}end of {number * 7}.\n" for number in range(300)]


@pytest.fixture
def rows(tmp_path):
    """300 short documents in a .jsonl file."""
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


def write_rows(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def prepare(source, folder, *args, **options):
    return prepare_text(str(source), folder, *args, **options)


def documents(folder, split, **options):
    """The texts of a split, as the tokenizer gives them back."""
    ds = TextDataset(folder, split, 8)
    return [ds.tokenizer.decode(ds.document(number)[1:-1]) for number in range(ds.n_documents)]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


# ---- What is prepared.


def test_python_topics_need_no_download(tmp_path):
    ds = TextDataset(prepare("python-topics", tmp_path / "a", "bpe", vocab_size=600), "validation", 128)
    assert ds.manifest["cut"]["document_bytes"] == 8192 and "PSF" in ds.manifest["licence"]
    assert ds.vocab_size == 600 and ds.n_documents >= 3 and ds.n_bytes / ds.n_targets > 2


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", None), ("bpe", 290)])
def test_documents_come_back_between_their_ends(tmp_path, rows, tokenizer, size):
    odd = ["\0\r\n🙂 é", "<bos> </s>\u2028 ", "e\u0301 東京" * 100]
    folder = prepare(write_rows(rows, TEXTS + odd), tmp_path / "set", tokenizer, vocab_size=size)
    train, validation = documents(folder, "train"), documents(folder, "validation")
    assert len(validation) == 15 and sorted(train + validation) == sorted(TEXTS + odd)
    assert [text for text in TEXTS + odd if text in set(train)] == train  # In the order of the source.
    for split, texts in (("train", train), ("validation", validation)):
        ds = TextDataset(folder, split, 8)
        assert {int(ds.document(number)[0]) for number in range(len(texts))} == {1}
        assert {int(ds.document(number)[-1]) for number in range(len(texts))} == {ds.manifest["tokenizer"]["end"]}
        assert ds.n_bytes == sum(len(text.encode()) for text in texts)
        assert ds.n_targets == ds.n_tokens - ds.n_documents


def test_the_split_depends_on_texts_alone(tmp_path, rows):
    first = documents(prepare(rows, tmp_path / "a"), "validation")
    other = write_rows(tmp_path / "other.jsonl", TEXTS[::-1])
    assert sorted(documents(prepare(other, tmp_path / "b"), "validation")) == sorted(first)
    assert sorted(documents(prepare(rows, tmp_path / "c", seed=1), "validation")) != sorted(first)


@pytest.mark.parametrize(("n", "fraction", "expected"), [(100, 0.1, 10), (5, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0)])
def test_the_validation_share_is_exact(n, fraction, expected):
    hashes = np.random.default_rng(0).permutation(n).astype(np.uint64)
    assert smallest(hashes, fraction).sum() == expected
    assert (hashes[smallest(hashes, fraction)] < expected).all()


def test_no_validation_document_reaches_the_trained_tokenizer(tmp_path):
    texts = [f"{number:03} " + chr(0x4E00 + number) * 60 for number in range(250)]  # A character for each document.
    folder = prepare(write_rows(tmp_path / "rows.jsonl", texts), tmp_path / "set", "bpe", vocab_size=1400)
    assert len(documents(folder, "validation")) == 12
    ds = TextDataset(folder, "train", 8)
    for split in ("train", "validation"):
        for text in documents(folder, split):
            is_merged = len(ds.tokenizer(text[-60:], add_special_tokens=False)["input_ids"]) < 60
            assert is_merged == (split == "train")


def test_the_tokenizers_sample_has_its_size_whatever_the_order():
    texts = [f"{number} " * 50 for number in range(200)]
    sample = sample_texts(texts, 2000, seed=0)
    assert 1000 < sum(map(len, sample)) <= 2000
    assert sample == sample_texts(texts[::-1], 2000, seed=0) != sample_texts(texts, 2000, seed=1)
    assert sorted(sample_texts(texts, 1 << 20, seed=0)) == sorted(texts)
    assert len(sample_texts(["x" * 5000], 10, seed=0)) == 1


def test_equal_documents_are_kept_once(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", TEXTS + TEXTS[:50])
    once, all_of_them = prepare(file, tmp_path / "a"), prepare(file, tmp_path / "b", keep_duplicates=True)
    assert manifest(once)["duplicates"] == 50 and manifest(all_of_them)["duplicates"] == 0
    assert len(documents(once, "train") + documents(once, "validation")) == 300
    train, validation = documents(all_of_them, "train"), documents(all_of_them, "validation")
    assert len(train + validation) == 350 and not set(train) & set(validation)


def test_validation_may_have_a_source_of_its_own(tmp_path, rows):
    own = write_rows(tmp_path / "own.jsonl", [*TEXTS[:2], "only here"])
    folder = prepare(rows, tmp_path / "set", validation_source=str(own))
    assert documents(folder, "validation") == [*TEXTS[:2], "only here"]
    assert documents(folder, "train") == TEXTS[2:]  # What validates is not trained on.
    assert manifest(folder)["cut"] is None


def test_broken_documents_are_left_out_and_reported(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", TEXTS)
    file.write_text(file.read_text() + '{"text": null}\n')
    folder = prepare(file, tmp_path / "set")
    assert manifest(folder)["broken"] == [{"source": "rows.jsonl:301", "reason": "no text but None"}]
    file.write_text(file.read_text() + '{"text": null}\n' * 4 + '{"text": ""}\n' * 300)
    with pytest.raises(
        ValueError,
        match=r"5 of 305 documents have no text, more than --max_broken_fraction=0.01: rows.jsonl:301 \(no text but N",
    ):
        prepare(file, tmp_path / "more")
    assert not (tmp_path / "more").exists()
    assert manifest(prepare(file, tmp_path / "more", max_broken_fraction=0.1))["n_broken"] == 5


def test_one_file_is_cut_so_that_a_part_validates(tmp_path):
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 20 for number in range(400))
    (tmp_path / "book.txt").write_text(text)
    folder = prepare(tmp_path / "book.txt", tmp_path / "set", document_bytes=1024)
    parts = documents(folder, "train") + documents(folder, "validation")
    assert manifest(folder)["cut"]["documents"] == len(parts) > 40
    assert sorted("".join(parts)) == sorted(text)
    assert len(documents(folder, "validation")) == round(0.05 * len(parts))


def test_empty_documents_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    file = write_rows(tmp_path / "rows.jsonl", TEXTS + ["", " \n"] * 100)
    folder = prepare(file, tmp_path / "set", max_broken_fraction=0.0)
    assert (manifest(folder)["n_empty"], manifest(folder)["n_broken"], manifest(folder)["broken"]) == (200, 0, [])
    assert caplog.text.count("left out: 200 empty") == 1
    assert len(documents(folder, "train") + documents(folder, "validation")) == 300
    with pytest.raises(ValueError, match="no training document: 2 read, 2 empty, 0 broken"):
        prepare(write_rows(file, ["", " "]), tmp_path / "none")


def test_a_thousand_broken_documents_are_listed(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", TEXTS + [None] * 1200)
    found = manifest(prepare(file, tmp_path / "set", max_broken_fraction=0.9))
    assert found["n_broken"] == 1200 and len(found["broken"]) == 1000


@pytest.mark.parametrize("layout", ["validation/rows.jsonl", "dev/rows.jsonl", "val.jsonl"])
def test_a_validation_split_of_the_sources_own_is_held_out(tmp_path, caplog, layout):
    caplog.set_level("INFO")
    own, train = tmp_path / "raw" / layout, tmp_path / "raw/train" / "rows.jsonl"
    for file, texts in ((own, ["held", "out"]), (train, TEXTS)):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, texts)
    folder = prepare(tmp_path / "raw", tmp_path / "set")
    assert documents(folder, "validation") == ["held", "out"] and documents(folder, "train") == TEXTS
    assert manifest(folder)["own_validation"] == "validation"
    assert "its own split 'validation' is held out; validation_fraction is unused" in caplog.text
    drawn = prepare(tmp_path / "raw", tmp_path / "drawn", validation_fraction=0.1)
    assert len(documents(drawn, "validation")) == 30 and manifest(drawn)["own_validation"] is None
    other = prepare(tmp_path / "raw", tmp_path / "other", dataset_split="validation")
    assert sorted(documents(other, "train") + documents(other, "validation")) == ["held", "out"]


def test_a_validation_folder_without_texts_is_no_split(tmp_path):
    (tmp_path / "raw/validation").mkdir(parents=True)
    (tmp_path / "raw/train").mkdir()
    write_rows(tmp_path / "raw/train/rows.jsonl", TEXTS)
    assert len(documents(prepare(tmp_path / "raw", tmp_path / "set"), "validation")) == 15


def test_a_single_short_document_cannot_be_held_out(tmp_path, rows):
    (tmp_path / "note.txt").write_text("short")
    with pytest.raises(ValueError, match=r"too little text: 5 bytes in 1 document.*or give --validation_dataset"):
        prepare(tmp_path / "note.txt", tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match=r"rows.jsonl@.* gives no validation document"):
        prepare(tmp_path / "note.txt", tmp_path / "set", validation_source=str(write_rows(rows, [" "])))
    folder = prepare(tmp_path / "note.txt", tmp_path / "set", validation_fraction=0.0)
    with pytest.raises(
        FileNotFoundError, match=r"no documents in split 'validation' \(it has {'train': 1, 'val.*: 0}\)"
    ):
        TextDataset(folder, "validation", 8)
    with pytest.raises(FileNotFoundError, match="no documents in split 'test'"):
        TextDataset(folder, "test", 8)


def test_other_tokenizers_count_the_texts_bytes_too(tmp_path, rows):
    words_tokenizer().save_pretrained(tmp_path / "words")
    folder = prepare(rows, tmp_path / "set", str(tmp_path / "words"))
    ds = TextDataset(folder, "train", 64)
    assert ds.manifest["tokenizer"]["dtype"] == "uint32" and ds.vocab_size == 70001
    assert ds.document(0).tolist() == [7, 1, 0, 5, 3, 4, 0, 6, 7]
    assert ds.padding == 7 and ds.manifest["totals"]["train"]["unknown_tokens"] == 2 * ds.n_documents
    assert sum(int(item["n_bytes"]) for item in ds) == ds.n_bytes == sum(map(len, documents_of(rows, folder)))
    assert prepare(rows, folder, str(tmp_path / "words")) == folder


def words_tokenizer():
    """A tokenizer that knows five words, with ids above 65535, an end and no padding."""
    words = {word: number for number, word in enumerate(["[UNK]", "Document", "word", "end", "of", ":", ".", "[E]"])}
    backend = Tokenizer(models.WordLevel({**words, "[far]": 70000}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]", unk_token="[UNK]")


def documents_of(rows, folder):
    """The training documents among the rows, by the split of bytes, which is the same with every tokenizer."""
    return documents(prepare(rows, folder.with_name("bytes")), "train")


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", None), ("bpe", 300)])
def test_long_documents_are_encoded_in_pieces(tmp_path, tokenizer, size):
    long = "東京 long words\n\n" * 50000
    file = write_rows(tmp_path / "rows.jsonl", ["short", long, "after"])
    folder = prepare(file, tmp_path / "set", tokenizer, vocab_size=size, validation_fraction=0.0)
    assert documents(folder, "train") == ["short", long, "after"]
    pieces, ds = manifest(folder)["pieces"], TextDataset(folder, "train", 8)
    assert (pieces["documents"], pieces["is_exact"]) == (1, tokenizer == "bytes")
    ids = ds.document(1)
    assert (ids == 1).sum() + (ids == 2).sum() == 2  # One first and one last token.
    if tokenizer == "bytes":
        assert bytes((ids[1:-1] - 2).tolist()) == long.encode()


@pytest.mark.parametrize("end", ["", " "])
def test_pieces_have_the_bytes_of_the_whole(end):
    text = " Document word 7 end .\n" * 40 + end
    for tokenizer in (byte_tokenizer(), words_tokenizer()):
        lengths = byte_lengths(tokenizer) if tokenizer.eos_token == "<bos>" else None
        core = document_encoder(tokenizer)
        ((whole, widths),) = encode_pieces(core, text, lengths)
        pieces = list(encode_pieces(core, text, lengths, size=100))
        assert len(pieces) > 5 and np.concatenate([ids for ids, _ in pieces]).tolist() == whole.tolist()
        assert sum(widths.sum() for _, widths in pieces) == widths.sum()


# ---- The folder.


def test_equal_settings_return_at_once(tmp_path, rows):
    folder = prepare(rows, tmp_path / "set", "bpe", vocab_size=300)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert prepare(rows, folder, "bpe", vocab_size=300, max_broken_fraction=0.5) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert prepare(rows, tmp_path / "again", "bpe", vocab_size=300) and manifest(tmp_path / "again") == manifest(
        folder
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": "bytes", "vocab_size": None},
            "tokenizer='bpe' there, 'bytes' now; .*vocab_size=300 there, 258",
        ),
        ({"vocab_size": 301}, "vocab_size=300 there, 301 now"),
        ({"validation_fraction": 0.1}, "validation='0.05 of the source' there, '0.1 of the source' now"),
        ({"seed": 7}, "seed=42 there, 7 now"),
        ({"source": "python-topics"}, "source='rows.jsonl@.*' there, 'python-topics@.*' now"),
    ],
)
def test_other_settings_are_refused(tmp_path, rows, changes, message):
    options = {"source": str(rows), "tokenizer": "bpe", "vocab_size": 300}
    prepare_text(folder=tmp_path / "set", **options)
    with pytest.raises(ValueError, match=f"{message}.*Choose another folder, or delete it"):
        prepare_text(folder=tmp_path / "set", **{**options, **changes})


def test_a_later_start_hashes_what_has_changed(tmp_path, caplog):
    caplog.set_level("INFO")
    for name, text in (("a", "one " * 9), ("b", "two " * 9)):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{name}.txt").write_text(text)
    folder = prepare(tmp_path / "raw", tmp_path / "set")
    assert "hashing 0.0 MB of texts in 2 files" in caplog.text
    caplog.clear()
    assert prepare(tmp_path / "raw", folder) and "hashing" not in caplog.text
    os.utime(tmp_path / "raw/a.txt", ns=(1, 1))
    for _ in range(2):
        assert prepare(tmp_path / "raw", folder) and caplog.text.count("in 1 files") == 1
    (folder / "digests.json").write_text("{")
    assert prepare(tmp_path / "raw", folder) and "in 2 files" in caplog.text
    (tmp_path / "raw/b.txt").write_text("three " * 6)  # As long as before.
    with pytest.raises(ValueError, match=r"source='raw@.*there, 'raw@"):
        prepare(tmp_path / "raw", folder)


def test_a_changed_source_is_refused(tmp_path, rows):
    prepare(rows, tmp_path / "set")
    write_rows(rows, TEXTS[1:])
    with pytest.raises(ValueError, match=r"source='rows.jsonl@"):
        prepare(rows, tmp_path / "set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 300}, "vocab_size=300 has no effect with tokenizer='bytes'"),
        ({"tokenizer": "bpe", "vocab_size": 200}, "vocab_size=200 must be at least 259"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must be in \[0, 1\)"),
        ({"max_broken_fraction": 2.0}, "max_broken_fraction=2.0"),
        ({"limit": 0}, "limit=0 reads nothing"),
        ({"document_bytes": 1}, "document_bytes=1 must be >= 64"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(rows, tmp_path / "set", **options)


def test_a_failed_run_leaves_nothing_that_counts(tmp_path, rows):
    words_tokenizer().save_pretrained(tmp_path / "words")
    long = write_rows(tmp_path / "long.jsonl", [*TEXTS, "x" * 70000])
    with pytest.raises(
        ValueError, match=r"long.jsonl:301: one token stands for 70000 bytes; choose another tokenizer"
    ):
        prepare(long, tmp_path / "set", str(tmp_path / "words"), validation_fraction=0.0)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["words"]


def test_what_a_killed_run_left_is_replaced(tmp_path, rows):
    (tmp_path / ".set.123.tmp").mkdir()
    (tmp_path / ".set.123.tmp/train.bin").write_text("half")
    assert len(documents(prepare(rows, tmp_path / "set"), "train")) == 285
    assert not (tmp_path / ".set.123.tmp").exists()


def test_folders_of_something_else_are_refused(tmp_path, rows):
    folder = prepare(rows, tmp_path / "set")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not empty and no prepared text"):
        prepare(rows, folder)
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json"):
        TextDataset(folder, "train", 8)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextDataset(tmp_path / "nowhere", "train", 8)
    (tmp_path / "empty").mkdir()
    assert prepare(rows, tmp_path / "empty")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"stage": "image_vae"}, "stage .*'image_vae'"), ({"schema": 0}, "schema"), (None, "damaged")],
)
def test_foreign_manifests_are_refused(tmp_path, rows, changes, message):
    folder = prepare(rows, tmp_path / "set")
    content = "{" if changes is None else json.dumps({**manifest(folder), **changes})
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TextDataset(folder, "train", 8)


def test_a_shortened_file_is_refused(tmp_path, rows):
    folder = prepare(rows, tmp_path / "set")
    size = (folder / "train.bin").stat().st_size
    with open(folder / "train.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=f"train.bin has 100 bytes, the manifest says {size}; delete"):
        TextDataset(folder, "train", 8)


def test_two_processes_at_once_write_once(tmp_path, rows):
    context = multiprocessing.get_context("fork")
    with FileLock(tmp_path / ".set.lock"):  # Both wait here, so that both found nothing.
        workers = [context.Process(target=prepare, args=(rows, tmp_path / "set", "bytes")) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.15)
        assert not (tmp_path / "set").exists() and all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(documents(tmp_path / "set", "train")) == 285


# ---- Windows.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three sets of the same documents, without validation: of bytes, of pairs, and of pairs with stored widths."""
    root = tmp_path_factory.mktemp("text")
    texts = ["a", "bc 🙂", "long " * 30, "é" * 9, "x" * 17]
    rows = write_rows(root / "rows.jsonl", texts)
    options = {"validation_fraction": 0.0}
    folders = {name: prepare(rows, root / name, name, **options) for name in ("bytes", "bpe")}
    folders["other"] = prepare(rows, root / "other", str(root / "bpe/tokenizer"), **options)
    return folders, texts


@pytest.mark.parametrize("name", ["bytes", "bpe", "other"])
@pytest.mark.parametrize("L", [2, 3, 7, 31, 64, 1000])
def test_windows_have_every_target_once(folders, name, L):
    ds, tokenizer = TextDataset(folders[0][name], "train", L), TextDataset(folders[0][name], "train", 8).tokenizer
    wanted = []  # (document, input, target) of every pair of neighbours, by a slow loop.
    for number, text in enumerate(folders[1]):
        ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        wanted += [(number, *pair) for pair in zip(ids, ids[1:])]
    found, n_bytes, n_seen = [], 0, 0
    for index in range(len(ds)):
        item = ds[index]
        ids, segments = item["input_ids"].tolist(), item["segment_ids"].tolist()
        assert len(ids) == len(segments) == L and item["index"] == index
        assert segments[0] == 0 and (index == len(ds) - 1 or min(segments) == 0)
        for position in range(L - 1):
            if segments[position] == segments[position + 1]:
                found.append((ids[position], ids[position + 1]))
        n_seen += sum(segment >= 0 for segment in segments[1:])
        n_bytes += int(item["n_bytes"])
    assert found == [pair[1:] for pair in wanted]
    assert len(found) == ds.n_targets == ds.n_tokens - ds.n_documents
    assert n_seen == ds.n_tokens - 1
    assert n_bytes == ds.n_bytes == sum(len(text.encode()) for text in folders[1])


def test_bytes_of_a_window_are_those_of_its_targets(folders):
    ds = TextDataset(folders[0]["bytes"], "train", 9)
    for item in ds:
        targets, same = item["input_ids"][1:], item["segment_ids"][1:] == item["segment_ids"][:-1]
        assert item["n_bytes"] == (targets[same] >= 2).sum()


def test_the_last_window_is_padded_so_that_padding_predicts_nothing(folders):
    ds = TextDataset(folders[0]["bytes"], "train", 100)
    item = ds[-1]
    rest = (ds.n_tokens - 1) % 99 + 1
    assert (item["input_ids"][rest:] == 0).all() and (item["input_ids"][:rest] > 0).all()
    assert item["segment_ids"][rest:].tolist() == [-1 - n for n in range(100 - rest)]
    with pytest.raises(IndexError):
        ds[len(ds)]
    with pytest.raises(ValueError, match="sequence_length=1 must be at least 2"):
        TextDataset(folders[0]["bytes"], "train", 1)


def test_batches_are_stacked_and_workers_open_the_files_themselves(folders):
    ds = TextDataset(folders[0]["other"], "train", 16)
    expected = collate_stack([ds[0], ds[1]])
    assert expected["input_ids"].shape == (2, 16) and expected["n_bytes"].shape == (2,)
    assert len(pickle.dumps(ds)) < 5000
    for other in (pickle.loads(pickle.dumps(ds)), copy.deepcopy(ds)):
        assert torch.equal(other[1]["input_ids"], ds[1]["input_ids"])
    (batch, *_) = DataLoader(ds, batch_size=2, num_workers=1, collate_fn=collate_stack)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_entries_are_named(folders):
    ds = TextDataset(folders[0]["bytes"], "train", 16)
    assert len(ds.entries) == len(ds) and ds.entries[3] == {"key": "train-00000003"}
    assert [entry["key"] for entry in ds.entries[1:3]] == ["train-00000001", "train-00000002"]


def test_prompts_are_beginnings_of_documents(folders):
    ds = TextDataset(folders[0]["bytes"], "train", 16)
    starts = [bytes(text, "utf-8") for text in folders[1]]
    prompts = ds.prompts(3, 10)
    assert [bytes((prompt[1:] - 2).tolist()) for prompt in prompts] == [starts[n][:9] for n in (2, 3, 4)]
    assert all(prompt.dtype == torch.int64 and prompt[0] == 1 for prompt in prompts)
    assert [len(prompt) for prompt in ds.prompts(9, 10)] == [2, 8, 10, 10, 10]  # Short ones where there are no others.
    with pytest.raises(ValueError, match="length=0"):
        ds.prompts(1, 0)


def test_expectations_are_compared(folders):
    ds = TextDataset(folders[0]["bpe"], "train", 16)
    assert ds.expect(tokenizer="bpe", seed=42) is ds
    with pytest.raises(ValueError, match="seed=42, but seed=1 is needed"):
        ds.expect(seed=1)


def test_bits_per_byte_of_uniform_bytes():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
