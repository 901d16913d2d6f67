"""Flags of the vocoder's training."""

import dataclasses
from typing import ClassVar

from model.presets import VOCODER
from utils.flags.choices import WaveformDiscriminatorKind
from utils.megatransformer_utils import StageArguments
from utils.options import Section, option
from utils.training.arguments.adversary import WITH_ADVERSARY, AdversaryArguments


@dataclasses.dataclass
class VocoderArguments(AdversaryArguments, StageArguments):
    """Flags of the vocoder stage."""

    stage: ClassVar = "vocoder"
    presets: ClassVar = VOCODER

    SECTION_DATA: ClassVar = Section("Data")
    segment_frames: int = option(32, "mel frames of a training crop", gt=1)

    SECTION_LOSSES: ClassVar = Section("Losses")
    mel_weight: float = option(45.0, "weight of the log-mel's mean absolute error", ge=0)
    stft_weight: float = option(
        1.0, "weight of spectral convergence and of the log-magnitudes' mean absolute error", ge=0
    )
    stft_resolutions: list[int] = option(
        [512, 1024, 2048], "frame lengths of these spectrograms in samples", only_with=("stft_weight", bool)
    )
    phase_weight: float = option(1.0, "weight of the errors of group delay and instantaneous frequency", ge=0)
    complex_stft_weight: float = option(0.0, "weight of the complex spectrogram's relative error", ge=0)

    SECTION_GAN: ClassVar = Section("GAN")
    # Adversary. Gradient norms on waveforms jump at silence, so that the adversarial weight is not adapted to them.
    gan_weight: float = option(1.0, "weight of the adversarial loss; 0: no discriminator", ge=0)
    use_adaptive_gan_weight: bool = option(
        False, "scale the adversarial gradient to the norm of the reconstruction's at the output"
    )
    feature_matching_weight: float = option(5.0, "weight of feature matching, relative to the adversarial loss", ge=0)
    discriminator: WaveformDiscriminatorKind = option(
        "thin", "preset of the discriminator; full: the layers of HiFi-GAN and Vocos", only_with=WITH_ADVERSARY
    )
    discriminator_periods: list[int] | None = option(
        None,
        "periods of the period discriminators in samples; no value: none; default: the preset's",
        only_with=WITH_ADVERSARY,
    )
    discriminator_resolutions: list[int] | None = option(
        None,
        "frame lengths of the resolution discriminators in samples; no value: none; default: the preset's",
        only_with=WITH_ADVERSARY,
    )
    discriminator_widening: float = option(1.0, "factor of the preset's channels", gt=0, only_with=WITH_ADVERSARY)
    discriminator_learning_rate: float = option(5e-4, "peak learning rate of the discriminator", gt=0)
    discriminator_beta1: float = option(0.8, "decay of AdamW's first moment for the discriminator", ge=0, lt=1)
    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    n_logged_samples: int = option(
        4, "validation clips logged to TensorBoard, as audio and images; 0: none", ge=0, aliases=("n_logged_clips",)
    )
    learning_rate: float = option(5e-4, "peak learning rate of AdamW", gt=0)
    adam_beta1: float = option(0.8, "decay of AdamW's first moment", ge=0, lt=1)
