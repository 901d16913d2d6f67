"""Flags of the evaluation of multimodal models."""

import dataclasses
from typing import Literal, get_args

from model.samplers import SamplerKind
from utils.evaluation.audio import Metric
from utils.evaluation.evaluator import (
    BatchedEvaluationArguments,
    ContactSheetArguments,
    FeatureArguments,
    expect_values,
)
from utils.options import option

MultimodalMetric = Literal["losses", "texts", "probe", "reader", "wer", "round_trips"]


@dataclasses.dataclass
class AnyMetricArguments:
    """The flag `--metrics` of `evaluate.py`, of which every evaluator has a list of its own."""

    metrics: list[Literal[Metric, MultimodalMetric]] = option(
        [name for name in dict.fromkeys((*get_args(Metric), *get_args(MultimodalMetric))) if name != "mos"],
        "metrics, those that the stage has; wer is the slowest, about a second per clip and row; mel: mel-L1 and MCD; "
        "mos: DistillMOS; losses, texts, probe, reader, wer, round_trips: of multimodal models",
    )


@dataclasses.dataclass
class MultimodalEvaluationArguments(FeatureArguments, ContactSheetArguments, BatchedEvaluationArguments):
    """Flags of the evaluation of multimodal models."""

    metrics: list[MultimodalMetric] = option(
        list(get_args(MultimodalMetric)),
        "metrics; losses: bits per byte and condition ratio; texts: generated texts; probe: of images, with KID; "
        "reader: of latents; wer: of speech by Whisper, about a second per clip and row; round_trips: and back again",
    )
    image_latents: str = option("", "folder of image latents; default: that of the run")
    audio_latents: str = option("", "folder of audio latents; default: that of the run")
    image_vae_checkpoint: str = option("", "folder of the image VAE; default: its copy in the run")
    audio_vae_checkpoint: str = option("", "folder of the audio VAE; default: its copy in the run")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    waveforms: str = option(
        "", "folder of the same clips made by preprocess_audio_vocoder_dataset.py, for the row of recordings"
    )
    beside: list[str] = option(
        [], "runs of a single task that are scored beside the model: image or audio diffusion, or multimodal ones"
    )
    n_copies: int = option(1, "images and clips that are generated per text", gt=0)
    sampler: SamplerKind | None = option(None, "sampler of images and audio; default: the model's")
    n_steps: int | None = option(None, "sampling steps of images and audio; default: the model's", gt=0)
    guidance_scale: float | None = option(
        None, "scale of the guidance of images and audio; 1: none; default: the model's", ge=0
    )
    reader_steps: int = option(
        500, "training steps of a reader", gt=0, only_with=("metrics", ("reader", "round_trips"))
    )
    training_samples: int = option(
        5000, "training samples, spread evenly, for the probe and the readers; 0: all", ge=0
    )
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
    seed: int = option(0, "seed of generation, which also depends on the item", ge=0, lt=2**63)

    def validate_metrics(self):
        expect_values(self, "metrics")
