"""Recurrent image VAE: encode once, decode in any number of steps.  B batch, Y X rows and columns, Z latent channels,
K decoder steps.

The encoder is that of the image VAE, the decoder is one small network applied K times (`recurrent_decoder.py`). In
training all steps but the last few run without a graph, so that memory does not grow with the depth (truncated
backpropagation, as in arXiv 2502.05171).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from model.image.recurrent_decoder import CanvasCode, RecurrentDecoder, ZeroLinear
from model.image.vae import PatchCode, PosteriorHead, ResidualBlock, ResidualEncoder
from model.layers import ChannelNorm, ZeroConv2d
from model.presets import RECURRENT_VAE
from model.vae import LOGVAR_RANGE, VAE, ChannelNoise, VAEOutput, reparametrize
from utils.options import from_preset, option
from utils.strict_config import StrictConfig


class RecurrentVAEConfig(StrictConfig):
    """Configuration of `RecurrentVAE`. Lists run from the finest stage to the coarsest."""

    model_type = "recurrent_vae"

    # Images and latents.
    image_size: int = option(256, "side of the training images in pixels; any multiple of the compression works", gt=0)
    latent_channels: int = option(16, "latent channels Z", gt=0)
    patch_size: int = option(4, "side of the encoder's pixel-unshuffle, in pixels", gt=0)

    # Encoder.
    encoder_widths: list[int] = option([64, 128], "channels of the encoder's stages", gt=0)
    n_encoder_blocks: list[int] = option([1, 1], "residual blocks of the encoder's stages", ge=0)
    n_posterior_refinements: int = option(
        0, "corrections of the posterior by what its reconstruction misses; 0: the encoder alone", ge=0
    )

    # Decoder.
    canvas_patch_size: int = option(2, "side P of a patch of the decoder's canvas, in pixels", gt=0)
    decoder_width: int = option(32, "channels D of the decoder's state", gt=0)
    n_decoder_blocks: int = option(1, "residual blocks of the decoder's step", gt=0)
    n_steps: int = option(8, "decoder steps K where no number is given", gt=0)

    @property
    def compression(self) -> int:
        """Image side over latent side: the patch and a factor 2 between stages of the encoder."""
        return self.patch_size * 2 ** (len(self.encoder_widths) - 1)

    def validate_encoder(self):
        if len(self.n_encoder_blocks) != len(self.encoder_widths):
            raise ValueError(
                f"n_encoder_blocks={self.n_encoder_blocks} must have as many entries as "
                f"encoder_widths={self.encoder_widths}"
            )
        for fine, coarse in zip(self.encoder_widths, self.encoder_widths[1:]):
            if 4 * fine % coarse:
                raise ValueError(
                    f"encoder_widths={self.encoder_widths}: {coarse} must divide 4 * {fine}, so that the shortcut "
                    "between the stages averages whole channels"
                )

    def validate_sizes(self):
        if self.compression % self.canvas_patch_size:
            raise ValueError(
                f"canvas_patch_size={self.canvas_patch_size} must divide the compression {self.compression}"
            )
        if self.latent_channels > 3 * self.compression**2:
            raise ValueError(
                f"latent_channels={self.latent_channels} must be <= {3 * self.compression**2}, the values of a patch "
                f"of {self.compression}x{self.compression} pixels"
            )
        if self.image_size % self.compression:
            raise ValueError(f"image_size={self.image_size} must be divisible by the compression {self.compression}")


@dataclass
class RecurrentVAEOutput(VAEOutput):
    """What `RecurrentVAE.forward` returns beside the fields of `VAEOutput`.

    Args:
        intermediates: (N, B, 3, Y, X) fp32, the images of the steps with a graph before the last one; N may be 0.
    """

    intermediates: Tensor | None = None


class PosteriorRefiner(nn.Module):
    """One correction of the posterior from what its reconstruction misses (iterative amortised inference, arXiv
    1807.09356, with errors instead of gradients); the same weights at every correction, which start at zero."""

    def __init__(self, config: RecurrentVAEConfig):
        super().__init__()
        width = config.encoder_widths[-1]
        self.compression = config.compression
        self.error_in = nn.Conv2d(3 * config.compression**2, width, 1)
        self.posterior_in = nn.Conv2d(2 * config.latent_channels, width, 1)
        self.block = ResidualBlock(width)
        self.norm = ChannelNorm(width)
        self.head = ZeroConv2d(width, 2 * config.latent_channels, 1)

    def forward(self, error: Tensor, posterior: Tensor) -> Tensor:
        """error: image minus reconstruction, (B, 3, Y, X); posterior: mean and logvar, (B, 2Z, y, x), as is the
        correction returned, in fp32."""
        # The error at the latent resolution, (B, 3 f^2, y, x), beside the posterior.
        error = F.pixel_unshuffle(error, self.compression).contiguous(memory_format=torch.channels_last)
        x = self.block(self.error_in(error) + self.posterior_in(posterior))
        # The correction in fp32, as the posterior.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.norm(x.float())))


class RecurrentVAE(VAE):
    """Image VAE with a decoder that refines its image step by step; images are (B, 3, Y, X) fp32 in [-1, 1]."""

    config_class = RecurrentVAEConfig
    config: RecurrentVAEConfig
    decoder: RecurrentDecoder

    REFINEMENT_STEPS = 2  # Decoder steps after each correction of the posterior.

    def __init__(self, config: RecurrentVAEConfig):
        super().__init__(config)
        self.encoder = ResidualEncoder(config)
        self.decoder = RecurrentDecoder(config)
        if config.n_posterior_refinements:
            self.refiner = PosteriorRefiner(config)
        self.post_init()

    def forward(
        self,
        image: Tensor,
        noise: Tensor | None = None,
        *,
        channel_noise: ChannelNoise | None = None,
        n_steps: int | None = None,
        n_backprop_steps: int | None = None,
    ) -> RecurrentVAEOutput:
        """Encode, add `noise` in units of the posterior's std, decode.

        Args:
            image: (B, 3, Y, X) in [-1, 1]; Y and X divisible by the compression.
            noise: (B, Z, y, x) standard normal, or None to decode the posterior mean.
            channel_noise: raises the std of the noise.
            n_steps: decoder steps; None: those of the configuration.
            n_backprop_steps: the last steps, which alone have a graph and whose images are returned; None: all.
        Raises:
            ValueError: fewer than one step.
        """
        n_steps = self.config.n_steps if n_steps is None else n_steps
        n_backprop_steps = n_steps if n_backprop_steps is None else n_backprop_steps
        check_steps(n_steps=n_steps, n_backprop_steps=n_backprop_steps)
        # Posterior, reparametrised latents, and the images of the last steps.
        mean, logvar = self.encode(image)
        latents = reparametrize(mean, logvar, noise, channel_noise)
        reconstruction, intermediates = self.decoder(latents, n_steps, n_backprop_steps)
        return RecurrentVAEOutput(reconstruction=reconstruction, mean=mean, logvar=logvar, intermediates=intermediates)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of an image, corrected `n_posterior_refinements` times; as `VAE.encode`."""
        mean, logvar = super().encode(image)
        for _ in range(self.config.n_posterior_refinements):
            # What the reconstruction of the present mean misses, without a graph; then the refiner corrects by it.
            with torch.no_grad():
                error = image - self.decode(mean, n_steps=self.REFINEMENT_STEPS)
            # Weights that were cast without a graph must not serve the decoding that has one.
            torch.clear_autocast_cache()
            d_mean, d_logvar = self.refiner(error, torch.cat([mean, logvar], dim=1)).chunk(2, dim=1)
            mean, logvar = mean + d_mean, (logvar + d_logvar).clamp(*LOGVAR_RANGE)
        return mean, logvar

    def decode(self, latents: Tensor, n_steps: int | None = None, exit_threshold: float | None = None) -> Tensor:
        """The image of a latent.

        Args:
            latents: (B, Z, y, x), in the units of `encode` (not standardised).
            n_steps: decoder steps, their maximum with a threshold; None: those of the configuration.
            exit_threshold: each sample stops after the step that changes its image by less than this (root mean
                square over its values, which lie in [-1, 1]); None: no sample stops early.
        Returns:
            (B, 3, Y, X) fp32, nominally in [-1, 1].
        Raises:
            ValueError: the number of channels is not Z, fewer than one step, or a threshold that is not positive.
        """
        if exit_threshold is not None:
            return self.decode_until_settled(latents, exit_threshold, n_steps)[0]
        return self.decode_steps(latents, [self.config.n_steps if n_steps is None else n_steps])[0]

    def decode_steps(self, latents: Tensor, steps: list[int]) -> list[Tensor]:
        """Images (B, 3, Y, X) after each of these numbers of steps, from one pass of the deepest; as `decode`."""
        self.check_latents(latents)
        for number in steps:
            check_steps(n_steps=number)
        return self.decoder.images_at(latents, steps)

    def decode_until_settled(
        self, latents: Tensor, exit_threshold: float, n_steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, Y, X) and the steps that each sample took, (B,) int64; arguments as for `decode`."""
        self.check_latents(latents)
        n_steps = self.config.n_steps if n_steps is None else n_steps
        check_steps(n_steps=n_steps)
        if exit_threshold <= 0:
            raise ValueError(f"exit_threshold={exit_threshold} must be > 0; None lets no sample stop early")
        return self.decoder.until_settled(latents, n_steps, exit_threshold)

    def check_latents(self, latents: Tensor) -> None:
        """ValueError where the latents are not (B, Z, y, x)."""
        Z = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != Z:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} cannot be decoded: expected (B, {Z}, y, x) for "
                f"latent_channels={Z}"
            )

    def _init_weights(self, module: nn.Module) -> None:
        """As `VAE._init_weights`, and:

        ZeroLinear                weight 0, bias 0
        PatchCode, CanvasCode     truncated cosine transform, bias 0
        PosteriorHead             weight 0, bias 0 for the mean, -5 for logvar
        LayerNorm, ChannelNorm    weight 1, bias 0
        """
        super()._init_weights(module)
        match module:
            case ZeroLinear():
                initialization.zeros_(module.weight)
            case CanvasCode():
                initialization.copy_(module.weight, module.initial_weight())
            case nn.LayerNorm():  # ChannelNorm too.
                initialization.ones_(module.weight)
                initialization.zeros_(module.bias)
            case PatchCode():
                initialization.copy_(module.weight, module.initial_weight())
            case PosteriorHead():
                Z = module.out_channels // 2
                initialization.copy_(module.bias, torch.tensor([0.0] * Z + [module.LOGVAR] * Z))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "RecurrentVAE":
        """A model with fresh weights of a size in `presets.RECURRENT_VAE`; ValueError for an unknown name or field."""
        return cls(from_preset(RecurrentVAEConfig, RECURRENT_VAE, name, **overrides))


def check_steps(**numbers: int) -> None:
    """ValueError naming the argument where a number of decoder steps is not positive."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be >= 1: the decoder takes at least one step")
