"""Flags of stages that train against a discriminator."""

import dataclasses
from typing import ClassVar

from utils.flags.choices import AdversarialKind
from utils.megatransformer_utils import StageArguments
from utils.options import Section, option

WITH_ADVERSARY = ("gan_weight", bool)  # Condition of all flags that shape or train a discriminator, see `option`.


@dataclasses.dataclass
class AdversaryArguments:
    """Flags of a stage that trains against a discriminator."""

    SECTION_GAN: ClassVar = Section("GAN")
    gan_weight: float = option(0.1, "weight of the adversarial loss; 0: no discriminator", ge=0)
    gan_loss: AdversarialKind = option("hinge", "adversarial objective", only_with=WITH_ADVERSARY)
    gan_start_step: int = option(
        5000, "optimizer step at which the discriminator starts to train", ge=0, only_with=WITH_ADVERSARY
    )
    gan_warmup_steps: int = option(
        200, "steps during which the discriminator trains alone", ge=0, only_with=WITH_ADVERSARY
    )
    gan_ramp_steps: int = option(
        1000, "steps over which the generator's adversarial weight rises from 0", ge=0, only_with=WITH_ADVERSARY
    )
    use_adaptive_gan_weight: bool = option(
        True,
        "scale the adversarial gradient to the norm of the reconstruction's at the output",
        only_with=WITH_ADVERSARY,
    )
    feature_matching_weight: float = option(
        0.0, "weight of feature matching, relative to the adversarial loss", ge=0, only_with=WITH_ADVERSARY
    )
    discriminator_every: int = option(
        1,
        "optimizer steps per discriminator update; the generator is updated at all of them",
        gt=0,
        only_with=WITH_ADVERSARY,
    )
    discriminator_learning_rate: float = option(
        1e-4, "peak learning rate of the discriminator", gt=0, only_with=WITH_ADVERSARY
    )
    discriminator_beta1: float = option(
        0.5, "decay of AdamW's first moment for the discriminator", ge=0, lt=1, only_with=WITH_ADVERSARY
    )
    r1_weight: float = option(0.0, "weight of the R1 gradient penalty; 0: none", ge=0, only_with=WITH_ADVERSARY)
    r1_every: int = option(16, "discriminator updates between R1 penalties", gt=0, only_with=WITH_ADVERSARY)
    lecam_weight: float = option(0.0, "weight of the LeCAM penalty; 0: none", ge=0, only_with=WITH_ADVERSARY)


@dataclasses.dataclass
class VAEGANArguments(AdversaryArguments, StageArguments):
    """Flags of every stage that trains a VAE-GAN."""

    SECTION_LOSSES: ClassVar = Section("Losses")
    latent_noise: float = option(
        0.0, "most noise that training adds to latents, in units of each channel's std; 0: none", ge=0
    )
