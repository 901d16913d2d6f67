"""Words of texts and of speech."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset_loading.audio.signal import resample
from tests.helpers.spoken import RATE, SENTENCE, speak_first
from utils.metrics.words import (
    Recognizer,
    bootstrap_interval,
    normalize_text,
    text_errors,
    word_error_rate,
)

# ---- Words.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Press 1, then forty-two!", "press one then 42"),
        ("It's 3.05%; don\u2019t re-dial", "it is 3.05% do not re dial"),
        ("Room 1,234 & caf\u00e9_12", "room 1234 cafe 12"),
        ("Uh, the colour [noise] of Mr. Smith...", "the color of mister smith"),
        ("...", ""),
    ],
)
def test_texts_are_normalised(text, words):
    assert normalize_text(text) == words.split()


def test_word_error_rate_by_hand():
    assert text_errors("a x c", "a b c d").words == 2  # one substitution, one deletion
    assert text_errors("", "a b").words == 2 and text_errors("a b", "").words == 2
    assert word_error_rate(["press one", "hello, there you"], ["Press 1 now.", "hello there"]) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="0 transcripts and 1 target"):
        word_error_rate([], ["a"])
    with pytest.raises(ValueError, match="no words"):
        word_error_rate(["a"], ["..."])


@given(st.lists(st.sampled_from("abc"), max_size=4), st.lists(st.sampled_from("abc"), max_size=4))
def test_word_errors_equal_the_recursion(a, b):
    def slow(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert text_errors(" ".join(a), " ".join(b)).words == slow(len(a), len(b))


def test_a_spoken_sentence_is_recognised(speech):
    # Whisper hears "save" for "say": 1 of 11 words, 2 with another processor's rounding.
    recognizer = Recognizer()
    assert word_error_rate([recognizer.transcribe(speech, RATE)], [SENTENCE]) <= 0.2
    high = resample(speech, RATE, 22050)
    assert word_error_rate([recognizer.transcribe(high, 22050)], [SENTENCE]) <= 0.2


def test_a_process_that_speaks_first_says_the_same(speech):
    assert torch.equal(speech, speak_first())


def test_errors_count_words_and_characters():
    errors = text_errors("Press 1 know!", "press one, now")
    assert (errors.words, errors.n_words, errors.characters, errors.n_characters) == (1, 3, 1, 13)


def test_the_bootstrap_interval_equals_a_slow_one():
    errors, totals = [0, 3, 1, 0, 2], [5, 4, 6, 9, 5]
    random, rates = np.random.default_rng(7), []
    for counts in random.multinomial(5, [0.2] * 5, size=200):
        clips = [clip for clip, count in enumerate(counts) for _ in range(count)]
        rates.append(sum(errors[clip] for clip in clips) / sum(totals[clip] for clip in clips))
    rates.sort()
    low, high = bootstrap_interval(errors, totals, seed=7, n_resamples=200, level=0.9)
    assert rates[9] <= low <= rates[10] and rates[189] <= high <= rates[190]
    assert low < sum(errors) / sum(totals) < high
    assert bootstrap_interval([0, 0], [3, 4], seed=0) == (0, 0)
    with pytest.raises(ValueError, match=r"errors \(2\) .*totals \(1\)"):
        bootstrap_interval([1, 2], [3], seed=0)
