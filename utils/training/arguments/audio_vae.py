"""Flags of the audio VAE's training."""

import dataclasses
from typing import ClassVar

from model.presets import AUDIO_VAE
from utils.flags.choices import MelDiscriminatorKind
from utils.options import Section, option
from utils.training.arguments.adversary import WITH_ADVERSARY, VAEGANArguments


@dataclasses.dataclass
class AudioVAEArguments(VAEGANArguments):
    """Flags of the audio VAE-GAN stage."""

    stage: ClassVar = "audio_vae"
    presets: ClassVar = AUDIO_VAE

    SECTION_DATA: ClassVar = Section("Data")
    segment_frames: int = option(128, "mel frames of a training crop, at a random position; 0: whole clips", ge=0)
    use_speakers: bool = option(False, "condition the model on the speaker")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", gt=0)

    SECTION_LOSSES: ClassVar = Section("Losses")
    l1_weight: float = option(1.0, "weight of the mean absolute error of log-mels", ge=0)
    l2_weight: float = option(0.0, "weight of their mean squared error", ge=0)
    gradient_weight: float = option(
        0.0, "weight of the mean absolute error of differences along time and frequency", ge=0
    )
    kl_weight: float = option(1e-2, "weight of the KL divergence in nats per input value", ge=0)
    ctc_weight: float = option(
        0.0, "weight of the CTC loss of the transcript given the latents, in nats per character; 0: no CTC head", ge=0
    )

    SECTION_GAN: ClassVar = Section("GAN")
    discriminator: MelDiscriminatorKind = option("patch_2d", "type of discriminator", only_with=WITH_ADVERSARY)
    discriminator_channels: int = option(
        32, "channels of the discriminator's first layer", gt=0, only_with=WITH_ADVERSARY
    )
    discriminator_layers: int = option(3, "strided layers of the discriminator", gt=0, only_with=WITH_ADVERSARY)
    use_spectral_norm: bool = option(False, "spectral normalisation of the discriminator", only_with=WITH_ADVERSARY)

    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    latent_statistics_samples: int = option(
        1024,
        "training clips on which mean and std of mel bins and latents are measured",
        gt=0,
        aliases=("statistics_samples",),
    )
    n_logged_samples: int = option(
        4, "validation clips logged to TensorBoard, as audio and images; 0: none", ge=0, aliases=("n_logged_clips",)
    )
    vocoder_checkpoint: str = option(
        "",
        "run or checkpoint folder of the vocoder of logged clips; default: Griffin-Lim",
        only_with=("n_logged_samples", bool),
    )

    def validate_segments(self):
        if self.ctc_weight > 0 and self.segment_frames:
            raise ValueError(
                f"--ctc_weight={self.ctc_weight} needs --segment_frames=0: a transcript belongs to a whole clip"
            )
        if self.gan_weight > 0 and 0 < self.segment_frames < 2**self.discriminator_layers:
            raise ValueError(
                f"--segment_frames={self.segment_frames} must be >= {2**self.discriminator_layers}, which "
                f"--discriminator_layers={self.discriminator_layers} needs"
            )
