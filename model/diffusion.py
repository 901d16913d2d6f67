"""UNet of the diffusion models and the encoding of their text.  B batch, C channels, Y X rows and columns, D width of
a level, H heads, K head width, T text tokens, E width of the text.

Notable:
- residual blocks have one 3x3 and one 1x1 convolution after an adaptive layer norm over channels, whose scale and
  shift come from the time and the pooled text (arXiv 2212.09748, section 3.2). Every residual branch and the last
  convolution start at zero;
- self-attention, then attention to the text, at the coarser levels; queries and keys are normalised per head
  (arXiv 2302.05442);
- the coarsest level has no skip connections; finer ones have one per block, through a 1x1 convolution;
- captions are bytes. Hashed n-grams of bytes (arXiv 2412.09871, section 3.2.1) tell the small text transformer which
  word it is in.
Time embedding, scales and shifts, and the last layer are kept out of autocast: fp32 (on CUDA convolutions then follow
`torch.backends.cudnn.allow_tf32`). Norm statistics are fp32 inside the kernels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from model.checkpointing import GradientCheckpointingLayer
from model.cpu_kernels import attention
from model.layers import Downsample, Upsample, ZeroConv2d, ZeroLinear, init_layer
from model.positions import apply_rotary
from model.text.tokenizer import PADDING, VOCABULARY

MAX_PERIOD = 10_000.0  # slowest wave of the time embedding, in units of the network's time
HASH_MODULUS = 2**31 - 1  # a Mersenne prime; products with tokens fit int64
HASH_BASE = 1_000_003  # a prime above the vocabulary


@dataclass
class TextCondition:
    """Captions, encoded once for all steps.

    Args:
        states: (B, T, E).
        mask: (B, T) bool, True where there is a token; every row has at least one.
        pooled: (B, E).
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def cat(self, other: "TextCondition") -> "TextCondition":
        """Both batches as one, (B + B', max(T, T'), E); the shorter one is padded."""
        T = max(self.mask.shape[1], other.mask.shape[1])
        first, second = self.pad(T), other.pad(T)
        return TextCondition(
            torch.cat([first.states, second.states]),
            torch.cat([first.mask, second.mask]),
            torch.cat([first.pooled, second.pooled]),
        )

    def pad(self, n_tokens: int) -> "TextCondition":
        """The same captions padded with masked zeros to `n_tokens` (at least T) tokens."""
        missing = n_tokens - self.mask.shape[1]
        if missing == 0:
            return self
        return TextCondition(F.pad(self.states, (0, 0, 0, missing)), F.pad(self.mask, (0, missing)), self.pooled)

    def select(self, rows: Tensor | slice | list[int]) -> "TextCondition":
        """Some rows of the batch, by index or mask."""
        return TextCondition(self.states[rows], self.mask[rows], self.pooled[rows])


def time_features(time: Tensor, width: int) -> Tensor:
    """Cosines and sines of the time, their periods from 2 pi to 2 pi MAX_PERIOD in a geometric row.

    Args:
        time: (B,), about [0, 1000].
        width: even.
    Returns:
        (B, width) fp32, cosines first.
    """
    # MAX_PERIOD^(-2 i / width), i = 0, 1, ..: from 1 to about 1 / MAX_PERIOD.
    frequencies = torch.exp(torch.arange(width // 2, device=time.device) * (-2 * math.log(MAX_PERIOD) / width))
    angles = time.float()[:, None] * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """(B,) -> (B, D): features of the time through two linear layers, in fp32 also under autocast."""

    def __init__(self, n_features: int, width: int):
        super().__init__()
        self.n_features = n_features
        self.hidden = nn.Linear(n_features, width)
        self.output = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):
            return self.output(F.silu(self.hidden(time_features(time, self.n_features))))


class AdaptiveNorm(nn.Module):
    """Layer norm over the channels of each position, then scale and shift from the conditioning vector."""

    def __init__(self, width: int, conditioning_width: int):
        super().__init__()
        self.width = width
        self.scale_shift = ZeroLinear(conditioning_width, 2 * width)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x (B, D, Y, X), conditioning (B, conditioning_width) fp32 -> (B, D, Y, X), channels last."""
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.scale_shift(conditioning)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, D) each
        x = F.layer_norm(x.permute(0, 2, 3, 1), (self.width,))  # (B, Y, X, D)
        # x (1 + scale) + shift in one kernel.
        return torch.addcmul(shift.to(x.dtype), x, 1 + scale.to(x.dtype)).permute(0, 3, 1, 2)


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv1x1(silu(conv3x3(norm(x)))), the norm adaptive and the last convolution starting at zero."""

    def __init__(self, width: int, conditioning_width: int):
        super().__init__()
        self.norm = AdaptiveNorm(width, conditioning_width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = ZeroConv2d(width, width, 1)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x (B, D, Y, X), conditioning (B, conditioning_width) fp32 -> (B, D, Y, X)."""
        return x + self.out(F.silu(self.conv(self.norm(x, conditioning))))


class Attention(nn.Module):
    """Attention of (B, L, D) to (B, T, E), queries and keys normalised per head; the output starts at zero."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.query_norm = nn.LayerNorm(head_width, bias=False)
        self.key_norm = nn.LayerNorm(head_width, bias=False)
        self.out = ZeroLinear(width, width)

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, *, rotary: Tensor | None = None
    ) -> Tensor:
        """mask (B, T) bool, True where attention is allowed; rotary (1, L, 1, K / 2, 2), see `rotary_table`, where
        positions rotate queries and keys of the same sequence -> (B, L, D)."""
        # Heads, with normalised queries and keys: their products are bounded, so that logits cannot grow.
        q = self.query(x).unflatten(-1, (-1, self.head_width))  # (B, L, H, K)
        k, v = self.key_value(context).unflatten(-1, (2, -1, self.head_width)).unbind(2)  # (B, T, H, K)
        q, k = self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        allowed = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
        return self.out(attention(q, k, v, mask=allowed).transpose(1, 2).flatten(2))


class AttentionBlock(GradientCheckpointingLayer):
    """Self-attention over all positions, then attention to the text."""

    def __init__(self, width: int, text_width: int, head_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, head_width)
        self.text_norm = nn.LayerNorm(width)
        self.text_attention = Attention(width, text_width, head_width)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """x (B, D, Y, X), states (B, T, E), mask (B, T) -> (B, D, Y, X)."""
        h = x.flatten(2).transpose(1, 2)  # (B, Y * X, D)
        # Self-attention.
        normed = self.norm(h)
        h = h + self.attention(normed, normed)
        # Attention to the text.
        h = h + self.text_attention(self.text_norm(h), states, mask)
        return h.transpose(1, 2).unflatten(2, x.shape[-2:])


class UNetLevel(nn.Module):
    """The blocks of one level in one direction; on the way up each is given the output of its partner."""

    def __init__(
        self,
        width: int,
        n_blocks: int,
        *,
        conditioning_width: int,
        text_width: int,
        head_width: int,
        use_attention: bool,
        use_skips: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width, conditioning_width) for _ in range(n_blocks))
        self.attentions = nn.ModuleList(
            AttentionBlock(width, text_width, head_width) for _ in range(n_blocks if use_attention else 0)
        )
        self.skips = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(n_blocks if use_skips else 0))

    def forward(self, x: Tensor, conditioning: Tensor, text: TextCondition, *, skips: list[Tensor]) -> list[Tensor]:
        """The output of every block, the last one last; `skips` are those of the way down, or empty."""
        # Each block is followed by its attention; on the way up it first adds the skip of its partner on the way down.
        outputs = []
        for i, block in enumerate(self.blocks):
            if skips:
                x = x + self.skips[i](skips[-1 - i])
            x = block(x, conditioning)
            if len(self.attentions) > 0:
                x = self.attentions[i](x, text.states, text.mask)
            outputs.append(x)
        return outputs


def coordinates(x: Tensor) -> Tensor:
    """Row and column of every position of (B, C, Y, X) as two channels (B, 2, Y, X), from -1 to 1 between the edges of
    the outermost positions (CoordConv, arXiv 1807.03247): a caption's left and right need a place to refer to."""
    axes = [(2 * torch.arange(n, device=x.device, dtype=x.dtype) + 1) / n - 1 for n in x.shape[-2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], -1, -1, -1)


class UNet(nn.Module):
    """Down to the coarsest level and up again, conditioned on time and text.

    Args:
        in_channels, out_channels: of the noisy sample and of the prediction.
        widths: channels of the levels, the finest first; each halves the resolution of the one before.
        n_blocks: residual blocks of each level, on the way down and again on the way up; at the coarsest once.
        use_attention: for each level, whether every residual block is followed by an attention block.
        head_width: K; divides every width that has attention.
        conditioning_width: width of the time embedding.
        text_width: E.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        n_blocks: list[int],
        use_attention: list[bool],
        head_width: int,
        conditioning_width: int,
        text_width: int,
    ):
        super().__init__()

        def level(i: int, use_skips: bool) -> UNetLevel:
            return UNetLevel(
                widths[i],
                n_blocks[i],
                conditioning_width=conditioning_width,
                text_width=text_width,
                head_width=head_width,
                use_attention=use_attention[i],
                use_skips=use_skips,
            )

        finer = range(len(widths) - 1)
        self.time = TimeEmbedding(widths[0], conditioning_width)
        self.text = nn.Linear(text_width, conditioning_width)
        self.stem = nn.Conv2d(in_channels + 2, widths[0], 3, padding=1)  # 2: the coordinates
        self.down = nn.ModuleList(level(i, use_skips=False) for i in finer)
        self.downsamples = nn.ModuleList(Downsample(widths[i], widths[i + 1]) for i in finer)
        self.middle = level(len(widths) - 1, use_skips=False)
        self.upsamples = nn.ModuleList(Upsample(widths[i + 1], widths[i]) for i in finer)
        self.up = nn.ModuleList(level(i, use_skips=True) for i in finer)
        self.norm = AdaptiveNorm(widths[0], conditioning_width)
        self.head = ZeroConv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: TextCondition) -> Tensor:
        """Args:
            x: noisy sample as the process scales it, (B, in_channels, Y, X), sides divisible by 2^(levels - 1).
            time: the network's time, about [0, 1000], (B,).
        Returns:
            (B, out_channels, Y, X) fp32."""
        x = x.contiguous(memory_format=torch.channels_last)
        # Conditioning vector (B, conditioning_width): time plus pooled text.
        with torch.autocast(x.device.type, enabled=False):
            conditioning = F.silu(self.time(time) + self.text(text.pooled.float()))
        # Down.
        h, skips = self.stem(torch.cat([x, coordinates(x)], dim=1)), []
        for level, downsample in zip(self.down, self.downsamples):
            skips.append(level(h, conditioning, text, skips=[]))
            h = downsample(skips[-1][-1])
        # The coarsest level.
        h = self.middle(h, conditioning, text, skips=[])[-1]
        # Up.
        for level, upsample in zip(reversed(self.up), reversed(self.upsamples)):
            h = level(upsample(h), conditioning, text, skips=skips.pop())[-1]
        # The output, in fp32.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.norm(h.float(), conditioning)))


def n_gram_buckets(tokens: Tensor, sizes: list[int], n_buckets: int) -> Tensor:
    """Rows of the table for the last n tokens up to each position: sum_j token[i - j] * base^j, modulo 2^31 - 1.

    Args:
        tokens: (B, T) int64; zeros stand before the text.
        sizes: the n, N of them.
    Returns:
        (B, T, N) int64; size k of the list has the rows from k * n_buckets on.
    """
    T, rows = tokens.shape[1], []
    for k, size in enumerate(sizes):
        # The hash of the last `size` tokens; each size has a part of the table for itself.
        value = tokens
        for j in range(1, min(size, T)):
            value = value + F.pad(tokens[:, :-j], (j, 0)) * pow(HASH_BASE, j, HASH_MODULUS)
        rows.append(value % HASH_MODULUS % n_buckets + k * n_buckets)
    return torch.stack(rows, dim=-1)


class TextLayer(GradientCheckpointingLayer):
    """Attention, then two linear layers, each after a layer norm and added to its input."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, head_width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.out = ZeroLinear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, E), mask (B, T) -> (B, T, E)."""
        # Self-attention, without padding as keys; then the feed-forward layer.
        normed = self.norm(x)
        x = x + self.attention(normed, normed, mask)
        return x + self.out(F.gelu(self.hidden(self.feed_forward_norm(x))))


class ByteTextEncoder(nn.Module):
    """Transformer over byte tokens: (B, T) and its mask -> states (B, T, E).

    Args:
        n_layers: layers of the transformer; 0 leaves the embeddings.
        max_tokens: number of learned positions.
        n_gram_sizes: lengths of the hashed n-grams, possibly none.
        n_gram_buckets: rows of the table of each length.
    """

    def __init__(
        self,
        width: int,
        n_layers: int,
        *,
        head_width: int,
        max_tokens: int,
        n_gram_sizes: list[int],
        n_gram_buckets: int,
    ):
        super().__init__()
        self.n_gram_sizes, self.n_gram_buckets = n_gram_sizes, n_gram_buckets
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(max_tokens, width)
        self.n_grams = nn.Embedding(len(n_gram_sizes) * n_gram_buckets, width) if n_gram_sizes else None
        self.layers = nn.ModuleList(TextLayer(width, head_width) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        T, max_tokens = tokens.shape[1], self.positions.num_embeddings
        if max_tokens < T:
            raise ValueError(
                f"captions of {T} tokens exceed max_tokens={max_tokens} of this model; cut them there (encode_caption)"
            )
        # Padding keeps its content out of the hashes even where the caller put something there.
        tokens = tokens.masked_fill(~mask, PADDING)
        # Embedding: byte, position, and the sum of the n-grams that end at the byte; (B, T, E).
        x = self.bytes(tokens) + self.positions(torch.arange(T, device=tokens.device))
        if self.n_grams is not None:
            x = x + self.n_grams(n_gram_buckets(tokens, self.n_gram_sizes, self.n_gram_buckets)).sum(dim=2)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class FrozenTextAdapter(nn.Module):
    """Precomputed embeddings (B, T, E') of a frozen encoder, normalised and projected: states (B, T, E)."""

    def __init__(self, embedding_width: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(embedding_width)
        self.projection = nn.Linear(embedding_width, width)

    def forward(self, text_states: Tensor, mask: Tensor) -> Tensor:
        return self.projection(self.norm(text_states.float()))


class FrozenText(nn.Module):
    """Precomputed embeddings as they are, for a network that was trained on them."""

    def forward(self, text_states: Tensor, mask: Tensor) -> Tensor:
        return text_states.float()


class NullCondition(nn.Module):
    """The learned caption that stands for none: a single state, which is the pooled vector too."""

    def __init__(self, width: int):
        super().__init__()
        self.state = nn.Parameter(torch.empty(width))

    def forward(self, batch_size: int) -> TextCondition:
        states = self.state.expand(batch_size, 1, -1)
        mask = torch.ones(batch_size, 1, dtype=torch.bool, device=states.device)
        return TextCondition(states, mask, self.state.expand(batch_size, -1))

    def replace(self, text: TextCondition, drop: Tensor) -> TextCondition:
        """The captions where `drop` (B,) bool is False, the null condition where it is True."""
        null = self(len(text)).pad(text.mask.shape[1])  # its one state, then masked zeros
        return TextCondition(
            torch.where(drop[:, None, None], null.states.to(text.states.dtype), text.states),
            torch.where(drop[:, None], null.mask, text.mask),
            torch.where(drop[:, None], null.pooled, text.pooled),
        )


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the tokens, which no caption's length dilutes: (B, T, E) and mask (B, T) -> (B, E) fp32."""
    return states.float().masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)


def init_diffusion_weights(module: nn.Module) -> None:
    """What `_init_weights` of every diffusion model does with one module.

    usual layers      see `init_layer`
    Embedding         normal, std 0.02
    NullCondition     normal, std 1, as normalised states have
    """
    init_layer(module)
    if isinstance(module, nn.Embedding):
        initialization.normal_(module.weight, std=0.02)
    elif isinstance(module, NullCondition):
        initialization.normal_(module.state)
