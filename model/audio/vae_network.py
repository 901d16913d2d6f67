"""Networks of the audio VAE: encoder, decoder and the head that reads characters.  B batch, L latent frames, m latent
rows (conv2d only), D width, Z latent channels, E width of a speaker's embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.frame_conv import FrameConv
from model.checkpointing import GradientCheckpointingLayer
from model.layers import ZeroLinear
from model.text.tokenizer import VOCABULARY
from model.vae import LOGVAR_RANGE


class PositionConv(nn.Conv2d):
    """A `Conv2d` on tensors with the channels last, (B, m, L, D) -> (B, m, L, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, m, L, in channels) -> (B, m, L, out channels)."""
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Block(GradientCheckpointingLayer):
    """x + linear(gelu(linear(norm(depthwise convolution(x))))), the last layer starting at zero.

    Args:
        n_axes: 1: positions are latent frames; 2: latent rows and frames.
    """

    EXPANSION = 2

    def __init__(self, config, n_axes: int):
        super().__init__()
        D, kernel = config.width, config.kernel_size
        convolution = FrameConv if n_axes == 1 else PositionConv
        self.conv = convolution(D, D, kernel, padding=kernel // 2, groups=D)
        self.norm = nn.LayerNorm(D)
        self.speaker = ZeroLinear(config.speaker_width, 2 * D) if config.n_speakers else None
        self.linear = nn.Linear(D, self.EXPANSION * D)
        self.out = ZeroLinear(self.EXPANSION * D, D)

    def forward(self, x: Tensor, mask: Tensor, speaker: Tensor | None) -> Tensor:
        """(B, [m,] L, D) -> the same shape; mask is (B, [1,] L, 1), speaker (B, [1,] 1, E)."""
        # Padding is zero to the convolution, as what lies beyond the ends.
        h = self.norm(self.conv(x * mask))
        if self.speaker is not None:
            # The speaker scales and shifts the normalised states, by 1 and 0 at the start.
            scale, shift = self.speaker(speaker).chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        # Two linear layers on every position.
        return x + self.out(F.gelu(self.linear(h)))


class PatchCode(nn.Linear):
    """The linear path of one direction, patches <-> latents: starts as a cosine transform until data are there."""

    SCALE = 4.0  # Normalised mel values per latent unit.

    def forward(self, x: Tensor) -> Tensor:
        """(..., patch_size) -> (..., Z), or back, in fp32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())

    def initial_weight(self) -> Tensor:
        """The lowest cosine patterns (DCT-II) over the SCALE, or their transpose times it."""
        # Orthonormal rows, one per pattern, (patterns, values of a patch).
        n_values, n_patterns = max(self.weight.shape), min(self.weight.shape)
        position = (torch.arange(n_values, dtype=torch.float64) + 0.5) * torch.pi / n_values
        patterns = torch.cos(torch.arange(n_patterns, dtype=torch.float64)[:, None] * position)
        patterns = (patterns / patterns.norm(dim=1, keepdim=True)).float()
        # The weight of a linear layer is (out, in).
        is_inverse = self.out_features == n_values
        return patterns.T * self.SCALE if is_inverse else patterns / self.SCALE


class PosteriorHead(ZeroLinear):
    """Linear layer to mean and logvar of the posterior; starts at mean 0 and logvar -5."""

    LOGVAR = -5.0  # a std of 0.08


MAX_VALUES = 1 << 23  # Hidden values of a pass without gradients, 32 MiB in fp32: an hour takes no more memory.


class Network(nn.Module):
    """Stem, blocks, norm: what encoder and decoder share.

    Attributes: context: latent frames on either side that an output depends on.
    """

    def __init__(self, config, in_width: int, n_blocks: int):
        super().__init__()
        self.stem = nn.Linear(in_width, config.width)
        n_axes = 1 if config.architecture == "conv1d" else 2  # latent frames, or rows and frames
        self.blocks = nn.ModuleList(Block(config, n_axes) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(config.width)
        self.context = n_blocks * (config.kernel_size // 2)

    def hidden(self, x: Tensor, mask: Tensor, speaker: Tensor | None) -> Tensor:
        """(B, [m,] L, in_width) -> (B, [m,] L, D)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask, speaker)
        return F.gelu(self.norm(x.float()))  # norm in fp32

    def in_windows(self, x: Tensor, mask: Tensor, speaker: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs of `forward`, a single one as a tuple. Those of long inputs come from several passes, each with
        the context of its latent frames, and are the same but for rounding. Training has one pass, and so have weights
        that ZeRO-3 shards: processes with other numbers of passes would wait for each other forever.

        Args: as of `forward`.
        """
        n_frames, per_frame = x.shape[-2], Block.EXPANSION * self.stem.out_features * x[..., 0, 0].numel()
        size = max(MAX_VALUES // per_frame, self.context, 1)
        is_sharded = hasattr(self.stem.weight, "ds_id")
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_sharded or n_frames <= size:
            size = n_frames
        passes = []
        for start in range(0, n_frames, size):
            first, stop = max(start - self.context, 0), min(start + size, n_frames)
            window = slice(first, stop + self.context)
            outputs = self(x[..., window, :], mask[..., window, :], speaker)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            passes.append(tuple(output[..., start - first : stop - first, :] for output in outputs))
        return passes[0] if len(passes) == 1 else tuple(torch.cat(pieces, -2) for pieces in zip(*passes))


class Encoder(Network):
    """Patches of a normalised mel -> posterior parameters."""

    def __init__(self, config):
        super().__init__(config, config.patch_size, config.n_encoder_blocks)
        self.code = PatchCode(config.patch_size, config.latent_channels)
        self.head = PosteriorHead(config.width, 2 * config.latent_channels)

    def forward(self, patches: Tensor, mask: Tensor, speaker: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, [m,] L, patch_size) -> mean and logvar, each (B, [m,] L, Z) fp32."""
        x = self.hidden(patches, mask, speaker)
        # In fp32 also under autocast: rounding would exceed a small std.
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = self.head(x).chunk(2, dim=-1)
        # The network corrects the mean of the linear path; logvar is its own.
        return mean + self.code(patches), logvar.clamp(*LOGVAR_RANGE)


class Decoder(Network):
    """Latents -> patches of a normalised mel."""

    def __init__(self, config):
        super().__init__(config, config.latent_channels, config.n_decoder_blocks)
        self.code = PatchCode(config.latent_channels, config.patch_size)
        self.head = ZeroLinear(config.width, config.patch_size)

    def forward(self, latents: Tensor, mask: Tensor, speaker: Tensor | None) -> Tensor:
        """(B, [m,] L, Z) -> (B, [m,] L, patch_size) fp32."""
        # The network's correction, 0 at the start, plus the linear path.
        return self.head(self.hidden(latents, mask, speaker)).float() + self.code(latents)


class CharacterHead(nn.Sequential):
    """Characters of latent frames, for CTC (Graves et al. 2006): byte tokens, where the token of padding is the
    blank."""

    def __init__(self, config):
        n_values = config.latent_channels * config.n_rows  # of one latent frame
        super().__init__(nn.Linear(n_values, config.width), nn.GELU(), nn.Linear(config.width, VOCABULARY))
