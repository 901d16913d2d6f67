"""Texts as phones or characters: words, stress, pauses, numbers, other languages, what is refused."""

# ruff: noqa: RUF001 (letters of other alphabets and of phonetics)
import json

import pytest

from dataset_loading.embedded.speech import load_speaker
from model.text.phonemes import PADDING, PAUSES, SpeechTokenizer, nearest_symbol, split_clauses

TEXTS = ["Please enter your agent number, followed by the pound key.", "hello world"]


def symbols_of(text, **fields):
    return " ".join(symbol for symbol, _, _ in SpeechTokenizer((PADDING, *PAUSES), **fields).split(text))


def test_phones_have_stress_and_edges_and_pauses_lie_between_words_and_clauses():
    tokens = SpeechTokenizer((PADDING, *PAUSES)).split("Hello, a world!")
    assert tokens == [
        ("#", 0, 0),
        *(("h", 0, 1), ("ə", 0, 0), ("l", 0, 0), ("oʊ", 2, 2)),
        ("_", 0, 0),
        ("ɐ", 0, 3),
        ("-", 0, 0),
        *(("w", 0, 1), ("ɜː", 2, 0), ("l", 0, 0), ("d", 0, 2)),
        ("#", 0, 0),
    ]
    assert "-" not in symbols_of("a world", gaps=False)


def test_speaking_in_between_changes_no_phones():
    german = symbols_of("Guten Tag", language="de")
    before = symbols_of(TEXTS[0])
    load_speaker().speak("hello", "en-us+f3", rate=150, pitch=50)
    assert symbols_of(TEXTS[0]) == before and symbols_of("Guten Tag", language="de") == german


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("press 1", "press one"),
        ("Dr. Smith lives", "doctor Smith lives"),
        ("I paid $3.50", "I paid three dollars fifty"),
        ("a\x00b", "a b"),
        ("so — now", "so, now"),
        ("yes\nno", "yes, no"),
    ],
)
def test_numbers_abbreviations_and_control_characters_are_read(text, same):
    def phones(text):
        return [symbol for symbol in symbols_of(text).split() if symbol != "-"]

    if "$" in text:  # Worded by eSpeak NG in its own way.
        assert len(phones(text)) > 10 and {"d", "θ"} <= set(phones(text))
    else:
        assert phones(text) == phones(same)


def test_clauses_end_at_marks_before_spaces_but_not_after_abbreviations():
    text = 'At 10:30 Dr. J. Doe, e.g. me, said: "3.14!" Then… no - yes. U.S.A. is'
    assert [clause.split()[-1] for clause in split_clauses(text)] == [
        "Doe,",
        "me,",
        "said:",
        '"3.14!"',
        "Then…",
        *("-", "yes.", "is"),
    ]
    assert split_clauses("你好世界，今天。") == ["你好世界，", "今天。"]


def test_the_table_survives_json_and_encodes_the_same():
    tokenizer = SpeechTokenizer.fit(TEXTS)
    again = SpeechTokenizer.from_dict(json.loads(json.dumps(tokenizer.as_dict())))
    assert again == tokenizer and tokenizer.symbols[:4] == ("", "#", "_", "-") and tokenizer.pauses == [1, 2, 3]
    tokens = tokenizer.encode(TEXTS[0])
    assert tokens.shape[1] == 3 and tokens.tolist() == again.encode(TEXTS[0]).tolist()
    assert [tokenizer.symbols[number] for number in tokens[:, 0]] == symbols_of(TEXTS[0]).split()


def test_unknown_symbols_are_named_or_replaced_by_the_nearest():
    tokenizer = SpeechTokenizer.fit(TEXTS)
    with pytest.raises(ValueError, match=r"'the shoe'.* ʃ uː"):
        tokenizer.encode("the shoe")
    assert tokenizer.unknown("the shoe") == ["ʃ", "uː"]
    names = [tokenizer.symbols[number] for number in tokenizer.encode("shoe", nearest=True)[:, 0]]
    assert names[0] == names[-1] == "#" and names[1] == "z"
    known = ["iː", "ə", "s", "ɹ", "ɔ", "t", "uː"]
    pairs = {"i": "iː", "ɔ̃": "ɔ", "ʁ": "ɹ", "z": "s", "d": "t", "u": "uː"}
    assert {symbol: nearest_symbol(symbol, known) for symbol in pairs} == pairs


@pytest.mark.parametrize("text", ["", "  ", "...", "\n"])
@pytest.mark.parametrize("units", ["phonemes", "characters"])
def test_texts_with_nothing_to_say_are_refused(text, units):
    with pytest.raises(ValueError, match="nothing to say"):
        SpeechTokenizer.fit(TEXTS, units=units).encode(text)


def test_emoji_are_read_as_words_or_left_out():
    assert symbols_of("I 😀").startswith("# aɪ - ɡ ɹ ɪ n ɪ ŋ")
    assert symbols_of("I 😀 you", units="characters") == "# i - y o u #"


def test_characters_are_lower_case_words_with_digits_and_apostrophes():
    assert symbols_of("It's 42, NAÏVE!", units="characters") == "# i t ' s - 4 2 _ n a ï v e #"


def test_other_languages_and_unknown_ones():
    assert "ʁ" in symbols_of("Bonjour", language="fr-fr") and "ɔ̃" in symbols_of("bon", language="fr")
    assert "(" not in symbols_of("un weekend à New York", language="fr-fr")
    with pytest.raises(ValueError, match=r"language 'fr-ffr'.*did you mean 'fr-fr'"):
        SpeechTokenizer.fit(TEXTS, language="fr-ffr")
    with pytest.raises(ValueError, match="must begin with"):
        SpeechTokenizer(("a", "b"))


def test_several_languages_share_a_table():
    texts, languages = ["Guten Tag", "hello world"], ["de", "en-us"]
    tokenizer = SpeechTokenizer.fit(texts, languages, language="en-us", languages=tuple(languages))
    alone = [SpeechTokenizer.fit([text], language=language) for text, language in zip(texts, languages)]
    assert set(tokenizer.symbols) == set(alone[0].symbols) | set(alone[1].symbols)
    assert SpeechTokenizer.from_dict(json.loads(json.dumps(tokenizer.as_dict()))) == tokenizer
    assert tokenizer.split("Tag", "de") == alone[0].split("Tag") != tokenizer.split("Tag")
    with pytest.raises(ValueError, match=r"language 'fr' is unknown; known: de, en-us"):
        tokenizer.encode("Tag", "fr")
    with pytest.raises(ValueError, match="language='en-us' must be one of"):
        SpeechTokenizer((PADDING, *PAUSES), languages=("de", "fr"))
    # Tables of one language are described as they always were.
    assert "languages" not in alone[0].as_dict() and alone[0].known_languages == ("de",)
