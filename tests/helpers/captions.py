"""Byte tokens back to text, to check what was encoded."""

from model.text.tokenizer import FIRST_BYTE


def text_of(tokens: list[int]) -> str:
    """The caption of byte tokens; padding and begin-of-text are left out."""
    return bytes(token - FIRST_BYTE for token in tokens if token >= FIRST_BYTE).decode()
