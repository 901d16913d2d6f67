"""Damaged folders of prepared text: every error names the file, what is wrong, and what to do."""

import json
import shutil

import pytest

from dataset_loading.text.windows import TextDataset
from tests.helpers.text_cache import make_text


@pytest.fixture
def folder(text_cache, tmp_path):
    """A copy of a prepared text."""
    return shutil.copytree(text_cache, tmp_path / "text")


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("texts") / "text", tokenizer="bpe", vocab_size=300)


@pytest.mark.parametrize("name", ["train.bin", "train.offsets.npy", "tokenizer/tokenizer.json"])
def test_a_flipped_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged \(its CRC-32 is .*delete {folder} and prepare it again"):
        _ = TextDataset(folder, "train", 16).tokenizer


def without(name):
    return lambda manifest: {key: value for key, value in manifest.items() if key != name}


def changed(place, **values):
    return lambda manifest: {**manifest, place: {**manifest[place], **values}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((without(name), f"lacks '{name}'") for name in ("tokenizer", "totals", "settings", "fingerprint")),
        (changed("tokenizer", vocab_size="300"), "tokenizer.vocab_size='300' must be int"),
        (changed("tokenizer", dtype="float32"), "tokenizer.dtype='float32' must be"),
        (changed("totals", train=[]), r"totals.train=\[\] must be"),
        (changed("totals", train={}), "totals.train lacks 'documents'"),
    ],
)
def test_a_damaged_manifest_is_named(folder, change, reason):
    file = folder / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(.*{reason}.*delete the folder"):
        TextDataset(folder, "train", 16)


def test_a_changed_number_in_a_manifest_is_found(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"n_empty": 0', '"n_empty": 1'))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(its SHA-256 is .*delete the folder"):
        TextDataset(folder, "train", 16)


def test_a_tokenizer_that_cannot_be_read_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["tokenizer"]["crc32"]  # As earlier versions wrote it.
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=f"{folder}/tokenizer"):
        _ = TextDataset(folder, "train", 16).tokenizer


def test_a_tokenizer_that_is_gone_is_named(folder):
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=rf"tokenizer/tokenizer\.json is missing; delete {folder}"):
        _ = TextDataset(folder, "train", 16).tokenizer
