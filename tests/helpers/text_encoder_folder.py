"""Small networks with random weights, saved as pretrained ones are: BERT, and networks for features of images."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

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


SIDE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """CLIP with 8 features, its image processor and a tokenizer."""
    save_text_encoder(folder)
    torch.manual_seed(1)
    text = {
        **SMALL,
        "intermediate_size": 32,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "eos_token_id": 3,
    }
    vision = {**SMALL, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(**SIDE).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """DINOv2 with 16 features and its image processor."""
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8)).save_pretrained(folder)
    CLIPImageProcessor(**SIDE).save_pretrained(folder)
    return folder


class PooledPixels(torch.nn.Module):
    """Stands in for the Inception network: it takes 8-bit images of any size, and has the argument return_features."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, 3 * 16, generator=torch.Generator().manual_seed(2)))

    def forward(self, image: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(image.to(self.weight.dtype) / 255, 4).flatten(1)
        return pooled @ self.weight.T if return_features else pooled


def save_torchscript(file: Path, network: torch.nn.Module | None = None) -> Path:
    torch.jit.script(network or PooledPixels()).save(str(file))
    return file
