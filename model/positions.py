"""Positions: rotary embedding, ALiBi, sinusoidal and learned vectors; and which key each query may see.

B batch, L queries, S keys, D hidden, H heads, K head width. Everything here is computed in fp32 from integer positions
and kept out of parameters and buffers, so that neither casting a model nor loading it through the meta device touches
it.
"""

import math

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor

from model.layers import to_device


def rotary_frequencies(
    width: int, *, theta: float = 10000.0, interpolation: float = 1.0, ntk_factor: float = 1.0
) -> list[float]:
    """Angle per position of each pair of channels (RoFormer, arXiv 2104.09864), width / 2 numbers in radians.

    Args:
        width: channels that rotate, even.
        theta: base of the frequencies.
        interpolation: positions are divided by it, to stretch a trained length (arXiv 2306.15595).
        ntk_factor: stretches low frequencies more than high ones (NTK-aware scaling).
    """
    # Constants: computed on the CPU, without touching the random stream.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        module = RotaryEmbedding(width, theta=theta, theta_rescale_factor=ntk_factor, cache_max_seq_len=1)
    return (module.freqs.detach() / interpolation).tolist()


def rotary_table(frequencies: list[float], positions: Tensor) -> Tensor:
    """Cosines and sines of all angles.

    Args:
        frequencies: as from `rotary_frequencies`.
        positions: (B or 1, L) integers.
    Returns: (B or 1, L, 1, K / 2, 2) fp32; the 1 stands for the heads.
    """
    rates = to_device(torch.tensor(frequencies, dtype=torch.float32), positions.device)
    angles = positions[..., None, None].float() * rates  # (B or 1, L, 1, K / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the channel pairs (0, 1), (2, 3), ... by their position's angles; channels beyond the table stay.

    Args:
        x: queries or keys, (B, L, H, K).
        table: from `rotary_table`, for as many channels or fewer.
    Returns: (B, L, H, K) in the type of x; the rotation itself is done in fp32.
    """
    width = 2 * table.shape[-2]
    # Partial rotary embedding: the other channels pass through.
    if width < x.shape[-1]:
        return torch.cat([apply_rotary(x[..., :width].contiguous(), table), x[..., width:]], dim=-1)
    pairs = x.float().view(*x.shape[:-1], width // 2, 2)  # (B, L, H, K / 2, 2)
    if torch.compiler.is_compiling():  # Compilers do not fuse complex numbers.
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        # (a + i b) (cos + i sin).
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


def alibi_slopes(n_heads: int) -> list[float]:
    """The heads' slopes of ALiBi (arXiv 2108.12409), 2^(-8 h / H); for H no power of two the next lower power's,
    and after them every second one of the next higher power."""
    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (h + 1) / lower) for h in range(lower)]
    between = [2 ** (-8 * (h + 1) / (2 * lower)) for h in range(0, 2 * lower, 2)]
    return slopes + between[: n_heads - lower]


def alibi_bias(n_heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """What is added to the attention scores: minus slope times distance.

    Args:
        queries, keys: positions, (B or 1, L) and (B or 1, S).
    Returns: (B or 1, H, L, S) fp32.
    """
    slopes = to_device(torch.tensor(alibi_slopes(n_heads), dtype=torch.float32), queries.device)
    distance = (queries[:, :, None] - keys[:, None, :]).abs().float()  # (B or 1, L, S)
    return -slopes[:, None, None] * distance[:, None]


def sinusoidal_embedding(positions: Tensor, width: int) -> Tensor:
    """The fixed vectors of "Attention is all you need" (arXiv 1706.03762, section 3.5), sines first.

    Args:
        positions: (B or 1, L) integers.
        width: D, even.
    Returns: (B or 1, L, D) fp32.
    """
    # 10000^(-2 i / D).
    rates = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(10000.0) / width))
    angles = positions[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def visible_keys(
    queries: Tensor, keys: Tensor, *, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """Which keys a query sees: those not after it, no padding, and of its own document only. A query always sees
    itself, so that no row is empty.

    Args:
        queries, keys: indices within the sequence, (L,) and (S,).
        attention_mask: (B, S'), true where there is a token; keys beyond S' are padding. None: all are tokens.
        segment_ids: (B, L), where L = S; equal numbers are the same document. None: one document.
    Returns: (B or 1, 1, L, S) bool.
    """
    visible = (keys <= queries[:, None])[None, None]  # causal, (1, 1, L, S)
    if attention_mask is not None:
        tokens = attention_mask.bool()
        # A static cache has room for more keys than there are tokens.
        if tokens.shape[1] < keys.shape[0]:
            tokens = torch.nn.functional.pad(tokens, (0, keys.shape[0] - tokens.shape[1]))
        visible = visible & tokens[:, None, None, : keys.shape[0]]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    # Padding sees itself: the softmax of an empty row would be nan.
    return visible | (keys == queries[:, None])


def check_attention_mask(mask: Tensor, *, batch: int, queries: int, keys: int, tokens: int | None) -> None:
    """Raise ValueError unless a mask of tokens or a ready mask fits its call.

    Args:
        mask: (B, tokens), nonzero where there is a token; or (B or 1, H or 1, L, S), bool (true: visible) or float
            (added to the scores).
        queries, keys: L and S.
        tokens: number of tokens with the past; None: not known before the model runs.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; give a tensor of {batch} x {tokens} tokens")
    shape = tuple(mask.shape)
    if mask.ndim == 4:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention_mask {shape} has dtype {mask.dtype}: with four dimensions give bool (true: visible) or "
                "float (added to the scores), such as mask.bool()"
            )
        fits = shape[0] in (1, batch) and shape[2:] == (queries, keys)
    else:
        fits = mask.ndim == 2 and shape[0] in (1, batch) and tokens in (None, shape[1])
    if not fits:
        raise ValueError(
            f"attention_mask has shape {shape}: give ({batch}, {tokens}), one entry per token, past included, or "
            f"({batch}, 1, {queries}, {keys})"
        )
    if mask.ndim == 2 and mask.is_floating_point() and (mask < 0).any():
        raise ValueError(
            "attention_mask has negative values: with two dimensions it is 1 where there is a token and 0 at padding; "
            "give what is added to the scores with four dimensions"
        )


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """Positions that begin at 0 in each document: (B, L) segment numbers -> (B, L) positions."""
    L = segment_ids.shape[1]
    index = torch.arange(L, device=segment_ids.device)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]  # first tokens of documents
    # Index minus that of the last start before.
    return index - torch.where(starts, index, 0).cummax(dim=1).values
