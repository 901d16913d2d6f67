"""Flags of the stages that train VAE-GANs on images."""

import dataclasses
from typing import ClassVar

from model.presets import IMAGE_VAE, RECURRENT_VAE
from utils.flags.choices import AugmentationKind, DiscriminatorKind, PerceptualKind
from utils.options import Section, above_one, option
from utils.training.arguments.adversary import WITH_ADVERSARY, VAEGANArguments


@dataclasses.dataclass
class ImageVAEGANArguments(VAEGANArguments):
    """Flags of every stage that trains a VAE-GAN on images."""

    stage: ClassVar = "image_vae"
    presets: ClassVar = IMAGE_VAE

    SECTION_LOSSES: ClassVar = Section("Losses")
    l1_weight: float = option(1.0, "weight of the mean absolute error", ge=0)
    gradient_weight: float = option(0.0, "weight of the multi-scale image gradient difference", ge=0)
    perceptual_weight: float = option(0.5, "weight of the perceptual distance; 0: no perceptual network", ge=0)
    perceptual: PerceptualKind = option("efficientnet", "feature network of the perceptual distance")
    perceptual_start_step: int = option(
        0, "optimizer step from which the perceptual distance acts", ge=0, only_with=("perceptual_weight", bool)
    )
    kl_weight: float = option(1e-6, "weight of the KL divergence in nats per input value", ge=0)
    SECTION_GAN: ClassVar = Section("GAN")
    discriminator: DiscriminatorKind = option("patch", "type of discriminator", only_with=WITH_ADVERSARY)
    discriminator_channels: int = option(
        32, "channels of the discriminator's first layer", gt=0, only_with=WITH_ADVERSARY
    )
    discriminator_layers: int = option(3, "strided layers of each discriminator", gt=0, only_with=WITH_ADVERSARY)
    use_spectral_norm: bool = option(False, "spectral normalisation of the discriminator", only_with=WITH_ADVERSARY)
    diff_augment: list[AugmentationKind] = option(
        [], "differentiable augmentations of the discriminator's input", only_with=WITH_ADVERSARY
    )
    SECTION_LOGS: ClassVar = Section("Logs, evaluation and checkpoints")
    latent_statistics_samples: int = option(
        1024, "training images on which mean and std of the latents are measured", gt=0
    )
    n_logged_samples: int = option(8, "validation images logged to TensorBoard", gt=0, aliases=("n_logged_pictures",))

    def validate_perceptual_start(self):
        if self.perceptual_weight and self.perceptual_start_step and not (self.l1_weight or self.gradient_weight):
            raise ValueError(
                f"--perceptual_start_step={self.perceptual_start_step} leaves the steps before it without a "
                "reconstruction loss; give an --l1_weight or --gradient_weight"
            )


@dataclasses.dataclass
class RecurrentVAEArguments(ImageVAEGANArguments):
    """Flags of the recurrent VAE-GAN stage."""

    stage: ClassVar = "recurrent_vae"
    presets: ClassVar = RECURRENT_VAE

    SECTION_DECODER: ClassVar = Section("Decoder steps")
    # Decoder steps of an optimizer step: sampled from a truncated log-normal Poisson distribution.
    mean_decoder_steps: float = option(6.0, "mean number of decoder steps in training, before truncation", ge=1)
    decoder_steps_sigma: float = option(0.5, "std of the logarithm of the Poisson rate; 0: plain Poisson", ge=0)
    min_decoder_steps: int = option(2, "minimum number of decoder steps in training", gt=0)
    max_decoder_steps: int = option(12, "maximum number of decoder steps in training", gt=0)
    n_backprop_steps: int = option(4, "last decoder steps that are backpropagated; earlier ones build no graph", gt=0)

    SECTION_LOSSES: ClassVar = Section("Losses")
    # Losses on the images of the backpropagated steps before the last one. The last image has all other losses.
    intermediate_weight: float = option(
        0.1,
        "weight of the mean absolute error of intermediate images",
        ge=0,
        only_with=("n_backprop_steps", above_one),
    )
    distillation_weight: float = option(
        0.1,
        "weight of the distance of intermediate images to the last one",
        ge=0,
        only_with=("n_backprop_steps", above_one),
    )

    def validate_decoder_steps(self):
        if not self.min_decoder_steps <= self.mean_decoder_steps <= self.max_decoder_steps:
            raise ValueError(
                f"--mean_decoder_steps={self.mean_decoder_steps} must lie between "
                f"--min_decoder_steps={self.min_decoder_steps} and --max_decoder_steps={self.max_decoder_steps}"
            )
        if self.n_backprop_steps > self.max_decoder_steps:
            raise ValueError(
                f"--n_backprop_steps={self.n_backprop_steps} must be <= --max_decoder_steps={self.max_decoder_steps}"
            )
