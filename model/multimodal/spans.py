"""What stands between latents and the stream: an encoder and a decoder of each modality's spans.

N spans, m tokens, W latent values of a token, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import LayerInputs, SimpleBlock
from model.cpu_kernels import Linear
from model.dropout import fold
from model.layers import ZeroLinear
from model.multimodal.layout import SpanPlace, Stream
from model.multimodal.mask import span_mask
from model.norms import build_norm
from model.positions import rotary_frequencies, rotary_table, sinusoidal_embedding
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import Modality

TIME_WIDTH = 128  # Values of the sinusoidal embedding of a time.
TIME_SCALE = 1000.0  # Times in [0, 1] are multiplied by it, as in diffusion models.
DROPOUT_NUMBERS = {"image": 1 << 20, "audio": 1 << 21}  # Where layers of a modality begin to count for dropout.


class Spans(NamedTuple):
    """Spans of one modality in a batch, padded at the end.

    Attributes:
        latents: clean or noisy tokens, (N, m, W).
        times: in [0, 1], 0 for clean ones, (N,).
        is_noisy: whether the span is a noise copy, (N,) bool.
        lengths: tokens of each span, (N,) int64.
        rows, starts: where the span stands in the batch: its row and its first token, (N,) int64.
        copies: numbers of the noise copies, (n,) int64; None: they are read from `is_noisy`, which waits for a GPU.
    """

    latents: Tensor
    times: Tensor
    is_noisy: Tensor
    lengths: Tensor
    rows: Tensor
    starts: Tensor
    copies: Tensor | None = None

    def places(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """Where each token stands in streams of so many positions, flattened: (N, m) int64; and which are tokens,
        (N, m) bool."""
        index = torch.arange(self.latents.shape[1], device=self.starts.device)
        places = self.rows[:, None] * n_positions + self.starts[:, None] + index
        is_token = index < self.lengths[:, None]
        return torch.where(is_token, places, 0), is_token

    def select(self, chosen: Tensor) -> "Spans":
        """Some of the spans, by their numbers."""
        return Spans(*(field[chosen] for field in self[:6]))

    def noise_copies(self) -> Tensor:
        """Numbers of the noise copies, (n,) int64."""
        return self.is_noisy.nonzero()[:, 0] if self.copies is None else self.copies


def spans_in(streams: Sequence[Stream], modality: Modality) -> tuple[Tensor, list[tuple[int, SpanPlace]]]:
    """The spans of one modality in streams, in order.

    Returns: their lengths, rows and first tokens, (3, N) int64; and of each its row and place.
    """
    places = [(row, place) for row, stream in enumerate(streams) for place in stream.spans]
    places = [(row, place) for row, place in places if place.modality == modality]
    numbers = [(place.n_tokens, row, place.start) for row, place in places]
    return torch.tensor(numbers, dtype=torch.int64).view(-1, 3).T, places


class LatentLinear(Linear):
    """Projection of latents of unit variance; its outputs have a std of 0.5 at initialisation."""


class SpanEncoder(nn.Module):
    """Latents to tokens of the stream: projection, role (clean or noisy), position, time, layers within the span."""

    def __init__(self, config: MegaTransformerConfig, modality: Modality):
        super().__init__()
        self.config, self.modality = config, modality
        D = config.hidden_size
        self.in_proj = LatentLinear(config.token_width(modality), D)
        self.role = nn.Embedding(2, D)
        self.time = nn.Sequential(Linear(TIME_WIDTH, D), nn.SiLU(), Linear(D, D))
        self.prelude = SimpleBlock(config, getattr(config, f"{modality}_n_prelude_layers"))
        # Images have rows and columns, audio has frames, which rotate.
        self.side = round(config.image_n_tokens**0.5) if modality == "image" else 0
        if self.side and config.image_position_embedding == "learned":
            self.rows, self.columns = nn.Embedding(self.side, D), nn.Embedding(self.side, D)
        if modality == "audio" and config.use_rotary_embedding:
            self.frequencies = rotary_frequencies(config.rotary_width, theta=config.rotary_theta)

    def forward(self, spans: Spans, dropout_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Args: dropout_keys: (N,) int64, see `model.dropout`.

        Returns: tokens (N, m, D), and the embedded times (N, D), which the decoder needs.
        """
        times = self.time(sinusoidal_embedding(spans.times * TIME_SCALE, TIME_WIDTH).to(spans.latents.dtype))
        x = self.in_proj(spans.latents) + (self.role(spans.is_noisy.long()) + times)[:, None]
        if self.side:
            x = x + self.image_positions(x)
        shared = self.layer_inputs(spans, dropout_keys)
        return self.prelude(x, shared, 0), times

    def image_positions(self, x: Tensor) -> Tensor:
        """Embeddings of the tokens' rows and columns, (m, D)."""
        index = torch.arange(self.side**2, device=x.device)
        rows, columns = index // self.side, index % self.side
        if self.config.image_position_embedding == "learned":
            return (self.rows(rows) + self.columns(columns)).to(x.dtype)
        half = x.shape[-1] // 2
        return torch.cat([sinusoidal_embedding(places, half) for places in (rows, columns)], dim=-1).to(x.dtype)

    def layer_inputs(self, spans: Spans, dropout_keys: Tensor | None) -> LayerInputs:
        """What the layers within a span share: attention in both directions, and rotation by the frame."""
        n_tokens, device = spans.latents.shape[1], spans.latents.device
        rotary = None
        if self.modality == "audio" and self.config.use_rotary_embedding:
            rotary = rotary_table(self.frequencies, torch.arange(n_tokens, device=device)[None])
        keys = fold(dropout_keys, DROPOUT_NUMBERS[self.modality])
        mask = span_mask(spans.lengths, n_tokens)
        return LayerInputs(rotary=rotary, mask=mask, is_causal=False, dropout_keys=keys)


class SpanDecoder(nn.Module):
    """Hidden states of a noise copy to the flow's prediction: layers within the span, a norm modulated by the time,
    and a projection that starts at zero."""

    def __init__(self, config: MegaTransformerConfig, modality: Modality):
        super().__init__()
        self.coda = SimpleBlock(config, getattr(config, f"{modality}_n_coda_layers"))
        self.norm = build_norm(config)
        self.modulation = ZeroLinear(config.hidden_size, 2 * config.hidden_size)
        self.out_proj = ZeroLinear(config.hidden_size, config.token_width(modality))
        # Layers count on from those of the encoder, for dropout.
        self.first = getattr(config, f"{modality}_n_prelude_layers")

    def forward(self, hidden: Tensor, times: Tensor, shared: LayerInputs) -> Tensor:
        """Args: hidden: (N, m, D). times: embedded, (N, D). shared: of `SpanEncoder.layer_inputs`.

        Returns: (N, m, W) fp32.
        """
        hidden = self.norm(self.coda(hidden, shared, self.first))
        scale, shift = self.modulation(F.silu(times))[:, None].chunk(2, dim=-1)
        return self.out_proj(hidden * (1 + scale) + shift).float()
