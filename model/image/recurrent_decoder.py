"""The decoder of the recurrent image VAE: one small network applied K times with the same weights.  B batch, Y X rows
and columns, P patch side, Z latent channels, D width, K steps, C = 3 P^2 values of a patch of the canvas.

Each step sees the latents, its own state and
the image of the step before (the canvas), and corrects the image:

    missing_k = latents - code(canvas_{k-1})
    s, c      = step(k, state_{k-1}, canvas_{k-1}, latents, missing_k)
    state_k, correction_k = (1 - a_k) (state_{k-1}, correction_{k-1}) + a_k (s, c),   a_k = min(1, 3.5 / k)
    canvas_k  = base + correction_k

- the base is the linear path of the image VAE, state and correction start at zero, and so does the last layer of the
  step: an untrained model is the cosine code at every depth. A correction is computed anew at each step and not summed
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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpointing import GradientCheckpointingLayer
from model.image.vae import PatchCode, cosine_patterns


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero.

    It is not `model.layers.ZeroLinear`, because it takes random numbers before it is zeroed: with that class all
    layers initialised after it would start from other weights for the same seed.
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
        # (Z, 3, f, f) cut into n x n patches: (Z, n, n, 3, P, P), a patch's values last.
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

    def __init__(self, config):
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
        # The state, scaled and shifted for step k, plus latents, what they miss, and canvas; (B, Y/P, X/P, D).
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

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.canvas_patch_size
        self.width = config.decoder_width
        self.code = PatchCode(config.compression, config.latent_channels, inverse=True)
        self.step = DecoderStep(config)

    def begin(self, latents: Tensor) -> DecoderState:
        """The state before the first step."""
        # The image of the linear path as patches, (B, Y/P, X/P, C); zeros for state and correction.
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
        # The averaged iteration, with full steps in training.
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
        # Steps without a graph, which keep nothing for the backward pass.
        now = self.begin(latents)
        n_prefix = max(0, n_steps - n_backprop_steps)
        with torch.no_grad():
            for k in range(1, n_prefix + 1):
                now, _ = self.advance(now, k)
        # Weights that autocast has cast without a graph must not serve the steps that need one.
        torch.clear_autocast_cache()
        # The last steps, with a graph; the images of all but the last are intermediates.
        images = []
        for k in range(n_prefix + 1, n_steps + 1):
            now, _ = self.advance(now, k)
            images.append(self.image(now))
        *before, last = images
        return last, torch.stack(before) if before else last.new_zeros((0, *last.shape))

    @torch.compiler.disable(recursive=False)
    def images_at(self, latents: Tensor, steps: list[int]) -> list[Tensor]:
        """Images after each of these numbers of steps, in the order given; 0 is the linear path alone."""
        now, images = self.begin(latents), {}
        for k in range(max(steps) + 1):
            if k > 0:
                now, _ = self.advance(now, k)
            if k in steps:
                images[k] = self.image(now)
        return [images[k] for k in steps]

    @torch.compiler.disable(recursive=False)
    def until_settled(self, latents: Tensor, n_steps: int, threshold: float) -> tuple[Tensor, Tensor]:
        """Decode each sample until a step changes its image by less than `threshold` (root mean square).

        Samples that have settled leave the batch. Returns images (B, 3, Y, X) and steps taken (B,) int64.
        """
        # Results of the whole batch; `rows` are the samples that are still being decoded.
        now = self.begin(latents)
        images = torch.empty_like(self.image(now))
        n_taken = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        rows = torch.arange(len(latents), device=latents.device)
        for k in range(1, n_steps + 1):
            now, update = self.advance(now, k)
            # Root mean square of the change; the last step settles all samples.
            settled = update.square().flatten(1).mean(1).sqrt() < threshold
            if k == n_steps:
                settled = torch.ones_like(settled)
            # Settled samples get their results and leave the batch.
            images[rows[settled]] = self.image(now.select(settled))
            n_taken[rows[settled]] = k
            rows, now = rows[~settled], now.select(~settled)
            if not len(rows):
                break
        return images, n_taken
