"""eSpeak NG as a shared library, which the package `espeakng-loader` brings: loading, languages, phones of a text.

The state of the library is one per process: it is initialised once, and whoever speaks or phonemises sets the voice
again before every call.
"""

# ruff: noqa: RUF002 (letters of other alphabets and of phonetics)
import ctypes
import functools
import re
from pathlib import Path

import espeakng_loader

from utils.options import suggest

# Constants of eSpeak NG's speak_lib.h.
SYNCHRONOUS_RETRIEVAL = 2
DO_NOT_EXIT = 0x8000
UTF8 = 1
IPA = 0x02
SEPARATOR = "|"  # between phones
LANGUAGE_SWITCH = re.compile(r"\([a-z0-9-]+\)")  # such as (en) before and (fr) after an English word


@functools.cache
def load_espeak() -> tuple[ctypes.CDLL, int]:
    """The library, initialised once per process, and the sampling rate of its voices in Hz.

    Raises: OSError: the library does not find its data.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(SYNCHRONOUS_RETRIEVAL, 0, data, DO_NOT_EXIT)
    if sample_rate <= 0:
        raise OSError(f"eSpeak NG finds no voices in {data.decode()}; reinstall espeakng-loader")
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    return library, sample_rate


@functools.cache
def list_languages() -> dict[str, str]:
    """Names of languages, such as `en-us`, and the voice of each."""
    voices: dict[str, str] = {}
    files = [file for file in Path(espeakng_loader.get_data_path(), "lang").rglob("*") if file.is_file()]
    # A voice has the name of its file; lines `language en-us 2` give further names, which several voices may share.
    for file in sorted(files):
        names = re.findall(r"^language\s+(\S+)", file.read_text(encoding="utf-8"), flags=re.M)
        for name in names:
            voices.setdefault(name.lower(), file.name.lower())
    return voices | {file.name.lower(): file.name.lower() for file in files}


def check_language(language: str) -> None:
    """Raises: ValueError: eSpeak NG does not know the language; names the closest one."""
    if language.lower() not in list_languages():
        raise ValueError(f"language {language!r} is unknown to eSpeak NG{suggest(language, list_languages())}")


def phonemise(text: str, language: str) -> list[list[str]]:
    """The phones of every word of a text, in IPA with stress marks as eSpeak NG gives them.

    Numbers, dates, abbreviations and emoji are read as words of the language. eSpeak NG ends a clause at punctuation;
    its result does not show where.

    Returns: for each word with a sound its phones, `[["h", "ə", "l", "ˈoʊ"], ...]`.
    Raises: ValueError: an unknown language.
    """
    check_language(language)
    library, _ = load_espeak()
    if library.espeak_SetVoiceByName(list_languages()[language.lower()].encode()):
        raise ValueError(f"eSpeak NG has no voice for language {language!r}; reinstall espeakng-loader")
    # Control characters are spaces: a NUL would end the text. The buffer lives as long as the pointer into it.
    content = ctypes.create_string_buffer(re.sub(r"[\x00-\x1f\x7f]", " ", text).encode("utf-8", "replace"))
    pointer = ctypes.c_void_p(ctypes.addressof(content))
    words: list[list[str]] = []
    while pointer.value:  # Each call reads one clause and moves the pointer, at the end to NULL.
        clause = library.espeak_TextToPhonemes(ctypes.byref(pointer), UTF8, ord(SEPARATOR) << 8 | IPA).decode()
        for word in LANGUAGE_SWITCH.sub("", clause).split():
            phones = [phone for phone in word.split(SEPARATOR) if phone.strip("ˈˌ")]
            words += [phones] if phones else []
    return words
