"""Recurrent image VAE: encode once, decode in any number of steps.  B batch, Y X rows and columns, P patch side,
Z latent channels, D width of the decoder, K decoder steps, C = 3 P^2 values of a patch of the canvas.

The decoder is one small network applied K times with the same weights. Each step sees the latents, its own state and
the image of the step before (the canvas), and corrects the image:

    missing_k = latents - code(canvas_{k-1})
    s, c      = step(k, state_{k-1}, canvas_{k-1}, latents, missing_k)
    state_k, correction_k = (1 - a_k) (state_{k-1}, correction_{k-1}) + a_k (s, c),   a_k = min(1, 3.5 / k)
    canvas_k  = base + correction_k

- the base is the linear path of the image VAE, state and correction start at zero, and so does the last layer of the
  step: an untrained model is the cosine code at every depth. A correction is made anew at each step and not summed
  up: errors do not pile up;
- from step 4 on a step goes only part of the way (the averaged iteration of Krasnoselskii and Mann): doubling the
  depth adds as much as 2.4 full steps, so that the image stays good far beyond the depths that were trained.
  Training itself takes full steps, a_k = 1: a run that averaged there too, with other settings changed, was worse
  (`docs/experiments.md`);
- `missing` is what a linear code of the canvas lacks of the latents: each step sees how its last image is wrong;
- the canvas stays unfolded to patches with channels last, (B, Y/P, X/P, .): no step shuffles pixels, and all layers
  but the 3x3 convolution are linear layers on the last axis;
- the step number enters as powers k^-c = exp(-c log k): smooth in log k, and nearly constant at large k;
- in training all steps but the last few run without a graph, so that memory does not grow with the depth (truncated
  backpropagation, as in arXiv 2502.05171); the base and the latents enter at every step, so that every parameter has a
  gradient whatever the depth.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from model.checkpointing import GradientCheckpointingLayer
from model.image.vae import PatchCode, PosteriorHead, ResidualBlock, ResidualEncoder, cosine_patterns
from model.layers import ChannelNorm, ZeroConv2d
from model.presets import RECURRENT_VAE
from model.vae import LOGVAR_RANGE, VAE, VAEOutput
from utils.options import StrictConfig, from_preset, option


class RecurrentVAEConfig(StrictConfig):
    """Configuration of `RecurrentVAE`. Lists run from the finest stage to the coarsest."""

    model_type = "recurrent_vae"

    image_size: int = option(256, "side of the training images in pixels; any multiple of the compression works", gt=0)
    latent_channels: int = option(16, "latent channels Z", gt=0)
    patch_size: int = option(4, "side of the encoder's pixel-unshuffle, in pixels", gt=0)

    encoder_widths: list[int] = option([64, 128], "channels of the encoder's stages", gt=0)
    n_encoder_blocks: list[int] = option([1, 1], "residual blocks of the encoder's stages", ge=0)
    n_posterior_refinements: int = option(
        0, "corrections of the posterior by what its reconstruction misses; 0: the encoder alone", ge=0
    )

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


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero.

    It is not `model.layers.ZeroLinear`, since it takes random numbers before it is zeroed: with that class every layer
    after it would have other first weights for the same seed.
    """


class CanvasCode(nn.Linear):
    """Linear code of the canvas, f x f pixels -> Z values; starts as the cosine code that latents start as.

    Args:
        compression: f, in pixels.
        patch_size: P; the input holds the f/P x f/P patches of a block, row by row, C values each.
        latent_channels: Z.
    """

    def __init__(self, compression: int, patch_size: int, latent_channels: int):
        super().__init__(3 * compression**2, latent_channels)
        self.compression, self.patch_size = compression, patch_size

    def initial_weight(self) -> Tensor:
        """The weight it starts with: orthonormal patterns over `PatchCode.SCALE`."""
        P, n = self.patch_size, self.compression // self.patch_size
        patterns = cosine_patterns(self.compression, self.out_features).view(-1, 3, n, P, n, P)
        return patterns.permute(0, 2, 4, 1, 3, 5).flatten(1) / PatchCode.SCALE


class StepEmbedding(nn.Module):
    """Scale and shift of the state at step k, from k^-c for six rates c between 1/4 and 8; start at 0."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(6, width)
        self.out = ZeroLinear(width, 2 * width)

    def forward(self, log_step: Tensor) -> tuple[Tensor, Tensor]:
        """() fp32, log k -> scale and shift, each (D,) fp32."""
        with torch.autocast(log_step.device.type, enabled=False):
            rates = 2.0 ** torch.arange(-2, 4, device=log_step.device)
            scale, shift = self.out(F.silu(self.hidden(torch.exp(-rates * log_step)))).chunk(2)
        return scale, shift


class StepBlock(GradientCheckpointingLayer):
    """x + linear(silu(conv3x3(norm(x)))), the linear layer starting at zero, on (B, Y/P, X/P, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = ZeroLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y/P, X/P, D) -> the same shape."""
        hidden = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.out(F.silu(hidden))


class DecoderStep(nn.Module):
    """One step of the decoder: residual blocks on state, latents and canvas; the same weights at every step."""

    def __init__(self, config: RecurrentVAEConfig):
        super().__init__()
        P, width = config.canvas_patch_size, config.decoder_width
        self.upscale = config.compression // P
        self.embedding = StepEmbedding(width)
        self.code = CanvasCode(config.compression, P, config.latent_channels)
        self.latents_in = nn.Linear(2 * config.latent_channels, width * self.upscale**2)
        self.canvas_in = nn.Linear(3 * P**2, width)
        self.blocks = nn.ModuleList([StepBlock(width) for _ in range(config.n_decoder_blocks)])
        self.norm_out = nn.LayerNorm(width)
        self.head = ZeroLinear(width, 3 * P**2)

    def forward(self, state: Tensor, canvas: Tensor, latents: Tensor, *, log_step: Tensor) -> tuple[Tensor, Tensor]:
        """State and correction of step k.

        Args:
            state: (B, Y/P, X/P, D).
            canvas: (B, Y/P, X/P, C) fp32, the image of the step before.
            latents: (B, y, x, Z) fp32.
            log_step: (), log k.
        Returns:
            new state; the image minus that of the linear path, (B, Y/P, X/P, C) fp32.
        """
        # What the code of the canvas lacks of the latents; in fp32, for bf16 would round small differences away.
        with torch.autocast(canvas.device.type, enabled=False):
            missing = latents - self.code(pack(canvas, self.upscale))
        scale, shift = self.embedding(log_step)
        x = F.layer_norm(state.float(), state.shape[-1:], 1 + scale, shift)
        x = x + unpack(self.latents_in(torch.cat([latents, missing], dim=-1)), self.upscale) + self.canvas_in(canvas)
        for block in self.blocks:
            x = block(x)
        return x, self.head(F.silu(self.norm_out(x))).float()


def pack(x: Tensor, n: int) -> Tensor:
    """Blocks of n x n positions as channels: (B, n Y, n X, D) -> (B, Y, X, n n D), a block's rows first."""
    return x.unflatten(2, (-1, n)).unflatten(1, (-1, n)).transpose(2, 3).flatten(3)


def unpack(x: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: (B, Y, X, n n D) -> (B, n Y, n X, D)."""
    return x.unflatten(3, (n, n, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


@dataclass
class DecoderState:
    """Where a decoding stands.

    Args:
        latents: (B, y, x, Z) fp32; does not change.
        base: the linear path's image, (B, Y/P, X/P, C) fp32; does not change.
        state: (B, Y/P, X/P, D).
        correction: the image minus the base, (B, Y/P, X/P, C) fp32.
    """

    latents: Tensor
    base: Tensor
    state: Tensor
    correction: Tensor

    def select(self, rows: Tensor) -> "DecoderState":
        """The samples with these indices, or where this mask holds."""
        return DecoderState(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class RecurrentDecoder(nn.Module):
    """Latents (B, Z, y, x) -> images (B, 3, Y, X), step by step."""

    # Outside training step k moves state and image by the share min(1, FULL_STEPS / k) of what the network proposes.
    FULL_STEPS = 3.5

    def __init__(self, config: RecurrentVAEConfig):
        super().__init__()
        self.patch_size = config.canvas_patch_size
        self.width = config.decoder_width
        self.code = PatchCode(config.compression, config.latent_channels, inverse=True)
        self.step = DecoderStep(config)

    def begin(self, latents: Tensor) -> DecoderState:
        """The state before the first step."""
        base = F.pixel_unshuffle(self.code(latents), self.patch_size).permute(0, 2, 3, 1).contiguous()
        latents = latents.float().permute(0, 2, 3, 1).contiguous()
        state = base.new_zeros((*base.shape[:3], self.width))
        return DecoderState(latents=latents, base=base, state=state, correction=torch.zeros_like(base))

    # What counts the steps is not traced: `torch.compile` makes one graph of `DecoderStep`, whatever their number.
    @torch.compiler.disable(recursive=False)
    def advance(self, now: DecoderState, k: int) -> tuple[DecoderState, Tensor]:
        """Step k, counted from 1; the state after it and the update of the canvas, (B, Y/P, X/P, C)."""
        log_step = torch.full((), float(k), device=now.base.device).log()
        state, correction = self.step(now.state, now.base + now.correction, now.latents, log_step=log_step)
        share = 1.0 if self.training else min(1.0, self.FULL_STEPS / k)
        update = share * (correction - now.correction)
        state = now.state + share * (state - now.state)
        return replace(now, state=state, correction=now.correction + update), update

    def image(self, now: DecoderState) -> Tensor:
        """(B, 3, Y, X) fp32."""
        return F.pixel_shuffle((now.base + now.correction).permute(0, 3, 1, 2), self.patch_size)

    @torch.compiler.disable(recursive=False)
    def forward(self, latents: Tensor, n_steps: int, n_backprop_steps: int) -> tuple[Tensor, Tensor]:
        """The last image (B, 3, Y, X), and those of the steps before it (N, B, 3, Y, X), both of the last
        `n_backprop_steps` steps alone, which alone have a graph."""
        now = self.begin(latents)
        n_prefix = max(0, n_steps - n_backprop_steps)
        with torch.no_grad():
            for k in range(1, n_prefix + 1):
                now, _ = self.advance(now, k)
        # Weights that autocast has cast without a graph must not serve the steps that need one.
        torch.clear_autocast_cache()
        images = []
        for k in range(n_prefix + 1, n_steps + 1):
            now, _ = self.advance(now, k)
            images.append(self.image(now))
        *before, last = images
        return last, torch.stack(before) if before else last.new_zeros((0, *last.shape))

    @torch.compiler.disable(recursive=False)
    def images_at(self, latents: Tensor, steps: list[int]) -> list[Tensor]:
        """Images after each of these numbers of steps, in the order given; 0 is the linear path alone."""
        now, found = self.begin(latents), {}
        for k in range(max(steps) + 1):
            if k > 0:
                now, _ = self.advance(now, k)
            if k in steps:
                found[k] = self.image(now)
        return [found[k] for k in steps]

    @torch.compiler.disable(recursive=False)
    def until_settled(self, latents: Tensor, n_steps: int, threshold: float) -> tuple[Tensor, Tensor]:
        """Decode each sample until a step changes its image by less than `threshold` (root mean square).

        Samples that have settled leave the batch. Returns images (B, 3, Y, X) and steps taken (B,) int64.
        """
        now = self.begin(latents)
        images = torch.empty_like(self.image(now))
        n_taken = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        rows = torch.arange(len(latents), device=latents.device)
        for k in range(1, n_steps + 1):
            now, update = self.advance(now, k)
            settled = update.square().flatten(1).mean(1).sqrt() < threshold
            if k == n_steps:
                settled = torch.ones_like(settled)
            images[rows[settled]] = self.image(now.select(settled))
            n_taken[rows[settled]] = k
            rows, now = rows[~settled], now.select(~settled)
            if not len(rows):
                break
        return images, n_taken


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
        error = F.pixel_unshuffle(error, self.compression).contiguous(memory_format=torch.channels_last)
        x = self.block(self.error_in(error) + self.posterior_in(posterior))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.norm(x.float())))


class RecurrentVAE(VAE):
    """Image VAE with a decoder that refines its image step by step; images are (B, 3, Y, X) fp32 in [-1, 1]."""

    config_class = RecurrentVAEConfig
    config: RecurrentVAEConfig
    decoder: RecurrentDecoder

    REFINEMENT_STEPS = 2  # Decoder steps behind each correction of the posterior.

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
        n_steps: int | None = None,
        n_backprop_steps: int | None = None,
    ) -> RecurrentVAEOutput:
        """Encode, add `noise` in units of the posterior's standard deviation, decode.

        Args:
            image: (B, 3, Y, X) in [-1, 1]; Y and X divisible by the compression.
            noise: (B, Z, y, x) standard normal, or None to decode the posterior mean.
            n_steps: decoder steps; None: those of the configuration.
            n_backprop_steps: the last steps, which alone have a graph and whose images are returned; None: all.
        Raises:
            ValueError: fewer than one step.
        """
        n_steps = self.config.n_steps if n_steps is None else n_steps
        n_backprop_steps = n_steps if n_backprop_steps is None else n_backprop_steps
        check_steps(n_steps=n_steps, n_backprop_steps=n_backprop_steps)
        mean, logvar = self.encode(image)
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        reconstruction, intermediates = self.decoder(latents, n_steps, n_backprop_steps)
        return RecurrentVAEOutput(reconstruction=reconstruction, mean=mean, logvar=logvar, intermediates=intermediates)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of an image, corrected `n_posterior_refinements` times; as `VAE.encode`."""
        mean, logvar = super().encode(image)
        for _ in range(self.config.n_posterior_refinements):
            with torch.no_grad():
                error = image - self.decode(mean, n_steps=self.REFINEMENT_STEPS)
            torch.clear_autocast_cache()
            d_mean, d_logvar = self.refiner(error, torch.cat([mean, logvar], dim=1)).chunk(2, dim=1)
            mean, logvar = mean + d_mean, (logvar + d_logvar).clamp(*LOGVAR_RANGE)
        return mean, logvar

    def decode(self, latents: Tensor, n_steps: int | None = None, exit_threshold: float | None = None) -> Tensor:
        """The image of a latent.

        Args:
            latents: (B, Z, y, x), in the units of `encode` (not standardised).
            n_steps: decoder steps, the most of them with a threshold; None: those of the configuration.
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
