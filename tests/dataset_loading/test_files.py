import errno
import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dataset_loading.audio.conditions import DescribedAudioDataset
from dataset_loading.cache_writer import Journal, sample_key
from dataset_loading.files import (
    fingerprint,
    fingerprint_of_bytes,
    read_manifest,
    remove_leftovers,
    replace_file,
    replacing,
)
from dataset_loading.sources import Source
from dataset_loading.text.digests import Digests
from dataset_loading.text.sources import open_text
from dataset_loading.text.tokenizers import byte_tokenizer, document_encoder, document_ends, tokenizer_hash
from dataset_loading.text.windows import prepare_text
from model.text.feature_extractors import FrozenTextEncoder
from preprocess_image_vae_dataset import ImageVAEPreprocess
from tests.helpers.mel_cache import SETTINGS, write_mel_cache
from tests.helpers.text_encoder_folder import save_text_encoder
from utils.checkpoints import mark_complete
from utils.command_line import parse_arguments
from utils.generation.latents import vae_fingerprint
from utils.generation.text_encoder import text_encoder_fingerprint

# ---- Atomic writes.


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with replacing(tmp_path / "a.json", sync=True) as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.json").read_text() == "old" and temporary.parent == tmp_path
    assert (tmp_path / "a.json").read_text() == "new" and names(tmp_path) == ["a.json"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    replace_file(tmp_path / "a", b"old")
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "set") as temporary:
        (temporary / "train").mkdir(parents=True)
        raise ValueError("stop")
    assert names(tmp_path) == []
    with replacing(tmp_path / "set") as temporary:
        (temporary / "train").mkdir(parents=True)
    assert names(tmp_path) == ["set"] and names(tmp_path / "set") == ["train"]


def test_errors_name_the_final_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(tmp_path / "gone" / "a", b"")
    assert caught.value.filename == str(tmp_path / "gone" / "a")
    with pytest.raises(OSError, match="No space") as caught, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "source").read_bytes()  # What the block reads keeps its own name.
    assert caught.value.filename == str(tmp_path / "source")
    with pytest.raises(OSError, match=r"^no voices$"), replacing(tmp_path / "a"):
        raise OSError("no voices")


def test_a_file_in_place_of_a_cache_is_said_to_be_one(tmp_path):
    (tmp_path / "file").touch()
    for name, state in (("file", "is a file"), ("gone", "does not exist")):
        with pytest.raises(FileNotFoundError, match=f"{name} {state}; make it with"):
            read_manifest(tmp_path / name, "image_vae")


def test_only_leftovers_of_the_same_name_are_removed(tmp_path):
    for name in (".set.12.tmp", ".set.b.12.tmp", ".set.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".set.13.tmp").touch()
    remove_leftovers(tmp_path / "set")
    assert names(tmp_path) == [".set.b.12.tmp", ".set.tmp"]


# ---- Fingerprints: caches and checkpoints of earlier versions hold these values, so none may change.


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_fingerprints_are_truncated_sha256_of_canonical_json():
    assert fingerprint({"b": [1, None], "a": "ä"}) == sha256(b'{"a": "\\u00e4", "b": [1, null]}')[:16]
    assert fingerprint(["run", "data", ["--flag"]], n_digits=8) == sha256(b'["run", "data", ["--flag"]]')[:8]
    assert fingerprint_of_bytes([b"ab", b"c"], n_digits=64) == sha256(b"abc")


def test_fingerprint_of_preprocessed_images():
    args = parse_arguments(ImageVAEPreprocess.arguments_class, ["--dataset_name", "images", "--image_size", "32"], "")
    header = ImageVAEPreprocess(args).header({"train": Source("images:train", "", "image", [], [])})
    assert header["fingerprint"] == "d40384f86d72b705"


def test_keys_of_samples():
    assert sample_key("cats/tom cat.png", 0, 0) == "cats_tom_cat-b4cc6c37f0b4"
    assert sample_key("ä.wav", 1, 2) == "sample-a6305323454d-copy2"


def test_fingerprint_of_speakers_and_transcripts(tmp_path):
    cache = write_mel_cache(tmp_path / "cache", SETTINGS, n_clips=10)
    dataset = DescribedAudioDataset(cache, "train", ["high", "low"], use_tokens=True)
    assert dataset.fingerprint == "16-10+88223bdbd7ef2742"


def test_hashes_of_texts(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(f"text of {name}\n".encode())
    assert Digests().of([tmp_path / "a.txt"]) == [sha256(b"text of a.txt\n")]
    assert open_text(str(tmp_path)).identity == f"{tmp_path.name}@89208280bfa14aab"


def test_fingerprint_of_prepared_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    folder = prepare_text(str(tmp_path / "a.txt"), tmp_path / "set", "bytes", validation_fraction=0.0)
    manifest, tokenizer = json.loads((folder / "manifest.json").read_text()), byte_tokenizer()
    shape = f"{document_encoder(tokenizer).to_str()} {tuple(document_ends(tokenizer))}"
    assert manifest["tokenizer"]["hash"] == tokenizer_hash(tokenizer) == sha256(shape.encode())[:16]
    identity = {"schema": 1, "stage": "text", **manifest["settings"], "hash": tokenizer_hash(tokenizer)}
    assert manifest["fingerprint"] == sha256(json.dumps(identity, sort_keys=True).encode())[:16]


def test_fingerprint_of_a_vae(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "config.json").write_text('{"width": 8, "blocks": [1, 2], "transformers_version": "4"}')
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors", {"format": "pt"})
    mark_complete(folder)
    assert vae_fingerprint(folder) == "37ba147979ee9488"


def test_fingerprint_of_a_text_encoder(tmp_path):
    encoder = FrozenTextEncoder(str(save_text_encoder(tmp_path / "encoder")))
    content = repr(sorted(encoder.tokenizer.get_vocab().items())).encode()
    for name, tensor in sorted(encoder.model.state_dict().items()):
        content += name.encode() + np.asarray(tensor).tobytes()
    assert text_encoder_fingerprint(encoder) == sha256(content)[:16]


def test_a_full_disk_names_the_journal(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), Journal(tmp_path, {}) as journal:
        journal.file.close()
        journal.file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
        journal.add("train", [{"key": "a"}])
