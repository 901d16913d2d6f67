"""Captions as hidden states of a frozen text encoder, for the cache.  T text tokens, E width."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dataset_loading.files import fingerprint_of_bytes
from model.text.feature_extractors import FrozenTextEncoder


def caption_states(encoder: FrozenTextEncoder, captions: list[str], max_tokens: int) -> list[Tensor]:
    """The last hidden states of each caption's own tokens.

    Args:
        max_tokens: captions are cut to so many tokens, or fewer where the encoder has fewer positions.
    Returns: for each caption (T, E) bfloat16, T >= 1.
    Raises: ValueError: a caption has no token.
    """
    states, mask = encoder(captions, max_tokens)
    ragged = [one[kept].cpu().clone() for one, kept in zip(states, mask)]
    for caption, one in zip(captions, ragged):
        if not len(one):
            raise ValueError(
                f"the caption {caption!r} has no tokens for --text_encoder {encoder.name}; give all images "
                "captions, or take an encoder whose tokenizer marks the end of a text, such as T5, BERT or CLIP"
            )
    return ragged


def text_encoder_fingerprint(encoder: FrozenTextEncoder) -> str:
    """16 hexadecimal digits that name the encoder's weights and vocabulary, not its path."""

    def chunks() -> Iterator[object]:
        yield repr(sorted(encoder.tokenizer.get_vocab().items())).encode()
        for name, tensor in sorted(encoder.model.state_dict().items()):
            yield name.encode()
            yield tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()

    return fingerprint_of_bytes(chunks())
