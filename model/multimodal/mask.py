"""Which tokens of a stream see which: one predicate over integer vectors.  B batch, L queries, S keys.

Tokens before a position are visible, as in a language model. A span (the tokens of an image or of a spoken text) is
visible to itself in both directions. A span that is trained has a noise copy, which nothing else sees, and where
something follows it a clean copy, which the noise copy does not see: so the noise copy is computed as in generation,
where the clean copy does not exist yet.

The predicate makes a dense mask for the library's kernel, and block masks of FlexAttention for GPUs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

OUTSIDE = -1  # document of padding, span of what is no span


class Placement(NamedTuple):
    """Where tokens stand, each (B, L) int64.

    Attributes:
        document: tokens see their own document alone; -1 is padding, which nothing sees.
        index: place in the row.
        span: number of the span within the row, -1 outside of spans.
        copy: 0 for text and clean latents, 1 and above for copies with noise.
    """

    document: Tensor
    index: Tensor
    span: Tensor
    copy: Tensor


def is_visible(query: Placement, key: Placement) -> Tensor:
    """Whether a query sees a key; the vectors of both are broadcast, as are those of FlexAttention's mask functions.

    Every token sees itself, also padding: the softmax of an empty row would be nan.
    """
    in_span = (query.span >= 0) & (query.span == key.span) & (query.copy == key.copy)
    is_before = key.index <= query.index
    # Noise is seen by its own copy alone, and does not see what it has to predict.
    is_other_noise = (key.copy > 0) & ~in_span
    is_answer = (query.copy > 0) & (key.copy == 0) & (query.span == key.span)
    same_document = (query.document == key.document) & (key.document >= 0)
    is_seen = same_document & (is_before | in_span) & ~is_other_noise & ~is_answer
    return is_seen | (query.index == key.index)


def stream_mask(placement: Placement) -> Tensor:
    """The mask of whole streams, (B, 1, L, L) bool, true where the query (row) sees the key (column)."""
    query = Placement(*(vector[:, None, :, None] for vector in placement))
    key = Placement(*(vector[:, None, None, :] for vector in placement))
    return is_visible(query, key)


def mask_function(placement: Placement) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`is_visible` as FlexAttention calls it: with the numbers of row, head, query and key."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_visible(
            Placement(*(vector[row, query] for vector in placement)),
            Placement(*(vector[row, key] for vector in placement)),
        )

    return sees


def stream_blocks(placement: Placement) -> BlockMask:
    """The mask of `stream_mask` for FlexAttention, which skips blocks of 128 x 128 pairs that are all hidden."""
    n_rows, length = placement.index.shape
    return create_block_mask(
        mask_function(placement), n_rows, None, length, length, device=placement.index.device.type
    )


def span_mask(lengths: Tensor, n_tokens: int) -> Tensor:
    """The mask within spans, in both directions: lengths (N,) -> (N, 1, n_tokens, n_tokens) bool. Padding is unseen,
    except by itself."""
    index = torch.arange(n_tokens, device=lengths.device)
    is_token = (index < lengths[:, None])[:, None, None, :]
    return is_token | (index == index[:, None])
