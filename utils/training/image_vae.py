"""The image VAE-GAN: data, losses, adversary, trainer and logged images, most of which the recurrent VAE
shares.  B batch, C channels, Y X rows and columns, Z latent channels."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import batches_of, collate_by_shape, collate_stack
from dataset_loading.image.pixels import ImageDataset
from model.criteria import ReconstructionLoss, kl_divergence
from model.image.augmentation import diff_augment
from model.image.discriminators import build_discriminator
from model.image.feature_extractors import build_perceptual
from model.vae import VAEOutput
from utils.drawing.images import TRIPLE, Group, channel_images, draw_sheet, to_image, triple
from utils.metrics.images import psnr
from utils.metrics.latents import LatentHealth
from utils.training.adversary import Adversary
from utils.training.arguments.image_vae import ImageVAEGANArguments
from utils.training.budget_batches import bucket_dataloader, count_bucket_steps
from utils.training.callbacks import EvaluationCallback
from utils.training.gan import Generation, VAEGANTrainer
from utils.training.latent_statistics import image_moments
from utils.training.planning.phases import check_perceptual_start
from utils.training.stage import Stage


class ImageVAEGANStage(Stage):
    """A stage that trains a VAE-GAN on images; subclasses state name, configuration, model, presets and trainer."""

    arguments_class = ImageVAEGANArguments

    def build_dataset(self, split, config):
        dataset = ImageDataset(self.cache_dir, split).expect(image_size=config.image_size)
        return dataset.expect_multiples(config.compression, "the model's compression")

    def build_collator(self, config):
        return functools.partial(collate_by_shape, collate=collate_stack, name="image")

    def count_steps(self, dataset, n_ranks):
        if dataset.buckets:
            return count_bucket_steps(dataset, self.args, n_ranks)
        return super().count_steps(dataset, n_ranks)

    def build_trainer_parts(self, model):
        args = self.args
        # The perceptual network is loaded only where its distance has a weight.
        perceptual = build_perceptual(args.perceptual) if args.perceptual_weight > 0 else None
        criterion = ReconstructionLoss(
            l1_weight=args.l1_weight,
            gradient_weight=args.gradient_weight,
            perceptual_weight=args.perceptual_weight,
            perceptual=perceptual,
        )
        return {"criterion": criterion, "adversary": self.build_adversary()}

    def build_callbacks(self, trainer, writer):
        return [ImageReconstructionCallback(trainer, writer, n_images=self.args.n_logged_samples)]

    def build_adversary(self):
        """The discriminator with what trains it; None where its weight is 0."""
        args = self.args
        if args.gan_weight == 0:
            return None
        discriminator = build_discriminator(
            args.discriminator,
            args.discriminator_channels,
            args.discriminator_layers,
            use_spectral_norm=args.use_spectral_norm,
        )
        augment = functools.partial(diff_augment, policy=args.diff_augment) if args.diff_augment else None
        return Adversary(discriminator, args, augment)


def kl_per_value(output: VAEOutput, target: Tensor) -> Tensor:
    """KL divergence of the posterior in nats per input value, a scalar."""
    return kl_divergence(output.mean, output.logvar).mean() / target[0].numel()


class ImageVAEGANTrainer(VAEGANTrainer):
    """Trains a VAE on images x (B, C, Y, X), reconstructed as x_hat.

        loss = l1_weight * |x_hat - x| + gradient_weight * |difference of their gradients|
             + perceptual_weight * perceptual(x_hat, x)                             from perceptual_start_step on
             + kl_weight * KL / (C Y X)
             + gan_weight(step) * adaptive_factor * (adversarial + feature_matching_weight * feature_matching)

    The KL divergence is in nats per sample, summed over the latent: over C Y X it is in nats per input value, like the
    reconstruction terms, which are means over input values. `VAEGANTrainer` says which latents are decoded.
    """

    # Loss terms in addition to those of the reconstruction, (output, target) -> scalar, None where there is nothing to
    # measure; the weight of each is the flag `<name>_weight`.
    TERMS: ClassVar[dict[str, Callable[..., Tensor | None]]] = {"kl": kl_per_value}

    def get_train_dataloader(self):
        """Batches of images of one size, where the cache has several."""
        return bucket_dataloader(self) or super().get_train_dataloader()

    def generate(self, model, inputs):
        image = inputs["image"]
        # Noise (B, Z, y, x) of the posteriors, which belongs to (seed, step, sample).
        noise = self.sample_noise(inputs, "posterior", self.model.latent_shape(*image.shape[-2:]))
        output = model(image=image, noise=noise, channel_noise=self.channel_noise(inputs), **self.decoder_options())
        if self.running_latents is not None:
            self.running_latents.add(image_moments(output.mean, output.logvar))
        # Weighted terms of the latents, and those that a subclass adds.
        terms = {name: term(output, image) for name, term in self.TERMS.items()}
        terms = self.weighted({name: term for name, term in terms.items() if term is not None})
        return Generation(output.reconstruction, image, terms)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        check_perceptual_start(self.stage_arguments, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def sample_terms(self, leaf, generation):
        has_started = self.state.global_step >= self.stage_arguments.perceptual_start_step
        return self.criterion(leaf, generation.target, with_perceptual=has_started)

    def decoder_options(self) -> dict[str, Any]:
        """Further keywords of the model's forward in this optimizer step."""
        return {}

    def evaluation_terms(self, model, inputs):
        image = inputs["image"]
        output = model(image=image)
        reconstruction = output.reconstruction.float().clamp(-1, 1)
        # Terms per sample, (B,), of images decoded from posterior means.
        terms = {
            "l1": (reconstruction - image).abs().flatten(1).mean(1),
            "psnr": psnr(reconstruction, image),
            "kl": kl_divergence(output.mean, output.logvar) / image[0].numel(),
        }
        if self.criterion.perceptual is not None:
            terms["perceptual"] = self.criterion.perceptual(reconstruction, image)
        # The loss has no perceptual and no adversarial term.
        return {**terms, "loss": terms["l1"] + self.stage_arguments.kl_weight * terms["kl"]}

    def latent_moments(self, model, inputs):
        output = model(image=inputs["image"])
        return image_moments(output.mean, output.logvar)


class ImageReconstructionCallback(EvaluationCallback):
    """Logs reconstructions of the same validation images.

    images/reconstruction       input | reconstruction | difference, with the PSNR
    images/latent_channels      posterior means, one row per image, one column per channel
    latents/mean_<channel>        histogram of the posterior means
    latents/posterior_std         histogram of the posterior's standard deviations
    latents/dead_channels         channels that carry almost no information on these images

    Args:
        n_images: spread evenly over the validation set.
    """

    max_latent_rows = 4

    def __init__(self, trainer, writer, *, n_images: int):
        super().__init__(trainer, writer)
        self.n_images = n_images

    @functools.cached_property
    def images(self) -> list[Tensor]:
        """The images in batches of one size each, (B, C, Y, X)."""
        dataset = self.trainer.eval_dataset
        samples = [dataset[index] for index in evenly_spaced(len(dataset), self.n_images)]
        return [batch["image"] for batch in batches_of(collate_by_shape(samples, collate_stack, "image"))]

    def compute(self, model):
        outputs = [model(image=images.to(self.trainer.args.device)) for images in self.images]
        # For each size images (B, C, Y, X), means and log-variances (B, Z, y, x).
        return [
            tuple(tensor.float().cpu() for tensor in (output.reconstruction, output.mean, output.logvar))
            for output in outputs
        ]

    def write(self, content, step):
        # Inputs, reconstructions and differences.
        groups, rows, health = [], [], LatentHealth()
        for images, (reconstruction, mean, logvar) in zip(self.images, content):
            values = psnr(reconstruction, images).tolist()
            groups += [Group(triple(*pair), f"{value:.1f} dB") for *pair, value in zip(reconstruction, images, values)]
            rows += [Group([to_image(channel) for channel in row]) for row in channel_images(mean)]
            health.update(mean, logvar)
        self.add_image("reconstruction", draw_sheet(groups, TRIPLE, n_across=2), step)

        # Posteriors: means as images, their histograms by channel, and channels that carry nothing.
        n_channels = content[0][1].shape[1]
        numbers = [str(channel) for channel in range(n_channels)]
        self.add_image("latent_channels", draw_sheet(rows[: self.max_latent_rows], numbers, min_cell=64), step)
        for channel in range(n_channels):
            values = torch.cat([mean[:, channel].flatten() for _, mean, _ in content])
            self.writer.add_histogram(f"latents/mean_{channel:02d}", values, step)
        stds = torch.cat([(0.5 * logvar).exp().flatten() for *_, logvar in content])
        self.writer.add_histogram("latents/posterior_std", stds, step)
        self.writer.add_scalar("latents/dead_channels", sum(health.compute()["dead"]), step)
