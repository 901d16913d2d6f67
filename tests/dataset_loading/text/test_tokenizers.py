import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset_loading.text.tokenizers import (
    PARALLEL,
    byte_lengths,
    byte_tokenizer,
    document_encoder,
    document_ends,
    encode_texts,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from model.text.tokenizer import encode_caption

CORPUS = ["the cat sat on the mat, the cat ate the rat. " * 5, "naïve café, 東京 and 😀😀 — <eos>\r\n\tend  \n" * 5]
ODD = [
    "plain",
    " leading, trailing \n\n",
    "CR LF\r\nand\rCR\n",
    "NUL \0 and \x1b, \x7f",
    "emoji 👩‍👩‍👧 🇪🇺 é",
    "decomposed e\u0301 and composed é",
    "<bos><eos><pad>",
    "\u2028\u2029\ufeff\u200d\uffff",
    "".join(map(chr, range(256))),
    "\U0001d518\U0001d52b 東京 עברית 한국어",
    "don't it's WE'LL 123456   x",
]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return byte_tokenizer() if request.param == "bytes" else train_bpe(CORPUS, 300)


@pytest.mark.parametrize("text", ODD)
def test_every_text_comes_back(tokenizer, text, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one(text, add_special_tokens=False)["input_ids"]
        assert not set(ids) & set(one.all_special_ids)
        assert one.decode(ids) == text
        assert one(text)["input_ids"] == [one.bos_token_id, *ids]


def test_bytes_have_the_ids_of_captions():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, [*range(256), 0x6771, 0x1F600]))
    assert tokenizer("é東")["input_ids"] == encode_caption("é東", 100)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [byte + 2 for byte in text.encode()]
    assert (vocabulary_size(tokenizer), document_ends(tokenizer), tokenizer.pad_token_id) == (258, (1, 1), 0)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises((TypeError, ValueError)):
        tokenizer("\ud800")


def test_pairs_are_merged_and_special_tokens_are_first():
    tokenizer = train_bpe(CORPUS, 300)
    assert vocabulary_size(tokenizer) == len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]
    assert document_ends(tokenizer) == (1, 2)
    assert len(tokenizer(" the", add_special_tokens=False)["input_ids"]) == 1


def test_too_small_vocabularies_are_refused():
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        train_bpe(CORPUS, 258)


def test_equal_texts_give_equal_tokenizers():
    first, again, other = (tokenizer_hash(train_bpe(CORPUS, size)) for size in (300, 300, 299))
    assert first == again != other


@pytest.mark.slow
def test_training_is_the_same_in_every_process():
    code = f"""
from dataset_loading.text.tokenizers import tokenizer_hash, train_bpe
print(tokenizer_hash(train_bpe({CORPUS!r}, 300)))"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", PARALLEL: "true", "RAYON_NUM_THREADS": "3"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == tokenizer_hash(train_bpe(CORPUS, 300))


def test_bytes_of_ids_add_up_to_the_text(tokenizer):
    lengths = byte_lengths(tokenizer)
    for text, (ids, widths) in zip(ODD, encode_texts(document_encoder(tokenizer), ODD, lengths)):
        assert tokenizer.decode(ids) == text
        assert widths.sum() == len(text.encode())
        assert [len(tokenizer.convert_ids_to_tokens(int(number))) for number in ids] == widths.tolist()


def test_offsets_tell_the_bytes_of_any_other_tokenizer(tokenizer):
    core = document_encoder(tokenizer)
    for text, (ids, widths) in zip(ODD, encode_texts(core, ODD, None)):
        by_id = byte_lengths(tokenizer)[ids]
        assert widths.sum() == by_id.sum() == len(text.encode())
        ends, exact = np.cumsum(widths), np.cumsum(by_id)
        assert (ends >= exact).all() and (ends - exact < 4).all()  # Apart only within characters of several tokens.


def words_tokenizer(**tokens):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "disc": 2, "[E]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **tokens)


def test_documents_are_neither_cut_nor_padded_nor_ended_by_what_they_spell():
    tokenizer = words_tokenizer(eos_token="[E]")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    ((ids, widths),) = encode_texts(document_encoder(tokenizer), ["Red disc é red [E] "], None)
    assert ids.tolist() == [1, 2, 0, 1, 0, 0, 0]
    assert widths.tolist() == [3, 5, 3, 4, 2, 1, 1]  # The last blank belongs to no token.
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2  # The tokenizer itself is as it was.


@pytest.mark.parametrize(
    ("tokens", "ends"), [({"bos_token": "red"}, (1, 1)), ({"eos_token": "[E]"}, (3, 3))], ids=["begin", "end"]
)
def test_one_special_token_serves_both_ends(tokens, ends):
    assert document_ends(words_tokenizer(**tokens)) == ends


def test_tokenizers_are_loaded_by_folder(tmp_path):
    words_tokenizer(eos_token="[E]").save_pretrained(tmp_path / "good")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "good"))) == tokenizer_hash(words_tokenizer(eos_token="[E]"))
    words_tokenizer().save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="neither eos_token nor bos_token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_missing_and_slow_tokenizers_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer='.*nowhere' is neither 'bytes' nor 'bpe'"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(ValueError, match="ByT5Tokenizer, not a fast tokenizer"):
        load_tokenizer(str(tmp_path / "slow"))


def test_later_forks_find_no_threads(monkeypatch):
    monkeypatch.delenv(PARALLEL, raising=False)
    train_bpe(CORPUS, 260)
    assert os.environ[PARALLEL] == "off"
    monkeypatch.setenv(PARALLEL, "false")
    train_bpe(CORPUS, 260)
    assert os.environ[PARALLEL] == "false"


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "spm.model").write_bytes(b"\x0a\x0e")
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    for name, message in (
        ("spm.model", r"is no tokenizer\.json; give that file, or its folder"),
        ("nowhere/tokenizer.json", "does not exist"),
        ("run", r"has no tokenizer\.json; name a checkpoint, such as .*checkpoint-2"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_tokenizer(str(tmp_path / name))
