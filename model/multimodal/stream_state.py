"""What a generation of streams holds: its options, answers that are at work, rows with their cache.

R rows, S keys, n new tokens, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.kv_cache import KeyValueCache, take_back
from model.multimodal.layout import Part, Stream
from model.thinking import CarriedState
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import SPANS, Modality, SamplerKind


@dataclass
class Sampling:
    """How answers are sampled.

    Args:
        begin: modality whose span comes right after the prompt; None: the model decides.
        modalities: that an answer may have. Without text it ends with the span of `begin`.
        max_new_tokens: maximum number of text tokens of an answer.
        max_spans: maximum number of images and clips of an answer.
        temperature: of text; 0: the most probable token.
        length_temperature: of the length of audio; 0: the most probable one.
        guidance_scale, sampler, n_steps: modality -> value; default: the configuration's.
        n_thinking_steps: steps of the recurrent core; default: the configuration's.
        n_carried_steps: steps of the core in the solver's evaluations after the first, which go on from the state of
            the one before; None: each begins anew and takes all steps.
    """

    begin: Modality | None = None
    modalities: Sequence[Modality] = ("text", "image", "audio")
    max_new_tokens: int = 64
    max_spans: int = 4
    temperature: float = 0.0
    length_temperature: float = 0.0
    guidance_scale: dict[str, float] = field(default_factory=dict)
    sampler: dict[str, SamplerKind] = field(default_factory=dict)
    n_steps: dict[str, int] = field(default_factory=dict)
    n_thinking_steps: int | None = None
    n_carried_steps: int | None = None

    def guidance(self, config: MegaTransformerConfig, modality: str) -> float:
        """Scale of the guidance of a modality."""
        default: float = getattr(config, f"{modality}_guidance_scale")
        return self.guidance_scale.get(modality, default)

    def check(self, config: MegaTransformerConfig) -> None:
        """Raises: ValueError: an option contradicts another one, or has no effect with this configuration."""
        names = [*self.modalities, *([self.begin] if self.begin else [])]
        if unknown := sorted(set(names) - set(config.modalities)):
            raise ValueError(f"modality {unknown[0]!r}: this model has modalities={config.modalities}")
        if "text" not in self.modalities and self.begin not in SPANS:
            raise ValueError(f"begin={self.begin!r}: an answer without text needs begin='image' or begin='audio'")
        # Options of a modality, and of the recurrent core.
        spans = set(SPANS) & set(config.modalities)
        for option in ("guidance_scale", "sampler", "n_steps"):
            if absent := sorted(set(getattr(self, option)) - spans):
                raise ValueError(
                    f"{option} of {absent[0]!r} has no effect: this model has modalities={config.modalities}"
                )
        for name, scale in self.guidance_scale.items():
            if scale != 1 and not getattr(config, f"{name}_condition_dropout"):
                raise ValueError(
                    f"guidance_scale={scale} of {name!r}: the model was trained with {name}_condition_dropout=0 and "
                    "knows no stream without its text; give 1"
                )
        thinking = {"n_thinking_steps": self.n_thinking_steps, "n_carried_steps": self.n_carried_steps}
        for option, value in thinking.items():
            if value is not None and not config.n_recurrent_layers:
                raise ValueError(f"{option}={value} has no effect: this model has no recurrent core")


@dataclass
class Answer:
    """An answer while it is generated: complete parts, the tokens of the text at work, and counts."""

    begin: Modality | None
    parts: list[Part] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    n_text: int = 0
    n_spans: int = 0
    is_open: bool = True


class Rows(list[int]):
    """Numbers of rows, which `guided_denoiser` joins."""

    def cat(self, other: "Rows") -> "Rows":
        """These and other rows."""
        return Rows(self + other)


class StreamState:
    """The rows of a generation: the cache, which of its keys are tokens of each row, and where each row stands.

    Attributes:
        cache: keys and values of everything fed so far.
        is_token: (R, S) bool, keys that the row sees.
        streams: the next position and the last text of each row; their tokens are not kept.
        sampling: options.
        logits: (R, V) fp32 at each row's last token.
        carried: the core's state of a span that is being solved, where it is carried over.
    """

    carried: CarriedState | None = None

    def __init__(self, streams: list[Stream], is_token: Tensor, sampling: Sampling):
        self.streams, self.is_token, self.sampling, self.cache = streams, is_token, sampling, KeyValueCache()
        self.logits = torch.empty(0)

    def mask(self, is_new: Tensor) -> Tensor:
        """The keys that new tokens of one piece see, is_new (R, n) bool: the past, and each other in both directions,
        (R, 1, n, S + n). Padding sees itself."""
        n = is_new.shape[1]
        past = self.is_token[:, None].expand(-1, n, -1)
        among = is_new[:, None] | torch.eye(n, dtype=torch.bool, device=is_new.device)
        return torch.cat([past, among], dim=2)[:, None]

    def forget_new(self) -> None:
        """Drop the keys that a span has written, from the slots that it has written to."""
        for slot, layer in enumerate(self.cache.layers):
            if (n_new := layer.get_seq_length() - self.is_token.shape[1]) > 0:
                take_back(self.cache, slot, n_new)


def at(rows: Sequence[int], n_rows: int, token: int) -> list[int | None]:
    """A token in some rows, None in the others."""
    return [token if row in rows else None for row in range(n_rows)]


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """An index of logits (V,): the largest at temperature 0, otherwise sampled."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(-1).to(generator.device)
    return int(torch.multinomial(probabilities, 1, generator=generator))
