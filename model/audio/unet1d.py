"""UNet along time, for latents of audio.  B batch, L latent frames, D width of a level, Z latent channels, H heads,
K head width, T caption tokens, E width of the caption.

The blocks are those of `model/diffusion.py` with the channels last: a convolution of 3 frames and a linear layer after
an adaptive layer norm (arXiv 2212.09748, section 3.2), every residual branch and the output starting at zero. A level
halves the number of frames by putting pairs of frames side by side. Self-attention knows positions by rotation
(arXiv 2104.09864); queries and keys are normalised per head.

Padding changes nothing: it is zero before every convolution and pairing, and no key of attention. Time embedding,
scales and shifts, and the output are fp32 also under autocast.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.frame_conv import FrameConv
from model.checkpointing import GradientCheckpointingLayer
from model.diffusion import AdaptiveNorm, Attention, TextCondition, TimeEmbedding
from model.dropout import Dropout, fold
from model.layers import ZeroLinear
from model.positions import rotary_frequencies, rotary_table

KEYS_PER_PART = 64  # Uses of dropout keys that a level, or another part of the model, has to itself: one a block.


@dataclass
class AudioCondition:
    """What the UNet knows of its clips, computed once for all sampling steps.

    Args:
        mask: (B, L) bool, True in valid frames.
        frames: a vector per latent frame, (B, L, W), or None.
        vector: a vector per clip, (B, V) fp32, or None.
        text: captions, or None.
    """

    mask: Tensor
    frames: Tensor | None = None
    vector: Tensor | None = None
    text: TextCondition | None = None

    def __len__(self) -> int:
        return len(self.mask)

    def cat(self, other: "AudioCondition") -> "AudioCondition":
        """Both batches, of the same L, as one of B + B' clips."""

        def join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return None if first is None or second is None else torch.cat([first, second])

        text = None if self.text is None or other.text is None else self.text.cat(other.text)
        mask = torch.cat([self.mask, other.mask])
        return AudioCondition(mask, join(self.frames, other.frames), join(self.vector, other.vector), text)


class AdaptiveFrameNorm(AdaptiveNorm):
    """`AdaptiveNorm` with the channels last, (B, L, D) -> (B, L, D)."""

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        # An image of one row, (B, D, 1, L), whose channels lie last in memory: nothing is copied.
        return super().forward(x.transpose(1, 2).unsqueeze(2), conditioning).squeeze(2).transpose(1, 2)


class FrameBlock(GradientCheckpointingLayer):
    """x + linear(dropout(silu(convolution(norm(x))))), the norm adaptive and the last layer starting at zero."""

    def __init__(self, width: int, conditioning_width: int, *, kernel_size: int, dropout: float):
        super().__init__()
        self.norm = AdaptiveFrameNorm(width, conditioning_width)
        self.conv = FrameConv(width, width, kernel_size, padding=kernel_size // 2)
        self.dropout = Dropout(dropout)
        self.out = ZeroLinear(width, width)

    def forward(self, x: Tensor, conditioning: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """x (B, L, D), conditioning (B, conditioning_width) fp32, mask (B, L, 1), keys (B,) -> (B, L, D)."""
        return x + self.out(self.dropout(F.silu(self.conv(self.norm(x, conditioning) * mask)), keys))


class FrameAttentionBlock(GradientCheckpointingLayer):
    """Self-attention over valid frames, then attention to the caption, if the model knows captions."""

    def __init__(self, width: int, text_width: int, head_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, head_width)
        self.text_norm = nn.LayerNorm(width) if text_width else None
        self.text_attention = Attention(width, text_width, head_width) if text_width else None

    def forward(
        self, x: Tensor, mask: Tensor, rotary: Tensor, states: Tensor | None = None, states_mask: Tensor | None = None
    ) -> Tensor:
        """x (B, L, D), mask (B, L), rotary (1, L, 1, K / 2, 2), states (B, T, E), states_mask (B, T) -> (B, L, D)."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, mask, rotary=rotary)
        if self.text_attention is None:
            return x
        return x + self.text_attention(self.text_norm(x), states, states_mask)


class FrameLevel(nn.Module):
    """The blocks of one level in one direction; on the way up each is given the output of its partner."""

    def __init__(
        self,
        width: int,
        n_blocks: int,
        n_attentions: int,
        *,
        conditioning_width: int,
        text_width: int,
        head_width: int,
        kernel_size: int,
        dropout: float,
        use_skips: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            FrameBlock(width, conditioning_width, kernel_size=kernel_size, dropout=dropout) for _ in range(n_blocks)
        )
        self.attentions = nn.ModuleList(
            FrameAttentionBlock(width, text_width, head_width) for _ in range(n_attentions)
        )
        self.skips = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks if use_skips else 0))
        self.frequencies = rotary_frequencies(head_width) if n_attentions else []

    def forward(
        self,
        x: Tensor,
        conditioning: Tensor,
        mask: Tensor,
        *,
        text: TextCondition | None,
        skips: list[Tensor],
        keys: Tensor | None,
    ) -> list[Tensor]:
        """The output of every block, the last one last; `skips` are those of the way down, or empty.  mask (B, L)."""
        states = () if text is None else (text.states, text.mask)
        if len(self.attentions) > 0:
            rotary = rotary_table(self.frequencies, torch.arange(x.shape[1], device=x.device)[None])
        # The first blocks are followed by attention; on the way up a block first adds the skip of its partner.
        outputs = []
        for i, block in enumerate(self.blocks):
            if skips:
                x = x + self.skips[i](skips[-1 - i])
            x = block(x, conditioning, mask[..., None], fold(keys, i))
            if i < len(self.attentions):
                x = self.attentions[i](x, mask, rotary, *states)
            outputs.append(x)
        return outputs


class UNet1d(nn.Module):
    """Down to the coarsest level and up again, conditioned on time, frames, a vector and a caption.

    Args:
        in_channels: Z.
        frame_width, vector_width, text_width: widths of the `AudioCondition`; 0 where it lacks that part.
        widths: channels of the levels, the finest first; each halves the number of frames of the one before.
        n_blocks: residual blocks of each level, on the way down and again on the way up; at the coarsest once.
        n_attentions: how many of them are followed by attention, the first ones.
        head_width: K, even; divides every width that has attention.
        conditioning_width: width of the time embedding.
        kernel_size: frames that a convolution sees.
        dropout: of the hidden layer of each residual block.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        frame_width: int,
        vector_width: int,
        text_width: int,
        widths: list[int],
        n_blocks: list[int],
        n_attentions: list[int],
        head_width: int,
        conditioning_width: int,
        kernel_size: int,
        dropout: float,
    ):
        super().__init__()

        def level(i: int, use_skips: bool) -> FrameLevel:
            return FrameLevel(
                widths[i],
                n_blocks[i],
                n_attentions[i],
                conditioning_width=conditioning_width,
                text_width=text_width,
                head_width=head_width,
                kernel_size=kernel_size,
                dropout=dropout,
                use_skips=use_skips,
            )

        finer = range(len(widths) - 1)
        self.time = TimeEmbedding(widths[0], conditioning_width)
        self.vector = nn.Linear(vector_width, conditioning_width) if vector_width else None
        self.stem = nn.Linear(in_channels + frame_width, widths[0])
        self.down = nn.ModuleList(level(i, use_skips=False) for i in finer)
        self.downsamples = nn.ModuleList(nn.Linear(2 * widths[i], widths[i + 1]) for i in finer)
        self.middle = level(len(widths) - 1, use_skips=False)
        self.upsamples = nn.ModuleList(nn.Linear(widths[i + 1], 2 * widths[i]) for i in finer)
        self.up = nn.ModuleList(level(i, use_skips=True) for i in finer)
        self.norm = AdaptiveFrameNorm(widths[0], conditioning_width)
        self.head = ZeroLinear(widths[0], in_channels)

    def forward(
        self, x: Tensor, time: Tensor, condition: AudioCondition, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """Args:
            x: noisy latents as the process scales them, (B, L, Z).
            time: the network's time, about [0, 1000], (B,).
            dropout_keys: (B,) int64, see `model.dropout`; None: PyTorch's dropout.
        Returns: (B, L, Z) fp32, 0 in padding."""
        keys = [fold(dropout_keys, KEYS_PER_PART * number) for number in range(2 * len(self.down) + 1)]
        # Whole groups of frames at every level; each level knows its valid frames.
        L, multiple = x.shape[1], 2 ** len(self.down)
        masks = [F.pad(condition.mask, (0, -L % multiple))]
        for _ in self.down:
            masks.append(masks[-1].unflatten(1, (-1, 2)).any(2))
        # Conditioning vector (B, conditioning_width): time, plus what holds for the whole clip.
        with torch.autocast(x.device.type, enabled=False):
            conditioning = self.time(time)
            if self.vector is not None:
                conditioning = conditioning + self.vector(condition.vector.float())
            conditioning = F.silu(conditioning)
        # Noisy latents beside the conditioning of each frame; `where`, since padding may hold anything.
        inputs = x if condition.frames is None else torch.cat([x, condition.frames.to(x.dtype)], dim=-1)
        inputs = F.pad(inputs.where(condition.mask[..., None], 0.0), (0, 0, 0, -L % multiple))
        # Down.
        h, skips, text = self.stem(inputs), [], condition.text
        for mask, level, downsample in zip(masks, self.down, self.downsamples):
            skips.append(level(h, conditioning, mask, text=text, skips=[], keys=keys.pop()))
            pairs = skips[-1][-1] * mask[..., None]
            h = downsample(pairs.unflatten(1, (-1, 2)).flatten(2))
        # The coarsest level.
        h = self.middle(h, conditioning, masks[-1], text=text, skips=[], keys=keys.pop())[-1]
        # Up.
        for mask, level, upsample in zip(reversed(masks[:-1]), reversed(self.up), reversed(self.upsamples)):
            h = upsample(h).unflatten(2, (2, -1)).flatten(1, 2)
            h = level(h, conditioning, mask, text=text, skips=skips.pop(), keys=keys.pop())[-1]
        # The output, in fp32.
        with torch.autocast(x.device.type, enabled=False):
            output = self.head(F.silu(self.norm(h[:, :L].float(), conditioning)))
        return output.where(condition.mask[..., None], 0.0)
