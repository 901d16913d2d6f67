"""The decoder of Matcha-TTS (arXiv 2309.03199) with random weights: the peer of our flow's network.  B batch, C
channels, F mel frames, M mel bins, D width.

Layers and sizes as in section 3 of the paper and in its code: a 1-D UNet of two levels down, two blocks in the middle
and two levels up; each block is a ResNet block with group norm and Mish, and a transformer block of 2 heads of 64
channels with a snake-beta feed-forward network of 4 times the width. Frames are reduced once, by 2. It sees noisy
log-mels beside the means that the text predicts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_GROUPS, N_HEADS, HEAD_WIDTH, EXPANSION, DROPOUT = 8, 2, 64, 4, 0.05


class ConvolutionBlock(nn.Module):
    """Convolution of 3 frames, group norm, Mish; (B, C, F) -> (B, D, F)."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(in_width, width, 3, padding=1), nn.GroupNorm(N_GROUPS, width), nn.Mish())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layers(x * mask) * mask


class ResNetBlock(nn.Module):
    """Two convolutions with the time between them, and a linear shortcut; (B, C, F) -> (B, D, F)."""

    def __init__(self, in_width: int, width: int, time_width: int):
        super().__init__()
        self.first, self.second = ConvolutionBlock(in_width, width), ConvolutionBlock(width, width)
        self.time = nn.Sequential(nn.Mish(), nn.Linear(time_width, width))
        self.shortcut = nn.Conv1d(in_width, width, 1)

    def forward(self, x: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        h = self.first(x, mask) + self.time(time)[..., None]
        return self.second(h, mask) + self.shortcut(x * mask)


class SnakeBeta(nn.Module):
    """linear(x) + sin(alpha linear(x))^2 / beta, alpha and beta per channel and logarithmic."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear = nn.Linear(in_width, width)
        self.alpha, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x + torch.sin(x * self.alpha.exp()).square() / (self.beta.exp() + 1e-9)


class TransformerBlock(nn.Module):
    """Self-attention over valid frames and a feed-forward network, each after a layer norm; (B, F, D)."""

    def __init__(self, width: int):
        super().__init__()
        inner = N_HEADS * HEAD_WIDTH
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(DROPOUT))
        hidden = EXPANSION * width
        self.feed_forward = nn.Sequential(SnakeBeta(width, hidden), nn.Dropout(DROPOUT), nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask (B, F) bool."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (N_HEADS, HEAD_WIDTH)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm(x))


class Stage(nn.Module):
    """A ResNet block, a transformer block, and what changes the number of frames or not."""

    def __init__(self, in_width: int, width: int, time_width: int, resampling: nn.Module | None = None):
        super().__init__()
        self.resnet, self.transformer = ResNetBlock(in_width, width, time_width), TransformerBlock(width)
        self.resampling = resampling

    def forward(self, x: Tensor, mask: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, F), mask (B, 1, F) -> (B, D, F) before and after the resampling."""
        x = self.resnet(x, mask.to(x.dtype), time)
        x = self.transformer(x.transpose(1, 2), mask[:, 0]).transpose(1, 2)
        return x, x if self.resampling is None else self.resampling(x * mask)


class MatchaDecoder(nn.Module):
    """The network of the flow.

    Args:
        width: 256 as published.
        n_mels: M.
    """

    def __init__(self, width: int = 256, n_mels: int = 80):
        super().__init__()
        self.in_width, time_width = 2 * n_mels, 4 * width
        self.time = nn.Sequential(nn.Linear(2 * n_mels, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.down = nn.ModuleList(
            [
                Stage(2 * n_mels, width, time_width, nn.Conv1d(width, width, 3, stride=2, padding=1)),
                Stage(width, width, time_width, nn.Conv1d(width, width, 3, padding=1)),
            ]
        )
        self.middle = nn.ModuleList(Stage(width, width, time_width) for _ in range(2))
        self.up = nn.ModuleList(
            [
                Stage(2 * width, width, time_width, nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)),
                Stage(2 * width, width, time_width, nn.Conv1d(width, width, 3, padding=1)),
            ]
        )
        self.last = ConvolutionBlock(width, width)
        self.out = nn.Conv1d(width, n_mels, 1)

    def forward(self, x: Tensor, mean: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """x, mean (B, M, F), F even; mask (B, 1, F) bool; time (B,) in [0, 1] -> (B, M, F)."""
        # Sines and cosines of 1000 t, then a network.
        half = self.in_width // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        angles = 1000 * time[:, None] * frequencies
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        # Down: full rate, then half of it; the middle; up again with skips.
        x, skips, masks = torch.cat([x, mean], dim=1), [], [mask, mask[..., ::2]]
        for stage, frames in zip(self.down, masks):
            skip, x = stage(x, frames, embedding)
            skips.append(skip)
        for stage in self.middle:
            x, _ = stage(x, masks[1], embedding)
        for stage, frames in zip(self.up, reversed(masks)):
            _, x = stage(torch.cat([x, skips.pop()], dim=1), frames, embedding)
        return self.out(self.last(x, mask) * mask) * mask
