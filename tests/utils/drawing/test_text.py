"""Text on images: every letter is drawn as itself, or as its code point."""

import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from utils.drawing import text as fonts
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group, draw_sheet
from utils.drawing.text import FONT_FILES, Typeface, typeface

HAS_FONTS = all(importlib.util.find_spec(package) for package, _ in FONT_FILES)
needs_fonts = pytest.mark.skipif(not HAS_FONTS, reason="the fonts of requirements-demo.txt are not installed")
SCRIPTS = {
    "latin": "Ærøskøbing, żółw, Ğ",
    "vietnamese": "tiếng Việt",
    "greek": "γάτα",
    "cyrillic": "кішка Ї",
    "chinese": "猫坐在垫子上",
    "japanese": "ねこ カ",
    "korean": "고양이",
}


def drawn(font: Typeface, text: str, width: int = 300) -> np.ndarray:
    image = Image.new("RGB", (width, 24), "white")
    font.draw(ImageDraw.Draw(image), (2, 2), text, width=width - 4)
    return np.asarray(image)


@needs_fonts
@pytest.mark.parametrize("script", SCRIPTS)
def test_letters_of_most_scripts_are_drawn_as_themselves(script):
    font, words = typeface(13), SCRIPTS[script]
    assert "".join(run for run, _ in font.runs(words)) == words
    # No two letters look alike, as they would where a font draws its sign for missing ones.
    letters = sorted(set(words) - {" "})
    images = {drawn(font, letter).tobytes() for letter in letters}
    assert len(images) == len(letters) and drawn(font, " ").tobytes() not in images


@pytest.mark.parametrize("font", [typeface(13), Typeface([ImageFont.load_default(13)])], ids=["fonts", "none"])
def test_letters_that_no_font_has_are_their_code_points(font):
    assert font.runs("a \u0e01\U0001f600!") == [("a \\u0e01\\U0001f600!", font.fonts[0])]
    assert np.array_equal(drawn(font, "\u0e01"), drawn(font, "\\u0e01"))
    assert not np.array_equal(drawn(font, "\u0e01"), drawn(font, "\u0e02"))


def test_without_the_fonts_letters_beyond_ascii_are_code_points():
    font = Typeface([ImageFont.load_default(13)])
    assert font.runs("λ ł") == [("\\u03bb \\u0142", font.fonts[0])]


def test_without_the_fonts_their_command_is_said_once(monkeypatch, caplog):
    for function in (fonts.installed_fonts, fonts.advise_fonts, fonts.typeface):
        function.cache_clear()
    monkeypatch.setattr(fonts, "FONT_FILES", (("no_such_package", "font.ttf"),))
    try:
        assert typeface(13).runs("abc") and not caplog.text
        assert typeface(13).runs("λ")[0][0] == typeface(14).runs("λ")[0][0] == "\\u03bb"
    finally:
        for function in (fonts.installed_fonts, fonts.typeface):
            function.cache_clear()
    assert caplog.text.count("pip install -r requirements-demo.txt") == 1


def test_invisible_characters_and_line_breaks_draw_nothing_strange():
    font = typeface(13)
    assert font.runs("a\nb\t c\u200d\ufeff\ufe0f") == font.runs("a b c")
    assert font.runs("\x1b[31m \ud800") == [("\\x1b[31m \\ud800", font.fonts[0])]


@needs_fonts
def test_decomposed_letters_are_composed():
    assert typeface(13).runs("e\u0301") == typeface(13).runs("é")


def test_long_texts_are_cut_to_their_width():
    font = typeface(13)
    for text in ("a" * 3000, "猫" * 3000):
        short = font.shorten(text, 100)
        assert short.endswith("...") and 80 < font.length(short) <= 100
        assert font.length(text[: len(short) - 2] + "...") > 100
    assert font.shorten("short", 100) == "short" and font.shorten("short", 1) == "..."


@pytest.mark.parametrize(
    "text", ["a large panda on a red ground", "a" * 60, "panda " + "b" * 40 + " key", "", "猫" * 30]
)
def test_wrapped_texts_fill_lines_and_lose_nothing_but_the_rest(text):
    font = typeface(13)
    lines = font.wrap(text, 100, 20)
    assert all(font.length(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    # A word goes on the next line only if it does not fit on this one.
    for line, following in zip(lines, lines[1:]):
        assert font.length(f"{line} {following.split()[0]}") > 100
    # Of fewer lines, the last one is shortened.
    if len(lines) > 2:
        short = font.wrap(text, 100, 2)
        assert short[0] == lines[0] and len(short) == 2 and short[1].endswith("...") and font.length(short[1]) <= 100


@needs_fonts
@pytest.mark.parametrize("draw", [draw_sheet, strip_sheet])
def test_sheets_show_texts_in_title_labels_and_captions(draw):
    def sheet(title: str, label: str, caption: str) -> np.ndarray:
        return np.asarray(draw([Group([Image.new("RGB", (160, 160))], caption)], [label], title=title))

    plain = sheet("□", "□", "□")
    for texts in (("猫", "□", "□"), ("□", "λ", "□"), ("□", "□", "ї")):
        rows = np.flatnonzero((sheet(*texts) != plain).any((1, 2)))
        assert len(rows) and rows[-1] - rows[0] < 20  # In its own line.
