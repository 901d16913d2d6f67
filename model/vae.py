"""Variational autoencoder: what every VAE of this repository shares.  B batch, C channels, Y X rows and columns,
Z latent channels, y x latent rows and columns (Y and X divided by the compression).

The posterior is a diagonal Gaussian, N(mean, exp(logvar)), kept in fp32 under autocast. The model samples nothing: the
noise of the reparametrisation is an argument, so a step is a function of its inputs. Latents are standardised with
per-channel statistics that are measured once on the training set and stored with the weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from model.layers import init_layer

LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion, arXiv 2112.10752


@dataclass
class VAEOutput(ModelOutput):
    """What `VAE.forward` returns.

    Args:
        reconstruction: (B, C, Y, X) fp32, nominally in [-1, 1], not clamped.
        mean: posterior mean, (B, Z, y, x) fp32.
        logvar: logarithm of the posterior variance, (B, Z, y, x) fp32 in [-30, 20].
    """

    reconstruction: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None


class ChannelNoise(NamedTuple):
    """Noise beyond the posterior's, relative to the spread of each channel.

    Attributes:
        share: of the channel's std, (B,).
        mean, std: of the channels of sampled latents, (Z,).
    """

    share: Tensor
    mean: Tensor
    std: Tensor

    def std_of(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """The std to add to that of posteriors (B, Z, ...), of the same shape: `share` times the channel's std.

        It has the gradient of a std that moves with these latents: d(square) / (2 std), of their squared distance from
        the channel's mean. Without it latents would grow, as if that lessened the noise.
        """
        center, std = (values.view(-1, *[1] * (mean.ndim - 2)) for values in (self.mean, self.std))
        square = (mean - center).square() + logvar.exp()
        moving = std + (square - square.detach()) / (2 * std)
        return self.share.view(-1, *[1] * (mean.ndim - 1)) * moving


def reparametrize(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, channel_noise: ChannelNoise | None = None
) -> Tensor:
    """Samples of posteriors (arXiv 1312.6114, section 2.4), (B, Z, ...).

    Args:
        mean, logvar: (B, Z, ...).
        noise: standard normal, of the same shape; None: the mean.
        channel_noise: raises the std of the noise.
    """
    if noise is None:
        return mean
    std = torch.exp(0.5 * logvar)
    if channel_noise is not None:
        std = std + channel_noise.std_of(mean, logvar)
    return mean + std * noise


class VAE(PreTrainedModel):
    """Abstract VAE: a subclass builds `self.encoder` (image -> (B, 2Z, y, x)) and `self.decoder` (latents -> image).

    The configuration needs `latent_channels`, `compression` and `image_size`.
    """

    main_input_name = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config):
        super().__init__(config)
        # Statistics of `normalize_latents`; until they are measured, latents stay as they are.
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def forward(
        self, image: Tensor, noise: Tensor | None = None, *, channel_noise: ChannelNoise | None = None
    ) -> VAEOutput:
        """Encode, add `noise` in units of the posterior's std, decode.

        Args:
            image: (B, C, Y, X) in [-1, 1]; Y and X divisible by the compression.
            noise: (B, Z, y, x) standard normal, or None to decode the posterior mean.
            channel_noise: raises the std of the noise.
        """
        mean, logvar = self.encode(image)
        latents = reparametrize(mean, logvar, noise, channel_noise)
        return VAEOutput(reconstruction=self.decode(latents), mean=mean, logvar=logvar)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of an image.

        Args:
            image: (B, C, Y, X) in [-1, 1].
        Returns:
            mean and logvar, each (B, Z, y, x) fp32.
        Raises:
            ValueError: Y or X is not divisible by the compression.
        """
        Y, X = image.shape[-2:]
        if Y % self.config.compression or X % self.config.compression:
            raise ValueError(
                f"an image of {Y}x{X} pixels cannot be encoded: both sides must be divisible by the "
                f"compression {self.config.compression}; crop, pad or resize it"
            )
        # (B, 2Z, y, x) -> two of (B, Z, y, x).
        mean, logvar = self.encoder(image).float().chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latents: Tensor) -> Tensor:
        """The image of a latent.

        Args:
            latents: (B, Z, y, x), in the units of `encode` (not standardised).
        Returns:
            (B, C, Y, X) fp32, nominally in [-1, 1].
        Raises:
            ValueError: the number of channels is not Z.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} cannot be decoded: "
                f"expected (B, {self.config.latent_channels}, y, x) for latent_channels={self.config.latent_channels}"
            )
        return self.decoder(latents).float()

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """(B, Z, ...) as encoded -> zero mean and unit std per channel over the training set."""
        shape = (-1, *[1] * (latents.ndim - 2))  # (Z, 1, 1) for images
        return (latents - self.latent_mean.view(shape)) / self.latent_std.view(shape)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize_latents`: (B, Z, ...) standardised -> as `decode` takes it."""
        shape = (-1, *[1] * (latents.ndim - 2))
        return latents * self.latent_std.view(shape) + self.latent_mean.view(shape)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the per-channel statistics of the latents.

        Args:
            mean, std: (Z,), std positive.
        Raises:
            ValueError: wrong shape, a non-finite value, or a std that is not positive.
        """
        for name, value in (("mean", mean), ("std", std)):
            if tuple(value.shape) != (self.config.latent_channels,):
                raise ValueError(
                    f"latent {name} has shape {tuple(value.shape)}, expected ({self.config.latent_channels},)"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"latent {name} is not finite: {value.tolist()}")
        if (std <= 0).any():
            raise ValueError(f"latent std must be positive, got {std.tolist()}")
        # In place: they stay buffers, of the same type and device.
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def latent_shape(self, image_size: int, width: int | None = None) -> tuple[int, int, int]:
        """(Z, y, x) of an image of `image_size` rows and `width` columns in pixels, a square without `width`;
        ValueError where a side is not divisible by the compression."""
        compression = self.config.compression
        for side in (image_size, width or image_size):
            if side % compression:
                raise ValueError(f"image_size={side} is not divisible by the compression {compression}")
        return self.config.latent_channels, image_size // compression, (width or image_size) // compression

    def _init_weights(self, module: nn.Module) -> None:
        """Called once per module by `post_init`, and for what a checkpoint lacks.

        usual layers              see `init_layer`
        latent statistics         mean 0, std 1
        """
        init_layer(module)
        if isinstance(module, VAE):
            initialization.zeros_(module.latent_mean)
            initialization.ones_(module.latent_std)
