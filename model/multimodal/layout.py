"""From parts (text, image, audio) to streams of tokens: special tokens, positions, spans, targets.

    text to image    <bos> t1 .. tn <boi> [noise 1 .. m]
    image to text    <bos> <boi> [clean 1 .. m] <eoi> t1 .. tn <eos>
    text to audio    <bos> t1 .. tn <boa> <length k> [noise 1 .. k]
    audio to text    <bos> <boa> <length k> [clean 1 .. k] <eoa> t1 .. tn <eos>

The first part of a stream is its condition and no target, unless it is the only one. A span that is a target has a
noise copy; where something follows, a clean copy with the same positions comes next.

Text counts its positions. All tokens of an image share one. Those of audio are spread over the positions of the text
that it speaks: with n tokens of text from position s on, token f of k is at s - 0.5 + (f + 0.5) n / k. Without a text
before it, or with audio_position="count", audio counts.  W latent values of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.language_head import IGNORED
from model.layers import to_device
from model.multimodal.mask import OUTSIDE, Placement
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import SPANS, Modality


@dataclass
class Part:
    """A piece of a stream in one modality.

    Args:
        modality: of the piece.
        ids: tokens of a text.
        latents: tokens of a span, (m, W), see `image_tokens` and `audio_tokens`.
        n_tokens: number of tokens of a span whose latents are not at hand; default: that of `latents`.
    """

    modality: Modality
    ids: Sequence[int] = ()
    latents: Tensor | None = None
    n_tokens: int = 0

    def __post_init__(self):
        if self.latents is not None:
            self.n_tokens = len(self.latents)


class SpanPlace(NamedTuple):
    """One copy of a span in a stream: its first token and their number; `part` is the number of its part."""

    modality: Modality
    part: int
    start: int
    n_tokens: int
    is_noisy: bool


@dataclass
class Stream:
    """A stream as lists, one entry per token; `labels` are the tokens that are targets, otherwise -100. Tokens see
    those of their own `document` alone."""

    ids: list[int] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    copy: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[SpanPlace] = field(default_factory=list)
    cursor: float = 0.0  # The position of the next token.
    text: tuple[float, int] = (0.0, 0)  # First position and number of tokens of the last text.

    def add_token(self, token: int, is_target: bool = False) -> None:
        """Append a token of text or a special token at the next position."""
        self.add(token, self.cursor, is_target=is_target)
        self.cursor += 1

    def add_documents(self, ids: Sequence[int], documents: Sequence[int]) -> None:
        """Append packed documents: each token but the first of a document is a target. documents: number of each."""
        for token, before, document in zip(ids, [None, *documents], documents):
            self.add_token(int(token), document == before)
            self.document[-1] = document

    def add(self, token: int, position: float, *, is_target: bool = False, span: int = OUTSIDE, copy: int = 0) -> None:
        """Append a token."""
        self.ids.append(token)
        self.positions.append(position)
        self.document.append(0)
        self.span.append(span)
        self.copy.append(copy)
        self.labels.append(token if is_target else IGNORED)

    def __len__(self) -> int:
        return len(self.ids)


def build_stream(config: MegaTransformerConfig, parts: Sequence[Part], *, is_open: bool = False) -> Stream:
    """The stream of some parts, see the module's table.

    Args:
        is_open: a prompt, to be continued: nothing is a target, spans are clean, and no token ends the stream.
    Raises: ValueError: a span without tokens, or one that is longer than the model's longest.
    """
    stream = Stream()
    stream.add_token(config.bos_token_id)  # type: ignore[arg-type]
    for number, part in enumerate(parts):
        is_target = not is_open and (number > 0 or len(parts) == 1)
        is_last = number == len(parts) - 1
        if part.modality == "text":
            add_text(stream, part.ids, is_target)
            if is_last and not is_open:
                stream.add_token(config.eos_token_id, is_target)  # type: ignore[arg-type]
            continue
        # A span: begin token, length, noise copy, clean copy, end token.
        check_span(config, part)
        add_opening(stream, config, part, is_target)
        offsets, advance = span_positions(config, part.modality, part.n_tokens, cursor=stream.cursor, text=stream.text)
        copies = [1] * is_target + [0] * (not is_target or not is_last)
        for copy in copies:
            stream.spans.append(SpanPlace(part.modality, number, len(stream), part.n_tokens, copy > 0))
            for position in offsets:
                stream.add(config.pad_token_id or 0, position, span=number, copy=copy)
        stream.cursor += advance
        if not is_last or is_open:
            stream.add_token(getattr(config, f"{part.modality}_end_token_id"))
    return stream


def add_text(stream: Stream, ids: Sequence[int], is_target: bool = False) -> None:
    """Append the tokens of a text, over which audio that follows is spread."""
    if len(ids):
        stream.text = (stream.cursor, len(ids))
    for token in ids:
        stream.add_token(int(token), is_target)


def add_opening(stream: Stream, config: MegaTransformerConfig, part: Part, is_target: bool) -> None:
    """Append the token that begins a span, and for audio its length."""
    stream.add_token(getattr(config, f"{part.modality}_begin_token_id"), is_target)
    if part.modality == "audio":
        stream.add_token(length_token(config, part.n_tokens), is_target)


def check_span(config: MegaTransformerConfig, part: Part) -> None:
    """Raises: ValueError: a modality that the model lacks, no token, or more tokens than a span may have."""
    if part.modality not in config.modalities:
        raise ValueError(f"a part of modality {part.modality!r}: this model has modalities={config.modalities}")
    limit = config.audio_max_tokens if part.modality == "audio" else config.image_n_tokens
    if not 0 < part.n_tokens <= limit or (part.modality == "image" and part.n_tokens != limit):
        rule = f"1 to audio_max_tokens={limit}" if part.modality == "audio" else f"{limit}"
        raise ValueError(f"a span of {part.modality} has {part.n_tokens} tokens; it must have {rule}")


def length_token(config: MegaTransformerConfig, n_tokens: int) -> int:
    """The token that says how many tokens a span of audio has."""
    return config.audio_length_token_id + n_tokens - 1  # type: ignore[operator]


def span_positions(
    config: MegaTransformerConfig, modality: Modality, n_tokens: int, *, cursor: float, text: tuple[float, int]
) -> tuple[list[float], int]:
    """Positions of a span's tokens, and by how many positions the next token comes after `cursor`, where it begins."""
    if modality == "image":
        return [cursor] * n_tokens, 1
    start, n_text = text
    if config.audio_position == "text" and n_text:
        return [start - 0.5 + (f + 0.5) * n_text / n_tokens for f in range(n_tokens)], 0
    return [cursor + f for f in range(n_tokens)], n_tokens


def target_kinds(config: MegaTransformerConfig, targets: Tensor) -> dict[str, Tensor]:
    """Which targets are text, which begin a span, and which are lengths of audio: name -> bool of the targets' shape.

    What begins a span is no text: whether one begins is often not in the stream but in the task that was drawn, so
    that its entropy would drown the text's.
    """
    begins = [getattr(config, f"{name}_begin_token_id") for name in SPANS if name in config.modalities]
    is_begin = torch.isin(targets, to_device(torch.tensor(begins), targets.device))
    is_length = torch.zeros_like(is_begin)
    if "audio" in config.modalities:
        first: int = config.audio_length_token_id  # type: ignore[assignment]
        is_length = (targets >= first) & (targets < first + config.audio_max_tokens)
    return {"text": (targets != IGNORED) & ~is_begin & ~is_length, "begin": is_begin, "length": is_length}


def target_places(config: MegaTransformerConfig, targets: Tensor) -> dict[str, Tensor]:
    """The same as numbers of positions in the flattened targets, in order: name -> (N,) int64. Without any of a kind
    the first position, which does not count. Of targets on a GPU, their number is waited for."""
    places = {}
    for name, is_kind in target_kinds(config, targets).items():
        chosen = is_kind.flatten().nonzero()[:, 0]
        places[name] = chosen if len(chosen) else chosen.new_zeros(1)
    return places


class StreamBatch(NamedTuple):
    """Streams side by side, padded on the right: ids, labels (B, L) int64; positions (B, L) fp32; placement."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    placement: Placement


def join_streams(streams: Sequence[Stream], padding: int) -> StreamBatch:
    """A batch of streams, each a row of its own."""
    lengths = [len(stream) for stream in streams]
    size = (len(streams), max(lengths))
    ids, labels = torch.full(size, padding), torch.full(size, IGNORED)
    positions, copy = torch.zeros(size), torch.zeros(size, dtype=torch.int64)
    document, span = torch.full(size, OUTSIDE), torch.full(size, OUTSIDE)
    for row, (stream, length) in enumerate(zip(streams, lengths)):
        ids[row, :length] = torch.tensor(stream.ids)
        labels[row, :length] = torch.tensor(stream.labels)
        positions[row, :length] = torch.tensor(stream.positions)
        span[row, :length] = torch.tensor(stream.span)
        copy[row, :length] = torch.tensor(stream.copy)
        document[row, :length] = torch.tensor(stream.document)
    index = torch.arange(size[1]).expand(size)
    return StreamBatch(ids, labels, positions, Placement(document, index, span, copy))


# ---- Latents as tokens.


def image_tokens(latents: Tensor, patch: int) -> Tensor:
    """Image latents (..., Z, y, x) -> tokens (..., m, Z patch^2), row by row."""
    *lead, Z, rows, columns = latents.shape
    x = latents.reshape(-1, Z, rows // patch, patch, columns // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(*lead, rows * columns // patch**2, Z * patch**2)


def image_latents(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `image_tokens`, of square images: (..., m, Z patch^2) -> (..., Z, y, x)."""
    *lead, m, width = tokens.shape
    side, Z = round(m**0.5), width // patch**2
    x = tokens.reshape(-1, side, side, Z, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(*lead, Z, side * patch, side * patch)


def audio_tokens(latents: Tensor, patch: int) -> Tensor:
    """Audio latents (L, Z) -> tokens (k, Z patch); the last frame is repeated to fill the last token."""
    missing = -len(latents) % patch
    latents = torch.cat([latents, latents[-1:].expand(missing, -1)]) if missing else latents
    return latents.reshape(-1, patch * latents.shape[1])


def audio_latents(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `audio_tokens`, the filled frames among them: (k, Z patch) -> (k patch, Z)."""
    return tokens.reshape(len(tokens) * patch, -1)
