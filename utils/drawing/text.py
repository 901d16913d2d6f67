"""Text on images: letters of most scripts, and code points in place of those that no font has."""

import functools
import importlib.util
import logging
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

# Packages of fonts with the file in each, in the order in which a letter is looked up: Latin, Greek, Cyrillic and
# Devanagari; Chinese, Japanese and Korean. Without them Pillow's own font draws ASCII alone.
FONT_FILES = (
    ("fontpkg_noto_sans", "files/NotoSans[wdth,wght].ttf"),
    ("noto_cjk_sans_otc", "NotoSansCJK-Regular.ttc"),
)
NO_LETTER = "\uffff"  # Not a character: every font draws its sign for missing letters.
SELECTORS = range(0xFE00, 0xFE10)  # Choose between forms of the letter before them, and are invisible.
INK = (30, 30, 30)

Font = ImageFont.FreeTypeFont


class Typeface:
    """Fonts of one size; each letter is drawn by the first one that has it.

    Line breaks and tabs are drawn as blanks. Letters that no font has are drawn as their code points, such as
    `\\u0e01`, so that a text never looks like another one.

    Args: fonts: at least one; the first gives the baseline.
    """

    def __init__(self, fonts: Sequence[Font]):
        self.fonts = list(fonts)
        self.font_of = functools.cache(self.find_font)

    def find_font(self, letter: str) -> Font | None:
        """The first font that has a letter; None for control characters and halves of others, which are none."""
        if unicodedata.category(letter) in ("Cc", "Cs"):
            return None
        font = next((font for font in self.fonts if has(font, letter)), None)
        if font is None and not installed_fonts():
            advise_fonts()
        return font

    def runs(self, text: str) -> list[tuple[str, Font]]:
        """The text as it is drawn, in parts of one font each."""
        letters = unicodedata.normalize("NFC", " ".join(text.split()))
        runs: list[tuple[str, Font]] = []
        for letter in letters:
            if unicodedata.category(letter) == "Cf" or ord(letter) in SELECTORS:
                continue
            font = self.font_of(letter)
            # A blank or an accent stays with the letter before it.
            if runs and (letter == " " or unicodedata.combining(letter)) and has(runs[-1][1], letter):
                font = runs[-1][1]
            if font is None:
                letter, font = letter.encode("unicode_escape").decode(), self.fonts[0]
            if runs and runs[-1][1] is font:
                runs[-1] = runs[-1][0] + letter, font
            else:
                runs.append((letter, font))
        return runs

    def length(self, text: str) -> float:
        """Width in pixels."""
        return sum(font.getlength(run) for run, font in self.runs(text))

    def shorten(self, text: str, width: float) -> str:
        """The text, truncated to `width` pixels."""
        if self.length(text) <= width:
            return text
        n_letters = bisect_right(range(1, len(text)), width, key=lambda n: self.length(text[:n] + "..."))
        return text[:n_letters] + "..."

    def wrap(self, text: str, width: float, n_lines: int) -> list[str]:
        """The text in at most `n_lines` lines of `width` pixels, broken at blanks, and within words that are longer
        than a line; the last line is truncated."""
        words, lines = text.split(), []
        while words and len(lines) < n_lines - 1:
            n_words = bisect_right(range(1, len(words) + 1), width, key=lambda n: self.length(" ".join(words[:n])))
            if n_words:
                lines.append(" ".join(words[:n_words]))
                words = words[n_words:]
            else:
                word = words[0]
                n_letters = max(bisect_right(range(1, len(word)), width, key=lambda n: self.length(word[:n])), 1)
                lines.append(word[:n_letters])
                words[0] = word[n_letters:]
        return [*lines, self.shorten(" ".join(words), width)] if words else lines

    def draw(
        self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, width: float = math.inf
    ) -> None:
        """Draw one line with its top left corner at `place`, truncated to `width` pixels."""
        left, baseline = place[0], place[1] + self.fonts[0].getmetrics()[0]
        for run, font in self.runs(self.shorten(text, width)):
            canvas.text((left, baseline), run, INK, font, anchor="ls")
            left += font.getlength(run)


def has(font: Font, letter: str) -> bool:
    """Whether a font has a letter."""
    return glyph(font, letter) != glyph(font, NO_LETTER)


def glyph(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    """Size and pixels of a letter."""
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@functools.cache
def installed_fonts() -> list[Path]:
    """The files of `FONT_FILES` whose packages are installed."""
    specs = [(importlib.util.find_spec(package), file) for package, file in FONT_FILES]
    return [Path(spec.origin).parent / file for spec, file in specs if spec and spec.origin]


@functools.cache
def advise_fonts() -> None:
    """Say once what brings letters beyond ASCII."""
    logger.warning(
        "no font has some letters of the texts, which are drawn as code points; pip install -r requirements-demo.txt"
    )


@functools.cache
def typeface(size: int) -> Typeface:
    """The fonts that are installed.

    Args: size: in pixels.
    """
    fonts = [ImageFont.truetype(file, size) for file in installed_fonts()]
    default = ImageFont.load_default(size)
    assert isinstance(default, Font), "Pillow was built without FreeType"
    return Typeface(fonts or [default])
