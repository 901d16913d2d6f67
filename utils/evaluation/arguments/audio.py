"""Flags of evaluations of audio models."""

import dataclasses
from typing import ClassVar, Literal, get_args

from dataset_loading.embedded.sentences import SENTENCES
from utils.evaluation.arguments.base import ContactSheetArguments, EvaluationArguments, expect_values
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments
from utils.options import Section, option

Metric = Literal["pesq", "stoi", "mel", "stft", "pitch", "speaker", "wer", "mos"]


@dataclasses.dataclass
class AudioEvaluationArguments(ContactSheetArguments, EvaluationArguments):
    """Flags of the evaluation of models that generate audio."""

    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    metrics: list[Metric] = option(
        [metric for metric in get_args(Metric) if metric != "mos"],
        "metrics; wer is the slowest, about a second per clip and row; mel: mel-L1 and MCD; mos: DistillMOS",
    )

    transcript_language: str = option(
        "en",
        "language of transcripts without one of their own in the data set, such as es; the recogniser knows English "
        "alone, so that others have no WER",
    )

    def validate_metrics(self):
        if not self.metrics:
            raise ValueError("--metrics is empty; give one or more")


@dataclasses.dataclass
class AudioVAEEvaluationArguments(AudioEvaluationArguments):
    """Flags of the evaluation of audio VAEs."""

    SECTION_DATA: ClassVar = Section("Models and data")
    vocoder_checkpoint: str = option(
        "", "run or checkpoint folder of a vocoder of the same log-mel; default: Griffin-Lim"
    )


WITH_CURVE = ("curve", True)


@dataclasses.dataclass
class AudioPipelineEvaluationArguments(AudioSamplingArguments, ContactSheetArguments, EvaluationArguments):
    """Flags of the evaluation of whatever makes sounds with a diffusion model, a VAE and a vocoder."""

    SECTION_OUTPUT: ClassVar = Section("Computation and output")
    batch_size: int = option(8, "clips that are generated at once", gt=0)
    SECTION_DATA: ClassVar = Section("Models and data")
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run, or as recorded")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    SECTION_CURVE: ClassVar = Section("Curve of steps and guidance scales")
    curve: bool = option(False, "measure every combination of steps and guidance scale")
    curve_steps: list[int] = option([1, 2, 4, 8, 16, 32], "sampling steps of the curve", gt=0, only_with=WITH_CURVE)
    curve_scales: list[float] = option([1.0, 2.0], "guidance scales of the curve", ge=0, only_with=WITH_CURVE)

    def validate_curve(self):
        expect_values(self, "curve_steps", "curve_scales")


@dataclasses.dataclass
class CaptionEvaluationArguments(AudioPipelineEvaluationArguments):
    """Flags of the evaluation of captions to sound."""

    n_steps: int = option(20, "sampling steps", gt=0)
    guidance_scale: float = option(3.0, "scale of classifier-free guidance; 1: none", ge=0)
    SECTION_SAMPLING: ClassVar = Section("Sampling")
    seed: int = option(0, "seed of the noise, which also depends on the clip", ge=0, lt=2**63)
    SECTION_DATA: ClassVar = Section("Models and data")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as recorded")
    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    training_samples: int = option(
        5000, "training clips, spread evenly, for the probe and the nearest neighbours; 0: all", ge=0
    )
    curve_steps: list[int] = option([4, 8, 20], "sampling steps of the curve", gt=0)
    curve_scales: list[float] = option([1.0, 2.0, 3.0, 5.0], "guidance scales of the curve", ge=0)


SpeechMetric = Literal["wer", "speaker", "pitch", "mos"]
SpeechRow = Literal["vocoder", "teacher", "prior", "shuffled"]


@dataclasses.dataclass
class AudioDiffusionEvaluationArguments(AudioPipelineEvaluationArguments):
    """Flags of the evaluation of text to speech."""

    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    metrics: list[SpeechMetric] = option(
        list(get_args(SpeechMetric)), "metrics; wer: WER and CER, about a second per clip and row; mos: DistillMOS"
    )
    rows: list[SpeechRow] = option(
        list(get_args(SpeechRow)),
        "rows beside those of the recordings, the VAE and the model: vocoder alone, true durations (teacher), prior "
        "alone, shuffled texts",
    )
    seed: int = option(0, "seed of the noise, which also depends on the clip, and of the bootstrap", ge=0, lt=2**63)
    waveforms: str = option(
        "", "folder of the same clips made by preprocess_audio_vocoder_dataset.py, for the rows of recordings"
    )
    sentences: int = option(50, "new sentences that are spoken; 0: none", ge=0, le=len(SENTENCES))
    SECTION_CURVE: ClassVar = Section("Curve of steps and guidance scales")
    curve_samples: int = option(64, "clips per point of the curve, spread evenly", gt=0, only_with=WITH_CURVE)

    def validate_metrics(self):
        if not self.metrics:
            raise ValueError("--metrics is empty; give one or more")
