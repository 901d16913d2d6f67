"""The image VAE-GAN: flags, data, losses, adversary, trainer and logged images, most of which the recurrent VAE
shares."""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from dataset_loading.cached import spread
from dataset_loading.image.pixels import ImageDataset
from model.criteria import ReconstructionLoss, kl_divergence
from model.image.augmentation import diff_augment
from model.image.discriminators import build_discriminator
from model.image.feature_extractors import build_perceptual
from utils.distributed import mean_across_ranks, rank, world_size
from utils.drawing.images import TRIPLE, Group, channel_images, draw_sheet, to_image, triple
from utils.megatransformer_utils import StageArguments
from utils.metrics.images import psnr
from utils.metrics.latents import LatentHealth
from utils.options import option
from utils.training.adversary import Adversary, AdversaryArguments, adversary_needs
from utils.training.gan import GANTrainer
from utils.training.stage import Stage


@dataclasses.dataclass
class ImageAutoencoderArguments(AdversaryArguments, StageArguments):
    """Flags of every stage that trains a VAE on images."""

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
        1024, "training images that latent means and deviations are measured on", gt=0
    )
    n_logged_samples: int = option(8, "validation images in TensorBoard", gt=0)

    needs = adversary_needs(
        "discriminator", "discriminator_channels", "discriminator_layers", "use_spectral_norm", "diff_augment"
    )


class ImageAutoencoderStage(Stage):
    """A stage that trains a VAE on images; subclasses state name, configuration, model, presets and trainer."""

    arguments_class = ImageAutoencoderArguments

    def build_dataset(self, split, config):
        return ImageDataset(self.cache_dir, split).expect(image_size=config.image_size)

    def build_trainer_parts(self, model):
        args = self.args
        perceptual = build_perceptual(args.perceptual) if args.perceptual_weight > 0 else None
        criterion = ReconstructionLoss(args.l1_weight, args.gradient_weight, args.perceptual_weight, perceptual)
        return {"criterion": criterion, "adversary": self.build_adversary()}

    def build_callbacks(self, writer):
        return [ReconstructionImages(writer, self.args.n_logged_samples)]

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


class ImageVAEGANTrainer(GANTrainer):
    """Trains a VAE on images: reconstruction and perceptual terms, KL, and an adversary.

    The KL term is `kl_weight` x (nats per sample, summed over the latent) / (number of input values C Y X): nats per
    input value, beside reconstruction terms that are means over input values.
    """

    def generate(self, model, inputs):
        image = inputs["image"]
        noise = self.sample_noise(inputs, "posterior", self.model.latent_shape(image.shape[-1]))
        output = model(image=image, noise=noise)
        return output.reconstruction, image, output

    def other_terms(self, output, real):
        kl = kl_divergence(output.mean, output.logvar).mean() / real[0].numel()
        return {"kl": self.stage_arguments.kl_weight * kl}

    def evaluation_terms(self, model, inputs):
        image = inputs["image"]
        output = model(image=image)
        reconstruction = output.reconstruction.float().clamp(-1, 1)
        terms = {
            "l1": (reconstruction - image).abs().flatten(1).mean(1),
            "psnr": psnr(reconstruction, image),
            "kl": kl_divergence(output.mean, output.logvar) / image[0].numel(),
        }
        if self.criterion.perceptual is not None:
            terms["perceptual"] = self.criterion.perceptual(reconstruction, image)
        return {**terms, "loss": terms["l1"] + self.stage_arguments.kl_weight * terms["kl"]}

    @torch.no_grad()
    def before_saving(self):
        """Measure the latents' mean and standard deviation per channel on the training set, for the next stage."""
        model = self.evaluation_model()
        n_samples = min(self.stage_arguments.latent_statistics_samples, len(self.train_dataset))
        moments = torch.zeros(3, self.model.config.latent_channels, dtype=torch.float64, device=self.args.device)
        batch_size = self.args.per_device_eval_batch_size
        for start in range(0, n_samples, batch_size * world_size()):
            # Every process runs the same number of forwards; beyond the end it counts nothing.
            first = start + rank() * batch_size
            # Spread over the whole set, whose order often goes by kind.
            indices = [
                i * len(self.train_dataset) // n_samples for i in range(first, min(first + batch_size, n_samples))
            ]
            samples = [self.train_dataset[i] for i in indices] or [self.train_dataset[0]]
            inputs = self._prepare_inputs(self.data_collator(samples))
            output = model(image=inputs["image"])
            mean, variance = output.mean.double(), output.logvar.double().exp()
            if len(indices):
                moments += torch.stack(
                    [part.mean((2, 3)).sum(0) for part in (mean, mean.square() + variance, mean * 0 + 1)]
                )
        total = mean_across_ranks(moments)
        mean = total[0] / total[2]
        std = (total[1] / total[2] - mean.square()).clamp_min(1e-12).sqrt()
        self.model.set_latent_statistics(mean.float(), std.float())


class ReconstructionImages(TrainerCallback):
    """Before the first step and after each evaluation: what the VAE makes of the same validation images.

    images/reconstruction       input | reconstruction | difference, with the PSNR
    images/latent_channels      posterior means, one row per image, one column per channel
    latents/mean_<channel>        histogram of the posterior means
    latents/posterior_std         histogram of the posterior's standard deviations
    latents/dead_channels         channels that carry next to nothing on these images

    Every process runs the model, as sharded weights need; only the one with a writer writes.

    Args:
        writer: None except on rank 0.
        n_images: spread evenly over the validation set.
    """

    trainer: Any
    max_latent_rows = 4

    def __init__(self, writer: SummaryWriter | None, n_images: int):
        self.writer, self.n_images = writer, n_images
        self.image: Tensor | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    @torch.no_grad()
    def show(self, device: torch.device, step: int) -> None:
        """Run the model on every process, write on one."""
        if self.image is None:
            dataset = self.trainer.eval_dataset
            indices = spread(len(dataset), self.n_images)
            self.image = torch.stack([dataset[index]["image"] for index in indices])
        output = self.trainer.evaluation_model()(image=self.image.to(device))
        if self.writer is None:
            return
        reconstruction, mean, logvar = (
            each.float().cpu() for each in (output.reconstruction, output.mean, output.logvar)
        )
        values = psnr(reconstruction, self.image).tolist()
        groups = [Group(triple(*pair), f"{value:.1f} dB") for *pair, value in zip(reconstruction, self.image, values)]
        sheet = draw_sheet(groups, TRIPLE, n_across=2)
        self.writer.add_image("images/reconstruction", np.asarray(sheet), step, dataformats="HWC")
        rows = [Group([to_image(channel) for channel in row]) for row in channel_images(mean)[: self.max_latent_rows]]
        numbers = [str(channel) for channel in range(mean.shape[1])]
        sheet = draw_sheet(rows, numbers, min_cell=64)
        self.writer.add_image("images/latent_channels", np.asarray(sheet), step, dataformats="HWC")
        for channel in range(mean.shape[1]):
            self.writer.add_histogram(f"latents/mean_{channel:02d}", mean[:, channel], step)
        self.writer.add_histogram("latents/posterior_std", (0.5 * logvar).exp(), step)
        health = LatentHealth()
        health.update(mean, logvar)
        self.writer.add_scalar("latents/dead_channels", sum(health.compute()["dead"]), step)
        self.writer.flush()
