"""The sentences of evaluations: their form, that no training set of ours has them, and the phones that they hold."""

# ruff: noqa: RUF001 (letters of phonetics)
import re

from dataset_loading.embedded.scenes import list_scenes
from dataset_loading.embedded.sentences import SENTENCES
from model.text.phonemes import SpeechTokenizer

# Phones of English as eSpeak NG writes those of en-us.
PHONES = """
    p b t d k ɡ tʃ dʒ f v θ ð s z ʃ ʒ h m n ŋ l ɹ w j ɾ
    iː ɪ ɛ æ ʌ ə ɑː ɔː ʊ uː ɜː ɚ aɪ eɪ ɔɪ aʊ oʊ""".split()  # noqa: SIM905


def test_sentences_are_unique_and_of_5_to_12_words():
    assert len(SENTENCES) == 50
    assert len({re.sub(r"\W+", " ", sentence.lower()) for sentence in SENTENCES}) == 50
    assert all(5 <= len(sentence.split()) <= 12 for sentence in SENTENCES)


def test_no_sentence_is_in_embedded_speech():
    captions = {scene.caption.lower().rstrip(".") for scene in list_scenes()}
    assert not captions & {sentence.lower().rstrip(".?!") for sentence in SENTENCES}


def test_the_sentences_have_the_phones_of_english():
    tokenizer = SpeechTokenizer.fit(SENTENCES)
    assert not set(PHONES) - set(tokenizer.symbols)
