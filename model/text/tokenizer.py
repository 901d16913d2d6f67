"""Bytes as tokens: captions need no vocabulary file, and every text is encodable.  B batch, T text tokens.

Token 0 is padding, 1 begins a text, byte b is b + 2. A caption is never empty: it always has its first token.
"""

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = 0
BEGIN_OF_TEXT = 1
FIRST_BYTE = 2
VOCABULARY = FIRST_BYTE + 256
TOKENS_MULTIPLE = 8  # Captions of a batch are padded to a multiple of so many tokens.


def encode_caption(text: str, max_tokens: int) -> list[int]:
    """Begin-of-text and the UTF-8 bytes of the caption in Unicode normal form C.

    Args:
        text: caption; an empty one gives [1].
        max_tokens: a longer caption is cut there, never within a character.
    Raises:
        ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1, the begin-of-text token")
    cut = unicodedata.normalize("NFC", text).encode()[: max_tokens - 1]
    # Decoding drops the incomplete character that the cut may have left at the end.
    return [BEGIN_OF_TEXT, *(byte + FIRST_BYTE for byte in cut.decode(errors="ignore").encode())]


def pad_tokens(captions: Sequence[Tensor | Sequence[int]], multiple: int = TOKENS_MULTIPLE) -> tuple[Tensor, Tensor]:
    """Captions of a batch on the right padded to the longest one, rounded up to a multiple.

    Args:
        captions: B lists or tensors of shape (T,), each with at least one token.
    Returns:
        tokens (B, T) int64, and mask (B, T) bool, True where there is a token.
    Raises:
        ValueError: no caption at all, or one without a token.
    """
    rows = [torch.as_tensor(caption, dtype=torch.int64) for caption in captions]
    if not rows or min(len(row) for row in rows) == 0:
        raise ValueError(f"{len(rows)} captions, one of them without tokens; encode_caption never gives an empty one")
    T = -(-max(len(row) for row in rows) // multiple) * multiple
    tokens = torch.full((len(rows), T), PADDING)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(T) < lengths[:, None]
