"""Captions as hidden states of a frozen text encoder, for caches of latents.  T text tokens, E width."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dataset_loading.files import fingerprint_of_bytes
from model.text.feature_extractors import FrozenTextEncoder


def open_text_encoder(name: str, remedy: str) -> FrozenTextEncoder:
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
                f"the caption {caption!r} has no tokens with --text_encoder {encoder.name}; give all images "
                "captions, or use an encoder whose tokenizer marks the end of a text, such as T5, BERT or CLIP"
            )
    return ragged


def text_encoder_fingerprint(encoder: FrozenTextEncoder) -> str:
    """16 hexadecimal digits of a hash of the encoder's weights and vocabulary."""

    def chunks() -> Iterator[object]:
        yield repr(sorted(encoder.tokenizer.get_vocab().items())).encode()
        for name, tensor in sorted(encoder.model.state_dict().items()):
            yield name.encode()
            yield tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()

    return fingerprint_of_bytes(chunks())
