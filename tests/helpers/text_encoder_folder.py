"""A small BERT with random weights and a tokenizer of a few words, saved as a pretrained model is."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from model.text.tokenizer import FIRST_BYTE

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "disc", "very", "long", "caption"]


def save_text_encoder(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Another seed gives other weights."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def text_of(tokens: list[int]) -> str:
    """The caption of byte tokens; padding and begin-of-text are left out."""
    return bytes(token - FIRST_BYTE for token in tokens if token >= FIRST_BYTE).decode()
