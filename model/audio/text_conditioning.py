"""Text of speech to one conditioning vector per latent frame.  B batch, T tokens, E width of the text, F mel frames,
c mel frames of a latent frame (the compression), L latent frames, D width of the frames.

- The duration of every token in mel frames is known in training (from an aligner) and predicted in sampling. Tokens
  are repeated at the mel rate, then the c mel frames of a latent frame stand side by side: boundaries are as exact as
  the mel's although latents are coarser.
- The duration predictor reads detached states, as in Glow-TTS (arXiv 2005.11129, section 3.2).
- Padding changes nothing: it is zero before every convolution, as what lies beyond the ends.
- `keys` (B,) are those of `model.dropout`, one use for every block of a part; None: PyTorch's dropout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.frame_conv import FrameConv
from model.audio.lengths import valid_frames
from model.checkpointing import GradientCheckpointingLayer
from model.dropout import Dropout, fold
from model.layers import ZeroLinear, widen

N_STRESSES = 3  # none, secondary, primary
N_EDGES = 4  # within a word, first of a word, last, both
N_PLACE_FEATURES = 4  # numbers that place a mel frame within its token, see `expand_tokens`
CLAMP_FRAMES = 8  # mel frames; distances from a token's ends beyond it look the same
DURATION_BETA = 0.2  # where the smooth L1 loss of log-durations turns from a parabola into a line


@dataclass
class SpeechText:
    """Tokens, encoded once.

    Args:
        states: (B, T, E).
        mask: (B, T) bool, True where there is a token.
        log_durations: predicted log(1 + mel frames), (B, T) fp32.
        is_pause: tokens that may last no frame, (B, T) bool.
        speaker: embedding of each clip's speaker, (B, E), or None.
    """

    states: Tensor
    mask: Tensor
    log_durations: Tensor
    is_pause: Tensor
    speaker: Tensor | None


class ConvBlock(GradientCheckpointingLayer):
    """x + linear(dropout(silu(convolution(norm(x))))), the last layer starting at zero."""

    def __init__(self, width: int, kernel_size: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = FrameConv(width, width, kernel_size, padding=kernel_size // 2)
        self.dropout = Dropout(dropout)
        self.out = ZeroLinear(width, width)

    def forward(self, x: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """x (B, L, D), mask (B, L, 1), keys (B,) -> (B, L, D)."""
        return x + self.out(self.dropout(F.silu(self.conv(self.norm(x) * mask)), keys))


class TokenEncoder(nn.Module):
    """Tokens to states that know their neighbours.

    Args:
        n_symbols: rows of the table of symbols.
        n_languages: 0 for a model of one language.
    """

    def __init__(
        self, n_symbols: int, width: int, *, n_blocks: int, kernel_size: int, dropout: float, n_languages: int = 0
    ):
        super().__init__()
        # A token is the sum of what it is, how it is stressed, and where it stands in its word.
        self.symbols = nn.Embedding(n_symbols, width)
        self.stresses = nn.Embedding(N_STRESSES, width)
        self.edges = nn.Embedding(N_EDGES, width)
        self.languages = nn.Embedding(n_languages, width) if n_languages else None
        self.blocks = nn.ModuleList(ConvBlock(width, kernel_size, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, mask: Tensor, languages: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T, 3): symbol, stress, edge; mask (B, T) bool; languages (B,) -> (B, T, E), 0 in padding."""
        tokens = tokens.long() * mask[..., None]  # What stands in padding may be no token.
        symbols, stresses, edges = tokens.unbind(-1)
        x = self.symbols(symbols) + self.stresses(stresses) + self.edges(edges)
        if self.languages is not None:
            x = x + self.languages(languages)[:, None]
        for number, block in enumerate(self.blocks):
            x = block(x, mask[..., None], fold(keys, number))
        return self.norm(x) * mask[..., None]


class DurationPredictor(nn.Module):
    """States of tokens (B, T, E), which get no gradient, to log(1 + mel frames) of each, (B, T) fp32."""

    def __init__(self, width: int, *, n_blocks: int, kernel_size: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(width, kernel_size, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)

    def forward(self, states: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        x = states.detach()
        for number, block in enumerate(self.blocks):
            x = block(x, mask[..., None], fold(keys, number))
        # In fp32 also under autocast: the loss is a few hundredths.
        with torch.autocast(x.device.type, enabled=False):
            return self.out(self.norm(x.float()))[..., 0] * mask


class FrameTrunk(nn.Module):
    """Expanded tokens (B, L, c (E + 4)) to conditioning vectors (B, L, D) of about unit size, 0 in padding."""

    def __init__(self, in_width: int, width: int, *, n_blocks: int, kernel_size: int, dropout: float):
        super().__init__()
        self.stem = nn.Linear(in_width, width)
        self.blocks = nn.ModuleList(ConvBlock(width, kernel_size, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """mask (B, L) bool."""
        x = self.stem(rows)
        for number, block in enumerate(self.blocks):
            x = block(x, mask[..., None], fold(keys, number))
        return self.norm(x) * mask[..., None]


def expand_tokens(states: Tensor, durations: Tensor, *, n_latents: int, compression: int) -> Tensor:
    """The state of the token that speaks in each mel frame, and the frame's place in it.

    Place, 4 numbers: position within the token in (0, 1); mel frames from its first and to its last frame, at most 8,
    divided by 8; log(duration) / 3.

    Args:
        states: (B, T, E).
        durations: mel frames of each token, (B, T) integers, 0 in padding.
        n_latents: L of the result, which holds L c mel frames; what lies beyond a clip's total is 0.
        compression: c.
    Returns: (B, L, c (E + 4)), the c mel frames of a latent frame side by side.
    """
    B, T = durations.shape
    durations = durations.long()
    ends = durations.cumsum(1)  # (B, T): the mel frame after each token
    frames = torch.arange(n_latents * compression, device=durations.device)
    # The first token that ends after the frame, (B, F); tokens of 0 frames are passed over.
    index = torch.searchsorted(ends, frames.expand(B, -1).contiguous(), right=True).clamp_max(T - 1)
    valid = frames < ends[:, -1:]
    length = durations.gather(1, index).clamp_min(1)
    offset = frames - (ends - durations).gather(1, index)  # mel frames from the token's first one
    # Place within the token, (B, F, 4).
    remaining = length - 1 - offset
    place = torch.stack(
        [
            (offset + 0.5) / length,
            offset.clamp_max(CLAMP_FRAMES) / CLAMP_FRAMES,
            remaining.clamp_max(CLAMP_FRAMES) / CLAMP_FRAMES,
            length.float().log() / 3,
        ],
        dim=-1,
    )
    repeated = states[torch.arange(B, device=index.device)[:, None], index]  # (B, F, E)
    rows = torch.cat([repeated, place.to(states.dtype)], dim=-1).where(valid[..., None], 0.0)
    return rows.unflatten(1, (n_latents, compression)).flatten(2)


def duration_errors(log_durations: Tensor, durations: Tensor, n_tokens: Tensor) -> Tensor:
    """Smooth L1 loss (beta 0.2) of log(1 + mel frames), summed over each clip's tokens.

    Args:
        log_durations: predictions, (B, T).
        durations: mel frames, (B, T).
        n_tokens: (B,).
    Returns: (B,) fp32.
    """
    target = torch.log1p(durations.float().clamp_min(0))
    errors = F.smooth_l1_loss(log_durations.float(), target, reduction="none", beta=DURATION_BETA)
    return errors.where(valid_frames(n_tokens, durations.shape[1]), 0.0).sum(1)


def whole_durations(expected: Tensor, is_pause: Tensor, mask: Tensor) -> Tensor:
    """Whole mel frames of real-valued durations: ends of tokens are rounded, not durations, so that a clip's total is
    right within half a frame.

    Args:
        expected: mel frames, (B, T).
        is_pause: tokens that may have no frame, (B, T) bool; the others get at least one.
        mask: (B, T) bool, True where there is a token.
    Returns: (B, T) int64, 0 in padding.
    """
    # fp64 where the device has it: a long text's ends are sums of many numbers. With at least 1 between two ends they
    # round to different ones.
    lowest = widen(torch.where(is_pause, 0.0, 1.0))
    ends = torch.maximum(widen(expected), lowest).where(mask, 0.0).cumsum(1)
    rounded = (ends + 0.5).floor().long()
    return rounded.diff(dim=1, prepend=torch.zeros_like(rounded[:, :1]))
