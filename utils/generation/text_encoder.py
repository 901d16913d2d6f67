"""Captions as hidden states of a frozen text encoder, for caches of latents.  T text tokens, E width."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_loading.files import fingerprint_of_bytes
from model.text.feature_extractors import FrozenTextEncoder
from model.text.tokenizer import encode_caption
from utils.checkpoints import places


def open_text_encoder(name: str, remedy: str = "give another --text_encoder, or copy it again") -> FrozenTextEncoder:
    """The encoder of a local folder or hub name.

    Raises: FileNotFoundError: there is none, or its files are damaged; names it and the remedy.
    """
    try:
        return FrozenTextEncoder(name)
    except Exception as error:  # What libraries raise on damaged files depends on their bytes.
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"the text encoder {name} cannot be loaded ({reason}); {remedy}") from error


def caption_states(encoder: FrozenTextEncoder, captions: list[str], max_tokens: int) -> list[Tensor]:
    """The last hidden states of each caption, without padding.

    Args:
        max_tokens: captions are truncated to this number of tokens, or to the number of positions of the encoder.
    Returns: for each caption (T, E) bfloat16, T >= 1.
    Raises: ValueError: a caption has no token.
    """
    states, mask = encoder(captions, max_tokens)  # (B, T, E), (B, T)
    # Copies, since a view would keep the whole batch in memory.
    ragged = [row[is_token].cpu().clone() for row, is_token in zip(states, mask)]
    for caption, row in zip(captions, ragged):
        if not len(row):
            raise ValueError(
                f"the caption {caption!r} has no tokens with --text_encoder {encoder.name}; give all samples "
                "captions, or use an encoder whose tokenizer marks the end of a text, such as T5, BERT or CLIP"
            )
    return ragged


def lost_by_cut(caption: str, max_tokens: int, encoder: FrozenTextEncoder | None) -> str:
    """What a caption loses at `max_tokens`, in words; `""` where nothing. Without an encoder tokens are bytes."""
    limit = min(max_tokens, encoder.tokenizer.model_max_length) if encoder else max_tokens
    tokens = encoder.tokenizer(caption).input_ids if encoder else encode_caption(caption, 2 + 4 * len(caption))
    return f"with a caption cut at {limit} tokens (--max_tokens)" if len(tokens) > limit else ""


def text_encoder_fingerprint(encoder: FrozenTextEncoder) -> str:
    """16 hexadecimal digits of a hash of the encoder's weights and vocabulary."""

    def chunks() -> Iterator[object]:
        yield repr(sorted(encoder.tokenizer.get_vocab().items())).encode()
        for name, tensor in sorted(encoder.model.state_dict().items()):
            yield name.encode()
            yield tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()

    return fingerprint_of_bytes(chunks())


def load_text_encoder(latents: Mapping[str, Any], given: str = "", *, near: Path = Path()) -> FrozenTextEncoder | None:
    """The frozen text encoder of cached latents; None where captions are bytes.

    Args:
        latents: settings of the cache's manifest.
        given: folder or hub name that the user gives; empty: the recorded one.
        near: a run or cache, from which a recorded folder is looked up where all have moved together.
    Raises:
        FileNotFoundError: there is none of that name, or its files are damaged.
        ValueError: the encoder with this name has other weights or another vocabulary than in preprocessing, or one
            was given and captions are bytes.
    """
    # Captions as bytes need no encoder.
    if not latents["text_encoder"]:
        if given:
            raise ValueError(f"--text_encoder {given} has no effect: the captions of these latents are bytes")
        return None
    # A folder, or else a name on the hub.
    recorded = latents["text_encoder"]
    folder = next((place for place in places(recorded, near) if (place / "config.json").is_file()), recorded)
    name, expected = given or str(folder), latents["text_encoder_fingerprint"]
    encoder = open_text_encoder(name, f"name the one with fingerprint {expected} with --text_encoder")
    # A name does not identify weights: those of a hub model may have changed.
    fingerprint = text_encoder_fingerprint(encoder)
    if fingerprint != expected:
        raise ValueError(
            f"the text encoder {encoder.name} has fingerprint {fingerprint}, but the captions were encoded by "
            f"{expected}; give that encoder with --text_encoder, or preprocess the latents again"
        )
    return encoder
