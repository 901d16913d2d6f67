"""Flags of preprocessing audio."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

from dataset_loading.tables import CAPTION_COLUMNS, SPEAKER_COLUMNS
from utils.flags.choices import LoudnessMeasure, MelPreset, Units
from utils.options import Section, declared_fields, option, other_than_none
from utils.preprocessing.arguments import HOW_WRITTEN, BatchedPreprocessArguments, PreprocessArguments

if TYPE_CHECKING:
    from model.audio.spectral import MelSettings

# Flags with the names of the fields of `MelSettings`, and of `AudioAugmentation`.
MEL_FLAGS = ("sample_rate", "n_fft", "hop_length", "n_mels", "f_min", "f_max", "floor")
AUGMENTATIONS = ("time_stretch", "pitch_shift", "gain_db", "noise_snr_db")
MAX_CLIPPED = 1e-3  # Share of samples at full scale beyond which a clip counts as clipped.


@dataclasses.dataclass
class AudioPreprocessArguments(PreprocessArguments):
    """Flags of all preprocessing stages that read audio."""

    SECTION_DATA: ClassVar = Section("Raw data")
    caption_column: str = option(
        "", f"column with the transcripts; default: the first of {', '.join(CAPTION_COLUMNS)}"
    )
    speaker_column: str = option("", f"column with the speakers; default: the first of {', '.join(SPEAKER_COLUMNS)}")
    language_column: str = option("", "column with the language of each transcript, such as fr-fr; default: none")

    SECTION_MEL: ClassVar = Section("Log-mel: a preset, and what replaces its fields")
    # The log-mel: a preset, and fields that replace the preset's.
    mel: MelPreset = option("16k", "preset of the log-mel, by sampling rate")
    sample_rate: int | None = option(None, "sampling rate in Hz", gt=0)
    n_fft: int | None = option(None, "frame length in samples", gt=0)
    hop_length: int | None = option(None, "hop length in samples", gt=0)
    n_mels: int | None = option(None, "mel bins", gt=0)
    f_min: float | None = option(None, "minimum frequency of the mel bins in Hz", ge=0)
    f_max: float | None = option(None, "maximum frequency of the mel bins in Hz", gt=0)
    floor: float | None = option(None, "minimum mel magnitude, to which smaller ones are clamped", gt=0)

    SECTION_CLIPS: ClassVar = Section("Selection and conditioning of clips")
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

    SECTION_AUGMENTATION: ClassVar = Section("Augmentation of the copies")
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
    def mel_settings(self) -> "MelSettings":
        """The preset with the fields that flags replace. Raises: ValueError: they contradict each other."""
        # It imports torch, which takes a second that --help and a mistyped flag need not wait for.
        from model.audio.spectral import mel_preset

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


Conditioning = Literal["speech", "caption"]


AlignerInputs = Literal["hmm", "joint"]


@dataclasses.dataclass
class AudioLatentsArguments(AudioPreprocessArguments, BatchedPreprocessArguments):
    """Flags of preprocessing audio latents, without those of the models that encode."""

    SECTION_DATA: ClassVar = Section("Raw data")
    dataset_name: str = option(
        "", "raw data set: hub name, folder, index file (.csv, .jsonl), or tars by folder, pattern or address"
    )
    audio_cache: str = option("", "folder of preprocessed audio instead of a raw data set: nothing is decoded again")
    SECTION_TEXTS: ClassVar = Section("Texts")
    conditioning: Conditioning = option(
        "speech", "speech: transcripts as tokens with durations; caption: texts that describe a clip"
    )
    units: Units = option(
        "phonemes",
        "what transcripts are split into; characters need no eSpeak NG and give far less intelligible speech",
        only_with=("conditioning", "speech"),
    )
    language: str = option(
        "en-us",
        "language of the transcripts for eSpeak NG, such as fr-fr; of those without one in --language_column",
        only_with=[("conditioning", "speech"), ("units", "phonemes")],
    )
    gaps: bool = option(True, "a token between words, which may last 0 frames", only_with=("conditioning", "speech"))
    aligner: AlignerInputs = option(
        "hmm", "hmm: aligns log-mels; joint: aligns the latents themselves", only_with=("conditioning", "speech")
    )
    aligner_from: str = option(
        "",
        "folder of audio latents whose aligner and symbols are used; default: fitted to the training clips",
        only_with=("conditioning", "speech"),
    )
    max_tokens: int = option(
        256,
        "maximum tokens of a caption (bytes or the text encoder's); the rest is cut",
        gt=0,
        only_with=("conditioning", "caption"),
    )

    def validate_source(self):
        if bool(self.dataset_name) == bool(self.audio_cache):
            given = "both are given" if self.dataset_name else "none is given"
            raise ValueError(f"--dataset_name or --audio_cache: {given}; give a raw data set or preprocessed audio")
        if self.limit == 0:
            raise ValueError("--limit=0 reads nothing; give a positive number, or -1 for all")

    def validate_cache(self):
        used = {"dataset_name", "limit", "validation_fraction", "output_dir", "num_workers"}
        used |= {"max_broken_fraction", "keep_duplicates", *HOW_WRITTEN} - {"streaming"}
        unused = {field.name for field in declared_fields(AudioPreprocessArguments)} - used
        given = sorted(unused & set(getattr(self, "given", ())))
        if self.audio_cache and given:
            raise ValueError(f"--{given[0]} has no effect with --audio_cache, whose audio is decoded already")


@dataclasses.dataclass
class AudioVocoderPreprocessArguments(AudioPreprocessArguments, BatchedPreprocessArguments):
    """Flags of this stage."""

    SECTION_ENCODER: ClassVar = Section("Encoder")
    through_vae: str = option(
        "", "run or checkpoint folder of an audio VAE: its reconstructions of the log-mels are written, not theirs"
    )
    vae_config: str = option(
        "", "preset that the VAE must have been trained with; default: any", only_with=("through_vae", bool)
    )
    batch_size: int = option(32, "clips per batch of the VAE", gt=0, only_with=("through_vae", bool))
    bf16: bool = option(False, "bfloat16 autocast in the VAE", only_with=("through_vae", bool))


@dataclasses.dataclass
class AudioDiffusionPreprocessArguments(AudioLatentsArguments):
    """Flags of this stage."""

    SECTION_ENCODER: ClassVar = Section("Encoder")
    vae_checkpoint: str = option("", "run or checkpoint folder of the audio VAE; its averaged weights are used")
    vae_config: str = option("", "preset that the VAE must have been trained with; default: any")
    SECTION_TEXTS: ClassVar = Section("Texts")
    text_encoder: str = option(
        "",
        "frozen text encoder whose hidden states of captions are stored: local folder or hub name; default: bytes",
        only_with=("conditioning", "caption"),
    )

    def validate_vae(self):
        if not self.vae_checkpoint:
            raise ValueError("--vae_checkpoint is missing: give a run of pretrain_audio_vae.py, runs/audio_vae/NAME")
