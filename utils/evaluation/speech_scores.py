"""Scores of spoken texts: error rates of what is recognised, voice, pitch, naturalness.  S samples, M mel bins, F mel
frames, T tokens."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.text.phonemes import SpeechTokenizer
from utils.evaluation.audio import MIN_WORDS, ClipScorer, Scores
from utils.metrics.pitch import pitch_statistics, track_pitch
from utils.metrics.words import bootstrap_interval, text_errors


@dataclasses.dataclass
class Utterance:
    """One text in all rows.

    Attributes:
        key, text, speaker, language: of the clip; the last two are empty where there are none to tell apart.
        rows: name of the row -> waveform (S,) on the CPU.
        mels: name of the row -> log-mel (M, F) and durations of tokens in mel frames (T,), for the sheet.
    """

    key: str
    text: str
    speaker: str
    language: str = ""
    rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    mels: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)


class SpeechScorer(ClipScorer):
    """Metrics of waveforms that may be of different lengths. Remembers the voices of the reference clips."""

    def __init__(self, settings: Any, metrics: Sequence[str]):
        super().__init__(settings, metrics)
        self.voices: dict[str, list[Tensor]] = {}  # speaker -> embeddings (256,) of the reference clips
        self.spoken: dict[str, list[tuple[str, Tensor]]] = {}  # row -> speaker and embedding of each clip

    def score_speech(self, utterance: Utterance, reference: str = "") -> dict[str, Scores]:
        """Name of the row -> scores.

        Args: reference: the row that is compared with; empty: the mean voice of the speaker's earlier references.
        """
        voice = None
        if "speaker" in self.metrics and reference:
            voice = self.encoder.embed(utterance.rows[reference], self.rate)
            self.voices.setdefault(utterance.speaker, []).extend([] if voice is None else [voice])
        elif known := self.voices.get(utterance.speaker):
            voice = torch.stack(known).mean(0)
        scores: dict[str, Scores] = {}
        for name, waveform in utterance.rows.items():
            row: Scores = {}
            if "speaker" in self.metrics:
                embedding = self.encoder.embed(waveform, self.rate)
                row["speaker_similarity"] = self.encoder.cosine(embedding, voice)
                if embedding is not None:
                    self.spoken.setdefault(name, []).append((utterance.speaker, embedding))
            if "pitch" in self.metrics:
                row |= pitch_statistics(track_pitch(waveform, self.rate))
            if "mos" in self.metrics:
                row["distillmos"] = self.naturalness.score(waveform, self.rate)
            scores[name] = row
        return scores

    def recognized_voices(self, name: str) -> dict[str, list[bool]]:
        """Speaker -> for each clip of a row, whether its speaker's mean reference voice is the most similar one.

        Returns: {} where there are fewer than two voices.
        """
        if len(self.voices) < 2:
            return {}
        names = list(self.voices)
        means = F.normalize(torch.stack([torch.stack(self.voices[speaker]).mean(0) for speaker in names]), dim=1)
        recognized: dict[str, list[bool]] = {}
        for speaker, embedding in self.spoken.get(name, []):
            best = int((means @ embedding).argmax())
            recognized.setdefault(speaker, []).append(names[best] == speaker)
        return recognized


def is_english(tokenizer: SpeechTokenizer, language: str = "") -> bool:
    """Whether the recogniser, which knows English alone, can read what is spoken; "": the usual language."""
    return tokenizer.units == "characters" or tokenizer.language_of(language).startswith("en")


def recognition_scores(recognized: Sequence[str], texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Word and character error rates of one row, defined in `audio_diffusion_report.py`; {} where no text has a word.

    Args:
        recognized: transcripts of the recogniser.
        texts: true texts, one per transcript.
        seed: of the bootstrap.
    """
    errors = [text_errors(*pair) for pair in zip(recognized, texts, strict=True)]
    scores: dict[str, Any] = {}
    # Clips of enough words, then all that have one.
    for suffix, least in (("", MIN_WORDS), ("_all", 1)):
        clips = [clip for clip in errors if clip.n_words >= least]
        if not clips:
            continue
        words, totals = [clip.words for clip in clips], [clip.n_words for clip in clips]
        scores |= {
            f"wer{suffix}": sum(words) / sum(totals),
            f"wer{suffix}_interval": list(bootstrap_interval(words, totals, seed=seed)),
            f"cer{suffix}": sum(clip.characters for clip in clips) / sum(clip.n_characters for clip in clips),
            f"n_words{suffix}": sum(totals),
            f"n_clips{suffix}": len(clips),
        }
    return scores


def next_texts(texts: Sequence[str], languages: Sequence[str] | None = None) -> list[int | None]:
    """For each text the position of the next one, round the end, that has other words in the same language; None where
    all are equal."""
    words, n = [re.findall(r"\w+", text.lower()) for text in texts], len(texts)
    languages = [""] * n if languages is None else languages

    def is_other(i: int, j: int) -> bool:
        return words[j] != words[i] and languages[j] == languages[i]

    return [next(((i + k) % n for k in range(1, n) if is_other(i, (i + k) % n)), None) for i in range(n)]
