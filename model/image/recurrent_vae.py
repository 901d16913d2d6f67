"""Recurrent image VAE: encode once, decode in any number of steps.  B batch, Y X rows and columns, P patch side,
Z latent channels, D width of the decoder, K decoder steps, C = 3 P^2 values of a patch of the canvas.

The decoder is one small network applied K times with the same weights. Each step sees the latents, its own state and
the picture of the step before (the canvas), and predicts an update of the picture:

    state_k, update_k = step(k, state_{k-1}, canvas_{k-1}, latents);   canvas_k = canvas_{k-1} + update_k

- canvas_0 is the linear path of the image VAE, state_0 is zero, and the update starts at zero: an untrained model is the
  cosine code at every depth;
- the canvas stays unfolded to patches, (B, C, Y/P, X/P), the layout of the network: no step shuffles pixels;
- the step number enters as powers k^-c = exp(-c log k): smooth in log k, and nearly constant at depths beyond those
  that were trained, where the step is one fixed map that training has drawn towards its fixed point;
- in training all steps but the last few run without a graph, so that memory does not grow with the depth (truncated
  backpropagation, as in arXiv 2502.05171); the linear path and the latents enter at every step, so that every parameter
  has a gradient whatever the depth.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from model.image.vae import ChannelNorm, PatchCode, PosteriorHead, ResidualBlock, ResidualEncoder
from model.presets import RECURRENT_VAE
from model.vae import LOGVAR_RANGE, VAE, VAEOutput, ZeroConv2d
from utils.configuration import StrictConfig, from_preset, option


class RecurrentVAEConfig(StrictConfig):
    """Configuration of `RecurrentVAE`. Lists run from the finest stage to the coarsest."""

    model_type = "recurrent_vae"

    image_size: int = option(
        256, "side of the training pictures in pixels; any multiple of the compression works", gt=0
    )
    latent_channels: int = option(16, "latent channels Z", gt=0)
    patch_size: int = option(4, "side of the encoder's pixel-unshuffle, in pixels", gt=0)

    encoder_widths: list[int] = option([64, 128], "channels of the encoder's stages", gt=0)
    n_encoder_blocks: list[int] = option([1, 1], "residual blocks of the encoder's stages", ge=0)
    n_posterior_refinements: int = option(
        0, "corrections of the posterior by what its reconstruction misses; 0: the encoder alone", ge=0
    )

    canvas_patch_size: int = option(4, "side P of a patch of the decoder's canvas, in pixels", gt=0)
    decoder_width: int = option(64, "channels D of the decoder's state", gt=0)
    n_decoder_blocks: int = option(2, "residual blocks of the decoder's step", gt=0)
    n_steps: int = option(8, "decoder steps K where no number is given", gt=0)

    @property
    def compression(self) -> int:
        """Picture side over latent side: the patch and a factor 2 between stages of the encoder."""
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
        intermediates: (N, B, 3, Y, X) fp32, the pictures of the steps with a graph before the last one; N may be 0.
    """

    intermediates: Tensor | None = None


class StepEmbedding(nn.Module):
    """Scale and shift of the state at step k, from k^-c for six rates c between 1/4 and 8; start at 0."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Conv2d(6, width, 1)
        self.out = ZeroConv2d(width, 2 * width, 1)

    def forward(self, log_step: Tensor) -> tuple[Tensor, Tensor]:
        """() fp32, log k -> scale and shift, each (1, D, 1, 1)."""
        with torch.autocast(log_step.device.type, enabled=False):
            rates = 2.0 ** torch.arange(-2, 4, device=log_step.device)
            features = torch.exp(-rates * log_step).view(1, -1, 1, 1)
            scale, shift = self.out(F.silu(self.hidden(features))).chunk(2, dim=1)
        return scale, shift


class DecoderStep(nn.Module):
    """One step of the decoder: residual blocks on state, latents and canvas; the same weights at every step."""

    def __init__(self, config: RecurrentVAEConfig):
        super().__init__()
        width, n_values = config.decoder_width, 3 * config.canvas_patch_size**2
        self.embedding = StepEmbedding(width)
        self.norm_in = ChannelNorm(width)
        self.canvas_in = nn.Conv2d(n_values, width, 1)
        import os
        self.miss = bool(int(os.environ.get("MISS", "0")))
        if self.miss:
            self.code = PatchCode(config.compression, config.latent_channels, inverse=False)
            self.missing_in = nn.Conv2d(config.latent_channels, width * (config.compression // config.canvas_patch_size) ** 2, 1)
            self.P, self.U = config.canvas_patch_size, config.compression // config.canvas_patch_size
        self.blocks = nn.ModuleList([ResidualBlock(width) for _ in range(config.n_decoder_blocks)])
        self.norm_out = ChannelNorm(width)
        self.head = ZeroConv2d(width, n_values, 1)

    def forward(self, log_step: Tensor, state: Tensor, canvas: Tensor, latents: Tensor, raw=None) -> tuple[Tensor, Tensor]:
        """State and update of step k.

        Args:
            log_step: (), log k.
            state: (B, D, Y/P, X/P).
            canvas: (B, C, Y/P, X/P), the picture so far.
            latents: (B, D, Y/P, X/P), as `RecurrentDecoder.latents_in` embeds them.
        Returns:
            new state, and the update of the canvas in fp32.
        """
        scale, shift = self.embedding(log_step)
        x = self.norm_in(state) * (1 + scale) + shift + latents + self.canvas_in(canvas)
        if self.miss:
            missing = raw - self.code(F.pixel_shuffle(canvas, self.P))
            x = x + F.pixel_shuffle(self.missing_in(missing), self.U)
        for block in self.blocks:
            x = block(x)
        return x, self.head(F.silu(self.norm_out(x))).float()


@dataclass
class DecoderState:
    """Where a decoding stands: what does not change (base, latents), what does (state, change); all (B, ., Y/P, X/P).

    Args:
        base: the linear path's picture, C channels, fp32.
        latents: embedded latents, D channels.
        state: D channels.
        change: sum of the updates so far, C channels, fp32.
    """

    base: Tensor
    latents: Tensor
    state: Tensor
    change: Tensor

    def select(self, rows: Tensor) -> "DecoderState":
        """The samples with these indices."""
        return DecoderState(self.base[rows], self.latents[rows], self.state[rows], self.change[rows])


class RecurrentDecoder(nn.Module):
    """Latents (B, Z, y, x) -> pictures (B, 3, Y, X), step by step."""

    def __init__(self, config: RecurrentVAEConfig):
        super().__init__()
        self.patch_size = config.canvas_patch_size
        self.upscale = config.compression // config.canvas_patch_size
        self.width = config.decoder_width
        self.code = PatchCode(config.compression, config.latent_channels, inverse=True)
        self.latents_in = nn.Conv2d(config.latent_channels, config.decoder_width * self.upscale**2, 1)
        self.step = DecoderStep(config)

    def begin(self, latents: Tensor) -> DecoderState:
        """The state before the first step."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        self.raw = latents
        base = F.pixel_unshuffle(self.code(latents), self.patch_size)
        base = base.contiguous(memory_format=torch.channels_last)
        embedded = F.pixel_shuffle(self.latents_in(latents), self.upscale)
        embedded = embedded.contiguous(memory_format=torch.channels_last)
        return DecoderState(base, embedded, torch.zeros_like(embedded), torch.zeros_like(base))

    def advance(self, now: DecoderState, k: int) -> tuple[DecoderState, Tensor]:
        """Step k, counted from 1; the state after it and the update of the canvas."""
        log_step = torch.full((), float(k), device=now.base.device).log()
        state, update = self.step(log_step, now.state, now.base + now.change, now.latents, self.raw)
        import os
        mode = os.environ.get("MODE", "add")
        if mode == "recycle":
            update = update - now.change
        elif mode == "average":
            update = (update - now.change) / k
        elif mode == "decay":
            update = update / k**0.5
        elif mode == "half":
            update = (update - now.change) * (1.0 if k == 1 else 0.5)
        return DecoderState(now.base, now.latents, state, now.change + update), update

    def picture(self, now: DecoderState) -> Tensor:
        """(B, 3, Y, X) fp32."""
        return F.pixel_shuffle(now.base + now.change, self.patch_size)

    # The loops are not traced: `torch.compile` makes one graph of a step, whatever the number of steps.
    @torch.compiler.disable(recursive=False)
    def forward(self, latents: Tensor, n_steps: int, n_backprop_steps: int) -> list[Tensor]:
        """Pictures of the last `n_backprop_steps` steps, which alone have a graph, the deepest last."""
        now = self.begin(latents)
        n_prefix = max(0, n_steps - n_backprop_steps)
        with torch.no_grad():
            for k in range(1, n_prefix + 1):
                now, _ = self.advance(now, k)
        # Weights that autocast has cast without a graph must not serve the steps that need one.
        torch.clear_autocast_cache()
        pictures = []
        for k in range(n_prefix + 1, n_steps + 1):
            now, _ = self.advance(now, k)
            pictures.append(self.picture(now))
        return pictures

    @torch.compiler.disable(recursive=False)
    def pictures_at(self, latents: Tensor, steps: list[int]) -> list[Tensor]:
        """Pictures after each of these numbers of steps, in the order given; 0 is the linear path alone."""
        now, found = self.begin(latents), {}
        for k in range(max(steps) + 1):
            if k > 0:
                now, _ = self.advance(now, k)
            if k in steps:
                found[k] = self.picture(now)
        return [found[k] for k in steps]

    @torch.compiler.disable(recursive=False)
    def until_settled(self, latents: Tensor, n_steps: int, threshold: float) -> tuple[Tensor, Tensor]:
        """Decode each sample until a step changes its picture by less than `threshold` (root mean square).

        Samples that have settled leave the batch. Returns pictures (B, 3, Y, X) and steps taken (B,) int64.
        """
        now = self.begin(latents)
        pictures = torch.empty_like(self.picture(now))
        n_taken = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        rows = torch.arange(len(latents), device=latents.device)
        for k in range(1, n_steps + 1):
            now, update = self.advance(now, k)
            settled = update.square().flatten(1).mean(1).sqrt() < threshold
            if k == n_steps:
                settled = torch.ones_like(settled)
            pictures[rows[settled]] = self.picture(now.select(settled))
            n_taken[rows[settled]] = k
            rows, now = rows[~settled], now.select(~settled)
            if not len(rows):
                break
        return pictures, n_taken


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
        """error: picture minus reconstruction, (B, 3, Y, X); posterior: mean and logvar, (B, 2Z, y, x), as is the
        correction returned, in fp32."""
        error = F.pixel_unshuffle(error, self.compression).contiguous(memory_format=torch.channels_last)
        x = self.block(self.error_in(error) + self.posterior_in(posterior))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.norm(x.float())))


class RecurrentVAE(VAE):
    """Image VAE with a decoder that refines its picture step by step; pictures are (B, 3, Y, X) fp32 in [-1, 1]."""

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
        n_steps: int | None = None,
        n_backprop_steps: int | None = None,
    ) -> RecurrentVAEOutput:
        """Encode, add `noise` in units of the posterior's standard deviation, decode.

        Args:
            image: (B, 3, Y, X) in [-1, 1]; Y and X divisible by the compression.
            noise: (B, Z, y, x) standard normal, or None to decode the posterior mean.
            n_steps: decoder steps; None: those of the configuration.
            n_backprop_steps: the last steps, which alone have a graph and whose pictures are returned; None: all.
        Raises:
            ValueError: fewer than one step.
        """
        n_steps = self.config.n_steps if n_steps is None else n_steps
        n_backprop_steps = n_steps if n_backprop_steps is None else n_backprop_steps
        check_steps(n_steps=n_steps, n_backprop_steps=n_backprop_steps)
        mean, logvar = self.encode(image)
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        *before, last = self.decoder(latents, n_steps, n_backprop_steps)
        intermediates = torch.stack(before) if before else last.new_zeros((0, *last.shape))
        return RecurrentVAEOutput(reconstruction=last, mean=mean, logvar=logvar, intermediates=intermediates)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of a picture, corrected `n_posterior_refinements` times; as `VAE.encode`."""
        mean, logvar = super().encode(image)
        for _ in range(self.config.n_posterior_refinements):
            with torch.no_grad():
                error = image - self.decode(mean, n_steps=self.REFINEMENT_STEPS)
            torch.clear_autocast_cache()
            d_mean, d_logvar = self.refiner(error, torch.cat([mean, logvar], dim=1)).chunk(2, dim=1)
            mean, logvar = mean + d_mean, (logvar + d_logvar).clamp(*LOGVAR_RANGE)
        return mean, logvar

    def decode(self, latents: Tensor, n_steps: int | None = None, exit_threshold: float | None = None) -> Tensor:
        """The picture of a latent.

        Args:
            latents: (B, Z, y, x), in the units of `encode` (not standardised).
            n_steps: decoder steps, the most of them with a threshold; None: those of the configuration.
            exit_threshold: each sample stops after the step that changes its picture by less than this (root mean
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
        """Pictures (B, 3, Y, X) after each of these numbers of steps, from one pass of the deepest; as `decode`."""
        self.check_latents(latents)
        for number in steps:
            check_steps(n_steps=number)
        return self.decoder.pictures_at(latents, steps)

    def decode_until_settled(
        self, latents: Tensor, exit_threshold: float, n_steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, Y, X) and the steps that each sample took, (B,) int64; arguments as for `decode`."""
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
        """As `VAE._init_weights`, and the image VAE's linear path, posterior head and norms as there.

        ZeroConv2d of step embedding, update and correction: 0, so that a new model is the cosine code at every depth.
        """
        super()._init_weights(module)
        match module:
            case ChannelNorm():
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
