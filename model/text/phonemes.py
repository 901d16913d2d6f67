"""Text as the units that speech is made of: phones of eSpeak NG, or characters.  T tokens.

A token is (symbol, stress, edge): the number of its symbol in the table; 2 for primary, 1 for secondary, 0 for no
stress; 1 at the start of a word, 2 at its end, 3 at both, 0 inside. Besides phones there are three kinds of pauses,
all of which may last 0 frames: `#` at both ends of a text, `_` at the marks between clauses, `-` between words.
"""

# ruff: noqa: RUF001 (letters of other alphabets and of phonetics)
import dataclasses
import difflib
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from model.text.espeak import check_language, phonemise
from utils.flags.choices import Units
from utils.options import suggest

Token = tuple[str, int, int]  # symbol, stress, edge

PADDING = ""  # symbol 0
ENDS, CLAUSE, GAP = "#", "_", "-"
PAUSES = (ENDS, CLAUSE, GAP)  # symbols 1 to 3
START, END = 1, 2  # edges
STRESS = {"ˈ": 2, "ˌ": 1}
# Marks of syllabicity, ties and liaison tell nothing that a model needs; others, such as nasal tildes, are kept.
DROPPED = dict.fromkeys(map(ord, "\u0329\u030d\u0361\u035c-_#"))

# Marks that end a clause before a space, those that do so everywhere, and words whose full stop ends none.
CLAUSE_END = re.compile(r"[.,;:!?…]+[\"'”’»)\]]*(?=\s|$)|\s[-–—]+(?=\s)|[—。，、；：！？।،؛؟\n]")
ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "no", "vol", "etc", "eg", "ie")
    + ("approx", "dept", "est", "inc", "ltd", "co")
)
# Phones that sound alike stand in one group, in the order of likeness: the nearest known one replaces an unknown one.
GROUPS = (
    *("iɪɨᵻyʏ", "eɛøœæ", "əɐɜɚɝʌ", "aäɑɒæ", "oɔɒ", "uʊɯɵ", "wʋvβf", "pbɓ", "tdɾʈɖɗ", "kɡgqɢ", "θðsz", "szʃʒʂʐɕʑ"),
    *("xχɣhɦħç", "mɱ", "nɲɳŋ", "lɫɬʎɭ", "ɾrʀʁɹɻ", "jʝɥi"),
)


@dataclasses.dataclass(frozen=True)
class SpeechTokenizer:
    """Texts to tokens, with a table of symbols that caches and checkpoints keep.

    Args:
        symbols: all symbols; their places are their numbers. The first is padding, then the pauses.
        units: phones of eSpeak NG, or characters (in lower case, without eSpeak NG; they know no pronunciation).
        language: for eSpeak NG, such as `en-us`; of texts whose language is not named.
        gaps: whether there is a token `-` between words.
        languages: all languages where there are several, `language` among them. They share the table: a phone of two
            languages has one symbol, as in the International Phonetic Alphabet.
    Raises: ValueError: an unknown language, or symbols that do not begin with padding and pauses or repeat.
    """

    symbols: tuple[str, ...]
    units: Units = "phonemes"
    language: str = "en-us"
    gaps: bool = True
    languages: tuple[str, ...] = ()

    def __post_init__(self):
        for language in self.known_languages if self.units == "phonemes" else ():
            check_language(language)
        if self.languages and self.language not in self.languages:
            raise ValueError(f"language={self.language!r} must be one of languages={list(self.languages)}")
        if self.symbols[:4] != (PADDING, *PAUSES) or len(set(self.symbols)) < len(self.symbols):
            raise ValueError(f"symbols={list(self.symbols)} must begin with {[PADDING, *PAUSES]} and repeat none")

    @classmethod
    def fit(cls, texts: Iterable[str], text_languages: Iterable[str] | None = None, **fields: Any) -> Self:
        """A tokenizer whose table has all symbols of some texts; those without anything to say add none.

        Args:
            text_languages: that of each text; None: `language`.
            fields: `units`, `language`, `gaps`, `languages`.
        """
        empty = cls((PADDING, *PAUSES), **fields)
        pairs = zip(texts, itertools.repeat("") if text_languages is None else text_languages)
        symbols = {symbol for text, language in pairs for symbol, _, _ in empty.split(text, language)}
        return cls((*empty.symbols, *sorted(symbols - set(empty.symbols))), **fields)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The tokenizer that `as_dict` described."""
        lists = {name: tuple(values[name]) for name in ("symbols", "languages") if name in values}
        return cls(**{**values, **lists})

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON values; `languages` where there are several."""
        several = {"languages": list(self.languages)} if self.languages else {}
        fields = {name: getattr(self, name) for name in ("units", "language", "gaps")}
        return {"symbols": list(self.symbols), **fields, **several}

    @property
    def known_languages(self) -> tuple[str, ...]:
        """All languages that texts may have."""
        return self.languages or (self.language,)

    def language_of(self, name: str) -> str:
        """The language of a name, `language` for "". Raises: ValueError: none of the known ones."""
        if name and name not in self.known_languages:
            raise ValueError(f"language {name!r} is unknown{suggest(name, self.known_languages)}")
        return name or self.language

    @property
    def pauses(self) -> list[int]:
        """Numbers of the symbols that may last 0 frames."""
        return [self.symbols.index(symbol) for symbol in PAUSES]

    def split(self, text: str, language: str = "") -> list[Token]:
        """The tokens of a text with their symbols as strings; [] where there is nothing to say.

        Args: language: one of the known ones; "": `language`.
        """
        phones = functools.partial(self.phones, language=self.language_of(language))
        split_words = characters if self.units == "characters" else phones
        clauses = [tokens for clause in split_clauses(text) if (tokens := self.join_words(split_words(clause)))]
        if not clauses:
            return []
        # Pauses between clauses, then the ends.
        joined = [token for clause in clauses for token in [*clause, (CLAUSE, 0, 0)]][:-1]
        return [(ENDS, 0, 0), *joined, (ENDS, 0, 0)]

    def phones(self, clause: str, language: str) -> list[list[tuple[str, int]]]:
        """Phones of each word with their stress."""
        words = ([split_stress(phone) for phone in word] for word in phonemise(clause, language))
        return [[phone for phone in word if phone[0]] for word in words if any(symbol for symbol, _ in word)]

    def join_words(self, words: list[list[tuple[str, int]]]) -> list[Token]:
        """The tokens of one clause: (symbol, stress) of each word, with edges and gaps."""
        gap = [(GAP, 0, 0)] if self.gaps else []
        tokens: list[Token] = []
        for word in words:
            edges = [START * (i == 0) + END * (i == len(word) - 1) for i in range(len(word))]
            tokens += [*(gap if tokens else []), *((*unit, edge) for unit, edge in zip(word, edges))]
        return tokens

    def unknown(self, text: str, language: str = "") -> list[str]:
        """Symbols of a text that are not in the table, in their order."""
        return list(dict.fromkeys(symbol for symbol, _, _ in self.split(text, language) if symbol not in self.symbols))

    def encode(self, text: str, language: str = "", *, nearest: bool = False) -> Tensor:
        """Tokens (T, 3) int16 of a text.

        Args:
            language: see `split`.
            nearest: replace unknown symbols by known ones that sound, or for characters look, most alike.
        Raises: ValueError: nothing to say in the text, or unknown symbols (named) without `nearest`.
        """
        tokens = self.split(text, language)
        if not tokens:
            raise ValueError(f"the text {text!r} has nothing to say: no letter or number of {self.units}")
        unknown = list(dict.fromkeys(symbol for symbol, _, _ in tokens if symbol not in self.symbols))
        if unknown and not nearest:
            raise ValueError(
                f"the text {text!r} has {self.units} that the training data do not have: {' '.join(unknown)}; write "
                "it another way, or let the nearest known ones replace them"
            )
        known = self.symbols[1 + len(PAUSES) :]
        if unknown and not known:
            raise ValueError(f"the text {text!r} cannot be encoded: the table of symbols is empty")
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        numbers |= {symbol: numbers[nearest_symbol(symbol, known)] for symbol in unknown}
        rows = [(numbers[symbol], stress, edge) for symbol, stress, edge in tokens]
        return torch.tensor(rows, dtype=torch.int16)


def split_clauses(text: str) -> list[str]:
    """The clauses of a text, with their marks; a full stop after an abbreviation or an initial ends none."""
    clauses, start = [], 0
    for match in CLAUSE_END.finditer(text):
        words = text[start : match.start()].split()
        word = words[-1].strip("\"'“‘«([").lower() if words else ""
        is_short = (len(word) == 1 and word.isalpha()) or "." in word or word in ABBREVIATIONS
        if match.group().startswith(".") and match.end() < len(text) and is_short:
            continue
        clauses.append(text[start : match.end()])
        start = match.end()
    return [clause.strip() for clause in (*clauses, text[start:]) if clause.strip()]


def split_stress(phone: str) -> tuple[str, int]:
    """A phone without stress marks and the marks that are dropped, and its stress."""
    stress = max((STRESS.get(character, 0) for character in phone), default=0)
    symbol = unicodedata.normalize("NFD", phone.strip("ˈˌ")).translate(DROPPED)
    return unicodedata.normalize("NFC", symbol), stress


def characters(clause: str) -> list[list[tuple[str, int]]]:
    """Letters with their marks, digits and apostrophes of each word, in lower case."""
    text = unicodedata.normalize("NFC", clause).casefold().replace("’", "'")
    runs = itertools.groupby(text, lambda character: unicodedata.category(character)[0] in "LMN" or character == "'")
    words = ["".join(run).strip("'") for is_word, run in runs if is_word]
    return [[(character, 0) for character in word] for word in words if word]


def nearest_symbol(symbol: str, known: Iterable[str]) -> str:
    """The known symbol that is most like another: by its characters, by groups of like sounds, by base letters."""

    def likeness(candidate: str) -> tuple[float, float]:
        # Characters in common, then the best group for the first sounds, lengths and marks aside.
        first, second = (unicodedata.normalize("NFD", text)[:1] for text in (symbol, candidate))
        places = [
            abs(group.index(first) - group.index(second)) for group in GROUPS if first in group and second in group
        ]
        sound = 1.0 if first == second else max((0.9 - 0.1 * place for place in places), default=0.0)
        return sound + difflib.SequenceMatcher(None, symbol, candidate).ratio(), -len(candidate)

    return max(known, key=likeness)
