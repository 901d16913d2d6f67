"""Shared by the preprocessing stages that read audio: the way from a file to conditioned waveforms."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset_loading.audio.augmentation import AudioAugmentation
from dataset_loading.audio.parts import part_of_row
from dataset_loading.audio.recording import read_recording
from dataset_loading.audio.signal import (
    AUDIO_SUFFIXES,
    TooQuietError,
    cut_at_pauses,
    is_silent,
    limit_peak,
    normalize_loudness,
    remove_hum,
    trim_silence,
)
from dataset_loading.sources import Source
from dataset_loading.tables import CAPTION_COLUMNS, SPEAKER_COLUMNS
from model.audio.spectral import LogMel, MelSettings, analyse, check_same_mel
from utils.preprocessing.audio_arguments import AUGMENTATIONS, MAX_CLIPPED, MEL_FLAGS, AudioPreprocessArguments
from utils.preprocessing.driver import PACKAGES, Preprocess
from utils.preprocessing.rows import merge_rows
from utils.preprocessing.samples import Example, Raw, SkipSampleError, caption_of, named_cell

logger = logging.getLogger(__name__)

# Flags that shape the waveforms, and therefore belong to the fingerprint of a cache.
CONDITIONING = (
    "segment_seconds",
    "min_seconds",
    "trim_db",
    "loudness_db",
    "loudness_measure",
    "notch_hz",
    "keep_clipped",
)
# Columns of other formats that cut parts of recordings.
LIMITS = (("start", "end"), ("start_time", "end_time"), ("begin", "end"))


class AudioPreprocess(Preprocess):
    """Preprocessing of one stage that reads audio. Subclasses state `name` and `encode`.

    `encode` gets a mono waveform (S,) float32 in [-1, 1] at the rate of the log-mel, S a multiple of hop_length.
    """

    arguments_class = AudioPreprocessArguments
    media = "audio"
    suffixes = AUDIO_SUFFIXES
    caption_columns = CAPTION_COLUMNS
    packages = (*PACKAGES, "torchaudio", "soundfile")

    def __init__(self, args: AudioPreprocessArguments):
        super().__init__(args)
        self.mel = args.mel_settings
        self.augmentation = AudioAugmentation(**{name: getattr(args, name) for name in AUGMENTATIONS})

    def settings(self) -> dict[str, Any]:
        named = {name: getattr(self.args, name) for name in (*CONDITIONING, *AUGMENTATIONS)}
        return {"mel": self.mel.as_dict(), **named}

    def open_sources(self) -> dict[str, Source]:
        sources = super().open_sources()
        # A column that does not exist is an error before any file is read.
        for source in sources.values():
            self.find_column(source, "speaker_column", SPEAKER_COLUMNS)
            self.find_column(source, "language_column", ())
            limits = next((pair for pair in LIMITS if set(pair) <= set(source.columns)), None)
            if limits and "offset" not in source.columns:
                logger.warning(
                    "%s: the columns %s are not read, and each row is its whole recording; where they cut parts, give "
                    "columns offset and duration in seconds",
                    *(source.identity, " and ".join(limits)),
                )
        return sources

    def merged(self, source: Source) -> Source:
        caption = self.find_column(source, "caption_column", self.caption_columns)
        speaker = self.find_column(source, "speaker_column", SPEAKER_COLUMNS)
        return merge_rows(
            source, caption, ("offset", "duration", speaker, self.find_column(source, "language_column", ()))
        )

    def examples(self, source: Source) -> Iterator[tuple[str, Raw]]:
        caption = self.find_column(source, "caption_column", self.caption_columns)
        speaker = self.find_column(source, "speaker_column", SPEAKER_COLUMNS)
        language = self.find_column(source, "language_column", ())
        for name, row in source:
            with named_cell(source.identity, name, speaker):
                notes: dict[str, Any] = {"speaker": speaker_of(row.get(speaker))}
            if language:
                notes["language"] = caption_of(row.get(language)).strip()
            # A row may name a part of a recording; a duration alone describes the clip.
            part = part_of_row(row) if row[source.media] and "offset" in source.columns else {}
            media = {**row[source.media], **part} if part else row[source.media]
            with named_cell(source.identity, name, caption):
                captions = list(self.captions(row.get(caption)))
            for place, (text, captions_of_row) in enumerate(captions):
                yield name, Raw(media, text, {**notes, **captions_of_row, **part}, place)

    def decode(self, media: dict[str, Any] | None) -> Tensor:
        """A conditioned waveform at the rate of the log-mel."""
        args, rate = self.args, self.mel.sample_rate
        # Mono at the rate of the log-mel, (S,).
        waveform, share = read_recording(media, rate)
        if share > MAX_CLIPPED and not args.keep_clipped:
            raise SkipSampleError(f"clipped: {share:.2%} of the samples are at full scale; --keep_clipped keeps it")
        self.check_length(waveform)
        if args.notch_hz:
            waveform = remove_hum(waveform, rate, args.notch_hz)
        # After the hum is gone: it would make silence loud, and hide where speech begins.
        if is_silent(waveform, rate):
            raise SkipSampleError("silent")
        # Ends are trimmed before the level is set; what is left may be too short.
        if args.trim_db:
            waveform = trim_silence(waveform, rate, args.trim_db)
            self.check_length(waveform)
        # Gain may exceed full scale, so that the peak is limited last.
        if args.loudness_db is not None:
            try:
                waveform = normalize_loudness(waveform, rate, args.loudness_db, measure=args.loudness_measure)
            except TooQuietError as error:
                raise SkipSampleError(str(error)) from error
        return limit_peak(waveform)

    def check_length(self, waveform: Tensor) -> None:
        """Raises: SkipSampleError: the waveform is shorter than --min_seconds, or than a frame needs."""
        if len(waveform) < self.args.min_samples:
            rate, least = self.mel.sample_rate, self.args.min_samples
            raise SkipSampleError(f"too short: {len(waveform) / rate:.3f} s, less than {least / rate:.3f} s")

    def encode_parts(self, example: Example, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Change a copy at random, cut it into segments, leave out the silent ones, and encode the others.

        A segment of a copy is silent if it would be at the level of the plain clip, so that gain removes none. Where
        every segment counts as silent, though the whole clip does not, all are kept.
        """
        # The waveform of this copy, and its level compared with the plain one.
        waveform, rate, level = example.data, self.mel.sample_rate, 1.0
        if example.copy:
            waveform = self.augmentation(waveform, rate, generator)
            level = example.data.abs().max() / waveform.abs().max().clamp_min(1e-12)
            # A faster copy is shorter, perhaps too short for a log-mel.
            waveform = F.pad(waveform, (0, max(0, self.args.min_samples - len(waveform))))
        # Segments, each cut to whole frames: S = F * hop_length.
        limit = round(self.args.segment_seconds * rate) or len(waveform)
        segments = cut_at_pauses(waveform, rate, limit)
        segments = [segment for segment in segments if not is_silent(level * segment, rate)] or segments
        whole = [segment[: len(segment) // self.mel.hop_length * self.mel.hop_length] for segment in segments]
        return [self.encode(dataclasses.replace(example, data=segment), generator) for segment in whole]

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, int | float]:
        n_frames = tensors["mel"].shape[-1]  # (M, F)
        return {"length": n_frames, "seconds": round(n_frames * self.mel.hop_length / self.mel.sample_rate, 4)}


def speaker_of(value: Any) -> str:
    """The name of a speaker: without blanks around it, whole numbers without a fraction, `""` for none.

    Raises: ValueError: it is no text or number.
    """
    if isinstance(value, dict | list | bool):
        raise ValueError(f"a speaker is {repr(value)[:60]}, no name; name the column with --speaker_column")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return caption_of(value).strip()


def with_mel(args: AudioPreprocessArguments, mel: MelSettings, name: str) -> Any:
    """The arguments with the log-mel of a model.

    Args: name: of the model, for the message.
    Raises: ValueError: flags of the log-mel are given and say something else; the message names the fields.
    """
    if any(flag in getattr(args, "given", ()) for flag in (*MEL_FLAGS, "mel")):
        remedy = "leave the flags of the log-mel out: that of the VAE is used"
        check_same_mel(args.mel_settings, mel, first_name="the flags", second_name=name, remedy=remedy)
    return dataclasses.replace(args, **mel.as_dict())


def log_mel(waveform: Tensor, settings: MelSettings) -> Tensor:
    """(S,) -> (M, S // hop_length) fp32, in memory that is bounded but for the result. S is whole frames."""
    return analyse(waveform, log_mel_module(settings))


@functools.cache
def log_mel_module(settings: MelSettings) -> LogMel:
    """Built once in each worker process."""
    return LogMel(settings)
