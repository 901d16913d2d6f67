"""Shared by the preprocessing stages that read audio: flags, and the way from a file to conditioned waveforms."""

import dataclasses
import functools
import logging
import math
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
    LoudnessMeasure,
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
from model.audio.spectral import LogMel, MelPreset, MelSettings, analyse, check_same_mel, mel_preset
from utils.options import option, other_than_none
from utils.preprocessing.driver import PACKAGES, Preprocess, PreprocessArguments
from utils.preprocessing.rows import merge_rows
from utils.preprocessing.samples import Example, Raw, SkipSampleError, caption_of, named_cell

logger = logging.getLogger(__name__)

MEL_FLAGS = tuple(field.name for field in dataclasses.fields(MelSettings))
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
AUGMENTATIONS = tuple(field.name for field in dataclasses.fields(AudioAugmentation))
# Columns of other formats that cut parts of recordings.
LIMITS = (("start", "end"), ("start_time", "end_time"), ("begin", "end"))
MAX_CLIPPED = 1e-3  # Share of samples at full scale beyond which a clip counts as clipped.


@dataclasses.dataclass
class AudioPreprocessArguments(PreprocessArguments):
    """Flags of all preprocessing stages that read audio."""

    caption_column: str = option(
        "", f"column with the transcripts; default: the first of {', '.join(CAPTION_COLUMNS)}"
    )
    speaker_column: str = option("", f"column with the speakers; default: the first of {', '.join(SPEAKER_COLUMNS)}")
    language_column: str = option("", "column with the language of each transcript, such as fr-fr; default: none")

    # The log-mel: a preset, and fields that replace the preset's.
    mel: MelPreset = option("16k", "preset of the log-mel, by sampling rate")
    sample_rate: int | None = option(None, "sampling rate in Hz", gt=0)
    n_fft: int | None = option(None, "frame length in samples", gt=0)
    hop_length: int | None = option(None, "hop length in samples", gt=0)
    n_mels: int | None = option(None, "mel bins", gt=0)
    f_min: float | None = option(None, "minimum frequency of the mel bins in Hz", ge=0)
    f_max: float | None = option(None, "maximum frequency of the mel bins in Hz", gt=0)
    floor: float | None = option(None, "minimum mel magnitude, to which smaller ones are clamped", gt=0)

    # Selection and conditioning of clips.
    segment_seconds: float = option(
        0.0, "maximum length in seconds; longer clips are cut at quiet positions; 0: whole clips", ge=0
    )
    min_seconds: float = option(0.25, "minimum length in seconds; shorter clips are left out", ge=0)
    keep_clipped: bool = option(False, f"keep clips with more than {MAX_CLIPPED:.1%} of their samples at full scale")
    notch_hz: int = option(0, "mains frequency, 50 or 60 Hz, whose hum is removed; 0: off")
    trim_db: float = option(
        0.0, "trim ends that are quieter than the loudest part by this, in dB; 0: off", ge=0, bare=40.0
    )
    loudness_db: float | None = option(None, "target loudness in dBFS, such as -23", lt=0)
    loudness_measure: LoudnessMeasure = option(
        "active",
        "loudness measure; active: RMS without pauses; bs1770: LUFS of ITU-R BS.1770",
        only_with=("loudness_db", other_than_none),
    )

    # Augmentation of the copies.
    time_stretch: float = option(
        0.0,
        "maximum relative change of speed, at the same pitch",
        ge=0,
        le=1,
        bare=0.1,
        only_with=("num_augmented_copies", bool),
    )
    pitch_shift: float = option(
        0.0, "maximum change of pitch in semitones", ge=0, le=12, bare=1.0, only_with=("num_augmented_copies", bool)
    )
    gain_db: float = option(
        0.0, "maximum gain and attenuation in dB", ge=0, le=40, bare=6.0, only_with=("num_augmented_copies", bool)
    )
    noise_snr_db: float | None = option(
        None,
        "minimum signal-to-noise ratio with white noise in dB; the maximum is 20 more",
        bare=20.0,
        only_with=("num_augmented_copies", bool),
    )

    @property
    def mel_settings(self) -> MelSettings:
        """The preset with the fields that flags replace. Raises: ValueError: they contradict each other."""
        given = {name: getattr(self, name) for name in MEL_FLAGS if getattr(self, name) is not None}
        return dataclasses.replace(mel_preset(self.mel), **given)

    def validate_mel(self):
        settings = self.mel_settings
        if 0 < self.segment_seconds * settings.sample_rate < 3 * self.min_samples:
            raise ValueError(
                f"--segment_seconds={self.segment_seconds} must be at least three times the shortest clip, "
                f"{self.min_samples / settings.sample_rate:.3f} s, since segments may be a third as long"
            )

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip that is kept: it has a log-mel when it is cut to whole frames."""
        settings = self.mel_settings
        # Whole frames that cover the shortest waveform that has a log-mel.
        frames = math.ceil(settings.min_samples / settings.hop_length)
        return max(frames * settings.hop_length, round(self.min_seconds * settings.sample_rate))

    def validate_notch(self):
        if self.notch_hz not in (0, 50, 60):
            raise ValueError(f"--notch_hz={self.notch_hz} must be 0, 50 or 60")

    def validate_augmentation(self):
        # Copies differ only by augmentations that are on.
        used = [name for name in AUGMENTATIONS if getattr(self, name) != getattr(type(self), name)]
        flags = ", ".join(f"--{name}" for name in AUGMENTATIONS)
        if self.num_augmented_copies and not used:
            raise ValueError(f"--num_augmented_copies={self.num_augmented_copies}: copies are equal without {flags}")


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
