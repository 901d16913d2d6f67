"""What the stages that train a VAE on pictures share: flags, data, losses, adversary, logged pictures."""

import dataclasses
import functools
from typing import Literal

from dataset_loading.image import ImageDataset
from model.criteria import ReconstructionLoss
from model.image.augmentation import diff_augment
from model.image.discriminators import build_discriminator
from model.image.feature_extractors import build_perceptual
from utils.adversary import Adversary, AdversaryArguments, adversary_needs
from utils.callbacks import ReconstructionPictures
from utils.configuration import option
from utils.megatransformer_utils import StageArguments
from utils.stage import Stage


@dataclasses.dataclass
class PictureVAEArguments(AdversaryArguments, StageArguments):
    """Flags of every stage that trains a VAE on pictures."""

    l1_weight: float = option(1.0, "weight of the mean absolute error", ge=0)
    gradient_weight: float = option(0.0, "weight of the multi-scale image gradient difference", ge=0)
    perceptual_weight: float = option(0.5, "weight of the perceptual distance; 0: no perceptual network", ge=0)
    perceptual: Literal["efficientnet", "lpips_vgg"] = option("efficientnet", "network of the perceptual distance")
    kl_weight: float = option(1e-6, "weight of the KL divergence in nats per input value", ge=0)
    discriminator: Literal["patch", "multi_scale"] = option("patch", "kind of discriminator")
    discriminator_channels: int = option(32, "channels of the discriminator's first layer", gt=0)
    discriminator_layers: int = option(3, "strided layers of each discriminator", gt=0)
    use_spectral_norm: bool = option(False, "spectral normalisation of the discriminator")
    diff_augment: list[Literal["color", "translation", "cutout"]] = option(
        [], "differentiable augmentations for the GAN"
    )
    latent_statistics_samples: int = option(
        1024, "training pictures that latent means and deviations are measured on", gt=0
    )
    n_logged_pictures: int = option(8, "validation pictures in TensorBoard", gt=0)

    needs = adversary_needs(
        "discriminator", "discriminator_channels", "discriminator_layers", "use_spectral_norm", "diff_augment"
    )


class PictureVAEStage(Stage):
    """A stage that trains a VAE on pictures; subclasses state name, configuration, model, presets and trainer."""

    arguments_class = PictureVAEArguments

    def build_dataset(self, split, config):
        return ImageDataset(self.cache_dir, split).expect(image_size=config.image_size)

    def build_trainer_parts(self, model):
        args = self.args
        perceptual = build_perceptual(args.perceptual) if args.perceptual_weight > 0 else None
        criterion = ReconstructionLoss(args.l1_weight, args.gradient_weight, args.perceptual_weight, perceptual)
        return {"criterion": criterion, "adversary": self.build_adversary()}

    def build_callbacks(self, writer):
        return [ReconstructionPictures(writer, self.args.n_logged_pictures)]

    def build_adversary(self):
        """The discriminator's side, or None where its weight is 0."""
        args = self.args
        if args.gan_weight == 0:
            return None
        discriminator = build_discriminator(
            args.discriminator, args.discriminator_channels, args.discriminator_layers, args.use_spectral_norm
        )
        augment = functools.partial(diff_augment, policy=args.diff_augment) if args.diff_augment else None
        return Adversary(discriminator, args, augment)
