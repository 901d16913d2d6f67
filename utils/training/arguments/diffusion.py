"""Flags of the diffusion stages."""

import dataclasses
from typing import ClassVar

from model.presets import AUDIO_DIFFUSION, IMAGE_DIFFUSION
from utils.flags.choices import TimeSampling, Weighting
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments
from utils.generation.arguments.image import SamplingArguments
from utils.megatransformer_utils import BatchSize, SchedulerKind
from utils.options import Section, option
from utils.training.arguments.lora import LoRAArguments


@dataclasses.dataclass
class DiffusionArguments(LoRAArguments):
    """Flags of the objective, for all stages of diffusion."""

    SECTION_DATA: ClassVar = Section("Data")
    vae_checkpoint: str = option(
        "", "run or checkpoint folder of the latents' VAE; default: its copy in the run or the cache"
    )
    vae_config: str = option("", "preset of that VAE, checked against its checkpoint")

    SECTION_LOSSES: ClassVar = Section("Losses")
    caption_dropout: float = option(0.1, "probability that a caption is replaced by the null condition", ge=0, lt=1)
    time_sampling: TimeSampling = option("logit_normal", "distribution of training times")
    time_mean: float = option(0.0, "mean of the logit-normal times", only_with=("time_sampling", "logit_normal"))
    time_std: float = option(1.0, "std of the logit-normal times", gt=0, only_with=("time_sampling", "logit_normal"))
    loss_weighting: Weighting = option("none", "weighting of the loss over times")
    min_snr_gamma: float = option(
        5.0,
        "maximum signal-to-noise ratio of the min_snr weighting (arXiv 2303.09556)",
        gt=0,
        only_with=("loss_weighting", "min_snr"),
    )

    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    n_time_buckets: int = option(5, "intervals of [0, 1] whose validation loss is logged", gt=0, le=100)


@dataclasses.dataclass
class ImageDiffusionArguments(SamplingArguments, DiffusionArguments):
    """Flags of the text-to-image stage."""

    stage: ClassVar = "image_diffusion"
    presets: ClassVar = IMAGE_DIFFUSION

    SECTION_DATA: ClassVar = Section("Data")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as in preprocessing")

    SECTION_LOSSES: ClassVar = Section("Losses")
    channel_weight_power: float = option(
        0.0, "exponent p of the loss weight std^p of a latent channel, by its std in the VAE; 0: equal weights", ge=0
    )

    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    prompts: list[str] = option([], "captions of the logged image grids; default: validation captions")
    n_prompts: int = option(
        8, "validation captions of the logged image grids; 0: no grids", ge=0, only_with=("prompts", [])
    )
    eval_images: int = option(
        64,
        "images generated from validation captions for the metrics of each evaluation; 0: none",
        ge=0,
        aliases=("eval_pictures",),
    )
    grid_scales: list[float] = option([1.0, 3.0], "guidance scales of the logged image grids", ge=0)


@dataclasses.dataclass
class AudioDiffusionArguments(AudioSamplingArguments, DiffusionArguments):
    """Flags of the stage of diffusion on latents of audio."""

    stage: ClassVar = "audio_diffusion"
    presets: ClassVar = AUDIO_DIFFUSION

    # What suits small sets of speech.
    learning_rate: float = option(2e-3, "peak learning rate of AdamW", gt=0)
    adam_beta2: float = option(0.98, "decay of AdamW's second moment", ge=0, lt=1)
    weight_decay: float = option(0.01, "decoupled weight decay of matrices and kernels", ge=0)
    max_grad_norm: float = option(2.0, "maximum gradient norm, to which gradients are clipped; 0: no clipping", ge=0)
    lr_scheduler_type: SchedulerKind = option("linear", "schedule of the learning rate")
    warmup_ratio: float = option(0.1, "fraction of the steps with linear warm-up", ge=0, lt=1)

    SECTION_DATA: ClassVar = Section("Data")
    use_speakers: bool = option(True, "condition the model on the speaker where there are several, speech only")
    batch_frames: int = option(
        800, "latent frames of a micro-batch and process, clips of like length; 0: batch_size clips", ge=0
    )
    max_clip_frames: int = option(
        250, "latent frames of a training clip of speech; longer ones are cut at pauses; 0: not at all", ge=0
    )
    batch_size: BatchSize = option(
        16, "clips per micro-batch and process; auto: as many as fit", gt=0, only_with=("batch_frames", 0)
    )

    SECTION_LOSSES: ClassVar = Section("Losses")
    prior_weight: float = option(1.0, "weight of the squared error of the prior, speech only", ge=0)
    duration_weight: float = option(0.5, "weight of the error of log-durations, speech only", ge=0)
    duration_samples: int = option(512, "training clips on which the duration factor is fitted", gt=0)

    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    sentences: list[str] = option(
        ["The quick brown fox jumps over the lazy dog.", "Please call me back tomorrow morning."],
        "sentences that are spoken in TensorBoard, speech only",
    )
    prompts: list[str] = option([], "further captions whose sounds are in TensorBoard, captions only")
    text_encoder: str = option(
        "", "folder or hub name of the captions' text encoder, captions only; default: as in preprocessing"
    )
    wer_samples: int = option(
        0,
        "validation clips of 4 or more words that are spoken and recognised at each evaluation, for eval_wer and "
        "eval_cer, English speech only; 0: none",
        ge=0,
    )
    n_logged_samples: int = option(4, "validation clips logged to TensorBoard, as audio and images; 0: none", ge=0)
    vocoder_checkpoint: str = option(
        "",
        "run or checkpoint folder of the vocoder of logged clips; default: Griffin-Lim",
        only_with=("n_logged_samples", bool),
    )
