"""Layers of a transformer: grouped-query self-attention, feed-forward network, block.

B batch, L queries, S keys, D hidden, H query heads, G key/value groups, K head width, N selected tokens.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from model.cpu_kernels import Linear, attention, causal_attention, is_blockwise_faster
from model.dropout import Dropout, dropout, fold
from model.norms import build_norm
from model.positions import apply_rotary

# Layers apply dropout in four places, and each has keys of its own: attention weights, both branches, activations.
DROPOUTS_PER_LAYER = 4
GATED = {"swiglu": F.silu, "geglu": F.gelu}  # activation of the gate


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": relu_squared,
    "silu": F.silu,
}


class OutputLinear(Linear):
    """The last layer of a residual branch; its initialisation is scaled with depth, or zero."""


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, p: float = 0.0, keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, softmax(q k' / sqrt(K) + mask) v, with the softmax in fp32.

    Args:
        q: (B, H, L, K).
        k, v: (B, G, S, K); each group serves H / G neighbouring heads.
        mask: (B or 1, H or 1, L, S), bool (true: visible) or what is added to the scores; None: causal, L = S.
        p: probability that a weight is dropped.
        keys: (B,) int64 of the dropout, see `model.dropout`.
    Returns: outputs (B, H, L, K) and weights (B, H, L, S).
    """
    # Every query head gets the keys and values of its group: (B, H, S, K).
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, H, L, S)
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = dropout(scores.softmax(-1), p, keys)
    return weights.to(v.dtype) @ v, weights


@cache
def compiled_flex_attention() -> Any:
    """FlexAttention as one kernel, which its first call compiles."""
    return torch.compile(flex_attention)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, *, p: float = 0.0) -> Tensor:
    """FlexAttention (arXiv 2412.05496), which skips what a mask hides in blocks of pairs: compiled on a GPU; elsewhere
    by its definition and without a backward pass.

    Args: blocks: for L queries and S keys; the others: see `eager_attention`.
    Returns: (B, H, L, K).
    Raises: ValueError: p is above 0.
    """
    if p:
        raise ValueError(f"attention_dropout={p}: FlexAttention has no dropout; set 0, or use another kernel")
    attend: Any = compiled_flex_attention() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=blocks, enable_gqa=k.shape[1] < q.shape[1])


@dataclass
class LayerInputs:
    """What all layers share in one forward pass.

    Args:
        rotary: table of `rotary_table`, or None.
        mask: (B or 1, H or 1, L, S), bool or added to the scores; None: causal without a past, or a single query.
        is_causal: whether the mask hides all keys after the query.
        blocks: the mask as FlexAttention takes it, instead of `mask`, which is then None; of whole sequences.
        cache: keys and values of the past, or None.
        weights: list that collects the attention weights of each layer; None: not collected.
        states: list that collects what each layer reads; None: not collected.
        dropout_keys: (B,) int64, see `model.dropout`; None: dropout from PyTorch's generator.
    """

    rotary: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = True
    blocks: BlockMask | None = None
    cache: Cache | None = None
    weights: list[Tensor] | None = None
    states: list[Tensor] | None = None
    dropout_keys: Tensor | None = None

    def keyed(self, number: int) -> "LayerInputs":
        """What application `number` of a layer in this forward pass reads: its dropout is like that of no other."""
        if self.dropout_keys is None:
            return self
        return replace(self, dropout_keys=fold(self.dropout_keys, DROPOUTS_PER_LAYER * number))


class SelectedTokens:
    """Which tokens of a batch a recurrent core still works on, and the keys and values of those that it has left.

    Without a left token all methods are free of copies.

    Args:
        chosen: (B, L) bool.
    Attributes:
        last: keys and values of all tokens at their last step, each (B, G, L, K), by the layer's number.
    """

    def __init__(self, chosen: Tensor):
        self.shape = chosen.shape
        self.is_all = bool(chosen.all())
        self.batch, self.position = chosen.nonzero(as_tuple=True)  # (N,) each
        self.last: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.batch)

    def narrow(self, stays: Tensor) -> None:
        """Keep the tokens where `stays`, (N,) bool; the others have left."""
        self.batch, self.position = self.batch[stays], self.position[stays]
        self.is_all = self.is_all and bool(stays.all())

    def select(self, dense: Tensor) -> Tensor:
        """(B, L, ...) -> (N, ...)."""
        return dense.flatten(0, 1) if self.is_all else dense[self.batch, self.position]

    def scatter(self, values: Tensor, dense: Tensor | None = None) -> Tensor:
        """(N, ...) -> (B, L, ...); the other tokens are as in `dense`, which is written to, or 0."""
        if self.is_all:
            return values.unflatten(0, self.shape)
        dense = values.new_zeros(*self.shape, *values.shape[1:]) if dense is None else dense
        dense[self.batch, self.position] = values
        return dense

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values of the chosen tokens, (N, G, K) each, with the last ones of the others: (B, G, L, K)."""
        before = self.last.get(layer, (None, None))
        # Groups after positions for `scatter`, (B, L, G, K), and back; old ones are overwritten in place.
        dense = [
            self.scatter(new, None if old is None else old.transpose(1, 2)).transpose(1, 2)
            for new, old in zip((keys, values), before)
        ]
        self.last[layer] = (dense[0], dense[1])
        return self.last[layer]


class MegaTransformerSelfAttention(nn.Module):
    """Causal self-attention with grouped queries (arXiv 2305.13245), queries, keys and values from one product."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_groups, self.head_width = config.n_heads, config.groups, config.width_per_head
        self.config, self.dropout = config, Dropout(config.attention_dropout)
        n_projected = (self.n_heads + 2 * self.n_groups) * self.head_width
        self.qkv_proj = Linear(config.hidden_size, n_projected, bias=config.use_attention_bias)
        self.o_proj = OutputLinear(self.n_heads * self.head_width, config.hidden_size, bias=config.use_attention_bias)
        self.q_norm = build_norm(config, self.head_width) if config.use_qk_norm else None
        self.k_norm = build_norm(config, self.head_width) if config.use_qk_norm else None

    def forward(self, x: Tensor, shared: LayerInputs, slot: int) -> Tensor:
        """Args: x: (B, L, D). slot: the cache's slot of this layer. Returns: (B, L, D)."""
        q, k, v = self.project(x, shared.rotary)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, L, K)
        if shared.cache is not None:
            k, v = shared.cache.update(k, v, slot)  # (B, G, S, K), the past first
        return self.o_proj(self.attend(q, k, v, shared=shared))

    def project(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries (B, L, H, K) and keys (B, L, G, K), and values (B, L, G, K)."""
        # One product for queries, keys and values, (B, L, H + 2 G, K); queries and keys rotate together.
        H, G = self.n_heads, self.n_groups
        qkv = self.qkv_proj(x).view(*x.shape[:-1], H + 2 * G, self.head_width)
        # QK-norm (arXiv 2302.05442), per head.
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([H, G, G], dim=-2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2)
        else:
            qk, v = qkv.split([H + G, G], dim=-2)
        if rotary is not None:
            qk = apply_rotary(qk, rotary)
        q, k = qk.split([H, G], dim=-2)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, shared: LayerInputs) -> Tensor:
        """Args: q: (B, L, H, K); k, v: (B, G, S, K). Returns: the heads' outputs side by side, (B, L, H K)."""
        q, mask, p = q.transpose(1, 2), shared.mask, self.dropout.p if self.training else 0.0
        if shared.blocks is not None:
            out = attention_in_blocks(q, k, v, shared.blocks, p=p)
        # The definition, which alone returns weights, and drops those that keys say.
        elif self.config._attn_implementation == "eager" or (p and shared.dropout_keys is not None):
            # A single query sees all keys.
            seen = mask if mask is not None or q.shape[2] > 1 else q.new_ones(1, k.shape[2], dtype=torch.bool)
            out, weights = eager_attention(q, k, v, mask=seen, p=p, keys=shared.dropout_keys)
            if shared.weights is not None:
                shared.weights.append(weights)
        # Blocks of queries on a CPU.
        elif shared.is_causal and is_blockwise_faster(q, k, mask=mask, dropout=p):
            out = causal_attention(q, k, v, mask=mask)
        else:
            # The library's kernel: without a mask a single query sees all keys, several are causal.
            is_causal = True if mask is None and q.shape[2] > 1 else False  # noqa: SIM210 - a plain bool for compilers
            is_grouped = self.n_groups < self.n_heads
            out = attention(q, k, v, mask=mask, dropout_p=p, is_causal=is_causal, enable_gqa=is_grouped)
        return out.transpose(1, 2).flatten(2)  # (B, H, L, K) -> (B, L, H K)


class SimpleFFN(nn.Module):
    """Feed-forward network: activation(x W) W', or with a gate (arXiv 2002.05202), (activation(x W) * x V) W'."""

    def __init__(self, config):
        super().__init__()
        self.is_gated = config.ffn_activation in GATED
        self.activation = {**GATED, **ACTIVATIONS}[config.ffn_activation]
        self.dropout = Dropout(config.ffn_dropout)
        width = config.ffn_size
        self.in_proj = Linear(config.hidden_size, width * (1 + self.is_gated), bias=config.use_ffn_bias)
        self.out_proj = OutputLinear(width, config.hidden_size, bias=config.use_ffn_bias)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, ..., D) -> (B, ..., D); keys: (B,) int64 of the dropout."""
        hidden = self.in_proj(x)
        if self.is_gated:
            gate, value = hidden.chunk(2, dim=-1)  # (..., W) each, from one product
            hidden = self.activation(gate) * value
        else:
            hidden = self.activation(hidden)
        return self.out_proj(self.dropout(hidden, keys))


class Residual(nn.Module):
    """Where a branch's norms stand.

    before                x + branch(norm(x))
    after                 norm(x + branch(x)), as in the first transformer
    before and after      x + norm(branch(norm(x))), a sandwich
    """

    def __init__(self, config, *, use_pre_norm: bool, use_post_norm: bool):
        super().__init__()
        self.pre_norm = build_norm(config) if use_pre_norm else None
        self.post_norm = build_norm(config) if use_post_norm else None
        self.dropout = Dropout(config.hidden_dropout)

    def before(self, x: Tensor) -> Tensor:
        """What the branch reads."""
        return x if self.pre_norm is None else self.pre_norm(x)

    def after(self, x: Tensor, branch: Tensor, keys: Tensor | None = None) -> Tensor:
        """The stream x with the branch's output, both (B, ..., D); keys: (B,) int64 of the dropout."""
        branch = self.dropout(branch, keys)
        if self.post_norm is None:
            return x + branch
        # Norms before and after the branch, or one after the sum.
        return x + self.post_norm(branch) if self.pre_norm is not None else self.post_norm(x + branch)


class MegaTransformerBlock(GradientCheckpointingLayer):
    """One layer: self-attention, then the feed-forward network, each with its norms and a residual connection.

    Args:
        use_sandwich_norm: norms before and after both branches, whatever the configuration's flags say.
    """

    def __init__(self, config, use_sandwich_norm: bool = False):
        super().__init__()
        self.attention_norms = Residual(
            config,
            use_pre_norm=use_sandwich_norm or config.use_pre_attention_norm,
            use_post_norm=use_sandwich_norm or config.use_post_attention_norm,
        )
        self.attention = MegaTransformerSelfAttention(config)
        self.ffn_norms = Residual(
            config,
            use_pre_norm=use_sandwich_norm or config.use_pre_ffn_norm,
            use_post_norm=use_sandwich_norm or config.use_post_ffn_norm,
        )
        self.ffn = SimpleFFN(config)

    def forward(self, x: Tensor, shared: LayerInputs, slot: int) -> Tensor:
        """Args: x: (B, L, D). slot: the cache's slot of this layer. Returns: (B, L, D)."""
        keys = shared.dropout_keys
        branch = self.attention(self.attention_norms.before(x), shared, slot)
        x = self.attention_norms.after(x, branch, fold(keys, 1))
        return self.ffn_norms.after(x, self.ffn(self.ffn_norms.before(x), fold(keys, 2)), fold(keys, 3))

    def forward_selected(
        self, x: Tensor, tokens: SelectedTokens, shared: LayerInputs, *, layer: int, slot: int
    ) -> Tensor:
        """The same for some of the tokens; the others keep the keys and values that they have.

        Args: x: (N, D). layer: number of this layer among those of `tokens`. slot: the cache's slot. Returns: (N, D).
        """
        rotary = shared.rotary
        if rotary is not None:
            rotary = tokens.select(rotary.expand(*tokens.shape, *rotary.shape[2:]))
        # Keys and values of all tokens, (B, G, L, K): new ones of those at work, the last ones of those that left.
        q, k, v = self.attention.project(self.attention_norms.before(x), rotary)
        k, v = tokens.keep(layer, k, v)
        if shared.cache is not None:
            k, v = shared.cache.update(k, v, slot)
        # Attention runs on whole sequences; rows of tokens that left are dropped.
        branch = tokens.select(self.attention.attend(tokens.scatter(q), k, v, shared=shared))
        x = self.attention_norms.after(x, self.attention.o_proj(branch))
        return self.ffn_norms.after(x, self.ffn(self.ffn_norms.before(x)))


class SimpleBlock(nn.Module):
    """Layers in sequence: prelude, main stack, coda."""

    def __init__(self, config, n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(MegaTransformerBlock(config) for _ in range(n_layers))

    def forward(self, x: Tensor, shared: LayerInputs, first_slot: int) -> Tensor:
        """Args: x: (B, L, D). first_slot: the cache's slot of the first layer, and its number for dropout.

        Returns: (B, L, D).
        """
        for n, layer in enumerate(self.layers):
            if shared.states is not None:
                shared.states.append(x)
            # Without a cache all layers get the same number: compilers make a new version for each other one.
            x = layer(x, shared.keyed(first_slot + n), first_slot + n if shared.cache is not None else 0)
        return x
