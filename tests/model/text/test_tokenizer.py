import pytest
import torch

from model.text.tokenizer import BEGIN_OF_TEXT, VOCABULARY, encode_caption, pad_tokens
from tests.helpers.text_encoder_folder import text_of


def test_tokens_are_bytes_behind_the_begin_of_text():
    assert encode_caption("a cat", 32) == [1, ord("a") + 2, ord(" ") + 2, ord("c") + 2, ord("a") + 2, ord("t") + 2]
    assert max(encode_caption("".join(map(chr, range(1, 0x800))), 10_000)) < VOCABULARY


@pytest.mark.parametrize("text", ["", "red apple", "Äpfel, grün", "りんご 🍎", "a\x00b"])
def test_captions_round_trip(text):
    assert text_of(encode_caption(text, 64)) == text


def test_an_empty_caption_has_a_token():
    assert encode_caption("", 8) == encode_caption("anything", 1) == [BEGIN_OF_TEXT]


def test_equal_looking_texts_have_equal_tokens():
    assert encode_caption("a\u0308", 16) == encode_caption("\u00e4", 16)


@pytest.mark.parametrize("max_tokens", range(1, 14))
def test_long_captions_are_cut_between_characters(max_tokens):
    text = "aé€🍎b"  # 1, 2, 3, 4 and 1 bytes
    ids = encode_caption(text, max_tokens)
    kept = text_of(ids)
    assert text.startswith(kept) and len(ids) <= max_tokens
    longer = text[: len(kept) + 1].encode()
    assert kept == text or 1 + len(longer) > max_tokens  # one character more would not have fitted


def test_padding_is_on_the_right_and_masked():
    tokens, mask = pad_tokens([[1, 5, 6], torch.tensor([1, 7])], multiple=8)
    assert tokens.tolist() == [[1, 5, 6, 0, 0, 0, 0, 0], [1, 7, 0, 0, 0, 0, 0, 0]]
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [3, 2] and torch.equal(mask, tokens != 0)


@pytest.mark.parametrize("longest, padded", [(7, 8), (8, 8), (9, 16)])
def test_length_is_the_next_multiple(longest, padded):
    assert pad_tokens([[1] * longest, [1]])[0].shape == (2, padded)


def test_padding_is_left_out_of_the_text():
    tokens, _ = pad_tokens([encode_caption("dog", 16)])
    assert text_of(tokens[0].tolist()) == "dog"


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        encode_caption("cat", 0)
    with pytest.raises(ValueError, match="2 captions, one of them without tokens"):
        pad_tokens([[1], []])
    with pytest.raises(ValueError, match="0 captions"):
        pad_tokens([])
