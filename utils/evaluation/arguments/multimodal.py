"""Flags of evaluations of models of text, and of text, images and audio."""

import dataclasses
from typing import ClassVar, Literal, get_args

from utils.evaluation.arguments.base import (
    BatchedEvaluationArguments,
    ContactSheetArguments,
    FeatureArguments,
    expect_values,
)
from utils.flags.choices import SamplerKind
from utils.options import Section, option


@dataclasses.dataclass
class TextEvaluationArguments(BatchedEvaluationArguments):
    """Flags of the evaluation of language models."""

    SECTION_THINKING: ClassVar = Section("Recurrent depth")
    thinking_steps: list[int] = option(
        [], "recurrent models: numbers of thinking steps at which the loss is measured", gt=0
    )
    exit_thresholds: list[float] = option(
        [], "recurrent models: thresholds of early exits to measure; nats (kl) or relative change", gt=0
    )
    exit_criterion: Literal["own", "kl", "latent_difference"] = option(
        "own", "criterion of early exits; own: the model's", only_with=("exit_thresholds", bool)
    )
    max_thinking_steps: int = option(
        0, "maximum number of thinking steps with exits; 0: the model's own", ge=0, only_with=("exit_thresholds", bool)
    )
    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    speed_tokens: int = option(64, "tokens per prompt in timed generation, at most half a window; 0: not timed", ge=0)


MultimodalMetric = Literal["losses", "texts", "probe", "reader", "wer", "round_trips"]


@dataclasses.dataclass
class MultimodalEvaluationArguments(FeatureArguments, ContactSheetArguments, BatchedEvaluationArguments):
    """Flags of the evaluation of multimodal models."""

    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    metrics: list[MultimodalMetric] = option(
        list(get_args(MultimodalMetric)),
        "metrics; losses: bits per byte and condition ratio; texts: generated texts; probe: of images, with KID; "
        "reader: of latents; wer: of speech by Whisper, about a second per clip and row; round_trips: and back again",
    )
    SECTION_DATA: ClassVar = Section("Models and data")
    image_latents: str = option("", "folder of image latents; default: that of the run")
    audio_latents: str = option("", "folder of audio latents; default: that of the run")
    image_vae_checkpoint: str = option("", "folder of the image VAE; default: its copy in the run")
    audio_vae_checkpoint: str = option("", "folder of the audio VAE; default: its copy in the run")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    waveforms: str = option(
        "", "folder of the same clips made by preprocess_audio_vocoder_dataset.py, for the row of recordings"
    )
    SECTION_MORE: ClassVar = Section("Measurements")
    beside: list[str] = option(
        [], "runs of a single task that are scored beside the model: image or audio diffusion, or multimodal ones"
    )
    n_copies: int = option(1, "images and clips that are generated per text", gt=0)
    SECTION_SAMPLING: ClassVar = Section("Sampling")
    sampler: SamplerKind | None = option(None, "sampler of images and audio; default: the model's")
    n_steps: int | None = option(None, "sampling steps of images and audio; default: the model's", gt=0)
    guidance_scale: float | None = option(
        None, "scale of the guidance of images and audio; 1: none; default: the model's", ge=0
    )
    SECTION_READERS: ClassVar = Section("Measurements")
    reader_steps: int = option(
        500, "training steps of a reader", gt=0, only_with=("metrics", ("reader", "round_trips"))
    )
    training_samples: int = option(
        5000, "training samples, spread evenly, for the probe and the readers; 0: all", ge=0
    )
    SECTION_THINKING: ClassVar = Section("Recurrent depth")
    thinking_steps: list[int] = option(
        [], "recurrent models: numbers of thinking steps at which all is measured again", gt=0
    )
    carried_steps: list[int] = option(
        [],
        "recurrent models: numbers of thinking steps in a sampler's steps after the first, which go on from the "
        "state of the one before, at which images and clips are generated again",
        gt=0,
    )
    exit_thresholds: list[float] = option(
        [], "recurrent models: thresholds of early exits at which losses are measured", gt=0
    )
    exit_criterion: Literal["own", "latent_difference"] = option(
        "own", "criterion of early exits; own: the model's", only_with=("exit_thresholds", bool)
    )
    SECTION_SEED: ClassVar = Section("Sampling")
    seed: int = option(0, "seed of generation, which also depends on the item", ge=0, lt=2**63)

    def validate_metrics(self):
        expect_values(self, "metrics")
