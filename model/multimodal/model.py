"""One causal transformer over text, images and audio: rectified flow on whole spans within a language model.

B batch, L positions, D hidden, V vocabulary, N spans of a modality, m tokens of the longest one, W values of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import ModelOutput

from model.attention import LayerInputs
from model.causal import MegaTransformerModel, MegaTransformerPreTrainedModel
from model.diffusion_process import DiffusionProcess
from model.language_head import IGNORED, LanguageModelHead, language_model_loss, next_token_targets
from model.layers import ZeroLinear
from model.multimodal.generation import MultimodalGenerationMixin
from model.multimodal.layout import target_kinds
from model.multimodal.layout import target_places as target_places_of
from model.multimodal.mask import Placement, stream_blocks, stream_mask
from model.multimodal.spans import LatentLinear, SpanDecoder, SpanEncoder, Spans
from model.presets import MULTIMODAL
from model.thinking import Thinking
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import SPANS, Modality
from utils.options import from_preset


@dataclass
class MultimodalOutput(ModelOutput):
    """What `MegaTransformerMultimodal.forward` returns.

    Args:
        text_loss: cross-entropy in nats of the text's targets over their number, with the z-loss; fp32.
        begin_loss, length_loss: the same of the tokens that begin a span, and of the lengths of audio.
        nats, hits: cross-entropy of the next token, and whether it is the most probable one, (B, L - 1) fp32, 0 where
            there is no target. No hits where the loss is computed in chunks.
        predictions: modality -> the flow's prediction for its noise copies, in order, (N_noisy, m, W) fp32; where
            a batch has none, zeros of another shape. All of them must be in the loss, so that every parameter has a
            gradient, and processes that shard parameters run the same layers.
        thinking_steps: steps of the core per token, (B, L) int64; None without a core.
    """

    text_loss: Tensor | None = None
    begin_loss: Tensor | None = None
    length_loss: Tensor | None = None
    nats: Tensor | None = None
    hits: Tensor | None = None
    predictions: dict[str, Tensor] | None = None
    thinking_steps: Tensor | None = None


@dataclass
class EncodedSpans:
    """Spans of one modality within the stream.

    Args:
        spans: what was encoded.
        tokens: (N, m, D).
        times: embedded, (N, D).
        shared: inputs of the layers within the spans.
    """

    spans: Spans
    tokens: Tensor
    times: Tensor
    shared: LayerInputs

    def select(self, chosen: Tensor) -> "EncodedSpans":
        """Some of the spans, by their numbers."""
        shared = LayerInputs(
            rotary=self.shared.rotary,
            mask=None if self.shared.mask is None else self.shared.mask[chosen],
            is_causal=False,
            dropout_keys=None if self.shared.dropout_keys is None else self.shared.dropout_keys[chosen],
        )
        return EncodedSpans(self.spans.select(chosen), self.tokens[chosen], self.times[chosen], shared)


class MegaTransformerMultimodalEncoder(nn.Module):
    """Embedded tokens and latents to the stream: a `SpanEncoder` per modality."""

    def __init__(self, config: MegaTransformerConfig):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict({name: SpanEncoder(config, name) for name in SPANS if name in config.modalities})

    def encode(self, modality: Modality, spans: Spans, dropout_keys: Tensor | None = None) -> EncodedSpans:
        """Encode spans of one modality; dropout_keys: (B,) int64 of the rows."""
        keys = None if dropout_keys is None else dropout_keys[spans.rows]
        encoder: Any = self.encoders[modality]
        tokens, times = encoder(spans, keys)
        return EncodedSpans(spans, tokens, times, encoder.layer_inputs(spans, keys))

    def forward(
        self, embeddings: Tensor, spans: Mapping[str, Spans], dropout_keys: Tensor | None = None
    ) -> tuple[Tensor, dict[str, EncodedSpans]]:
        """Put spans in their places.

        Args:
            embeddings: of the tokens, (B, L, D).
            spans: modality -> its spans.
            dropout_keys: (B,) int64.
        Returns: the stream (B, L, D), and the encoded spans. Of modalities without spans a span of zeros is encoded,
            which the stream gets times zero: every parameter has a gradient, and processes that gather sharded
            parameters run the same layers in the same order, forward and backward.
        """
        stream, encoded = embeddings.flatten(0, 1), {}
        for name in self.encoders:
            if name not in spans:
                encoded[name] = self.encode(name, self.no_span(name, embeddings))  # type: ignore[arg-type]
                stream = stream + 0.0 * encoded[name].tokens.sum().to(stream.dtype)
                continue
            encoded[name] = self.encode(name, spans[name], dropout_keys)  # type: ignore[arg-type]
            # Padding goes to a place after the end, which is cut off: nothing waits for the number of tokens.
            places, is_token = spans[name].places(embeddings.shape[1])
            places = torch.where(is_token, places, len(stream)).flatten()
            tokens = encoded[name].tokens.flatten(0, 1).to(stream.dtype)
            stream = torch.cat([stream, stream.new_zeros(1, stream.shape[1])]).index_put((places,), tokens)[:-1]
        return stream.view(embeddings.shape), encoded

    def no_span(self, modality: str, like: Tensor) -> Spans:
        """A clean span of one token of zeros, of an image of all, at the beginning of the first row."""
        m = self.config.image_n_tokens if modality == "image" else 1
        zero = torch.zeros(1, dtype=torch.int64, device=like.device)
        latents = like.new_zeros(1, m, self.config.token_width(modality))
        return Spans(latents, like.new_zeros(1), zero.bool(), zero + m, zero, zero, copies=zero[:0])


class MegaTransformerMultimodal(MegaTransformerPreTrainedModel, MultimodalGenerationMixin):
    """Text, images and audio in and out of one stream.

    The trunk is that of the language model, with the same names of weights. Spans are encoded by layers of their own,
    pass the trunk with all other tokens, and noise copies are decoded to the prediction of a flow.

    Raises: ValueError: the configuration lacks a modality beside text, or a special token.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    uses_flex_attention = False  # In the trunk of whole streams, instead of a dense mask; trains on GPUs alone.

    def __init__(self, config: MegaTransformerConfig):
        super().__init__(config)
        names = [name for name in SPANS if name in config.modalities]
        required = ["bos_token_id", "eos_token_id", "null_token_id"]
        required += [f"{name}_{end}_token_id" for name in names for end in ("begin", "end")]
        required += ["audio_length_token_id"] * ("audio" in names)
        for field in required:
            config.expect(getattr(config, field) is not None, field, "must be given for a multimodal model")
        config.expect(bool(names), "modalities", "must name audio or image; for text alone use the causal model")
        # Trunk and head are those of the language model.
        self.model = MegaTransformerModel(config)
        extras = {"z_loss_weight": config.z_loss_weight, "chunk_size": config.loss_chunk_size}
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, **extras)
        self.encoder = MegaTransformerMultimodalEncoder(config)
        self.decoders = nn.ModuleDict({name: SpanDecoder(config, name) for name in names})  # type: ignore[arg-type]
        self.processes = {name: flow_process(config, name) for name in names}
        self.post_init()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MegaTransformerMultimodal":
        """A new model of a row of `model.presets.MULTIMODAL`, with some fields replaced."""
        return cls(from_preset(MegaTransformerConfig, MULTIMODAL, name, **overrides))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """LatentLinear: weight normal with a std that gives outputs of std 0.5; ZeroLinear: 0; others as the trunk."""
        super()._init_weights(module)
        if isinstance(module, LatentLinear):
            initialization.normal_(module.weight, std=0.5 / module.in_features**0.5)
        elif isinstance(module, ZeroLinear):
            initialization.zeros_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        placement: Placement,
        *,
        spans: Mapping[str, Spans] | None = None,
        labels: Tensor | None = None,
        target_places: Mapping[str, Tensor] | None = None,
        n_targets: Mapping[str, Tensor | float] | None = None,
        thinking: Thinking | None = None,
        dropout_keys: Tensor | None = None,
    ) -> MultimodalOutput:
        """Whole streams at once, as in training.

        Args:
            input_ids: (B, L); whatever it says in the places of spans is not read.
            position_ids: (B, L) fp32, fractions among them, see `model.multimodal.layout`.
            placement: (B, L) each.
            spans: modality -> its spans; those without any may be missing.
            labels: (B, L), the tokens that are targets, -100 elsewhere (they are shifted here).
            target_places: those of `labels` as `model.multimodal.layout.target_places` gives them; default: taken from
                `labels`, which waits for a GPU.
            n_targets: `text`, `begin` and `length`, what the sums of their losses are divided by; default: their
                numbers.
            thinking: options of the recurrent core.
            dropout_keys: (B,) int64, see `model.dropout`.
        """
        given = dict(spans or {})
        embeddings = self.model.embed_tokens(input_ids)
        stream, encoded = self.encoder(embeddings, given, dropout_keys)
        output = self.model(
            inputs_embeds=stream,
            position_ids=position_ids,
            attention_mask=(stream_blocks if self.uses_flex_attention else stream_mask)(placement),  # type: ignore
            use_cache=False,
            thinking=thinking,
            return_dict=True,
            dropout_keys=dropout_keys,
        )
        hidden = output.last_hidden_state

        # Predictions for the noise copies. A decoder without any runs on other tokens, and counts for nothing.
        predictions, last_place = {}, hidden.shape[0] * hidden.shape[1] - 1
        for name, decoder in self.decoders.items():
            copies = encoded[name].spans.noise_copies()
            is_used = len(copies) > 0
            chosen = encoded[name].select(copies) if is_used else encoded[name]
            places, _ = chosen.spans.places(hidden.shape[1])
            states = hidden.flatten(0, 1)[places.clamp_max(last_place)]
            prediction = decoder(states, chosen.times, chosen.shared)
            predictions[name] = prediction if is_used else 0.0 * prediction
        results: dict[str, Any] = {}
        if labels is not None:
            targets = next_token_targets(labels)
            chosen = target_places or target_places_of(self.config, targets)
            results = self.head_outputs(hidden, targets, chosen=chosen, n_targets=n_targets or {})
        return MultimodalOutput(predictions=predictions, thinking_steps=output.thinking_steps, **results)

    def head_outputs(
        self, hidden: Tensor, targets: Tensor, *, chosen: Mapping[str, Tensor], n_targets: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Losses, nats and hits of each kind of target (B, L), from the normed hidden states (B, L, D); `chosen` are
        the places of its kinds."""
        # Only positions with a target reach the head; without any the first one does, and does not count.
        results: dict[str, Any] = {}
        shape, hidden, targets = targets.shape, hidden.flatten(0, 1), targets.flatten()
        nats = torch.zeros(targets.shape, device=targets.device)
        hits = None if self.config.loss_chunk_size else torch.zeros_like(nats)
        for name, is_kind in target_kinds(self.config, targets).items():
            places = chosen[name]
            chosen_targets = targets[places].where(is_kind[places], IGNORED)
            loss, values, _, logits = language_model_loss(
                self.lm_head,
                hidden[places],
                chosen_targets,
                n_targets=n_targets.get(name),
                z_loss_weight=self.config.z_loss_weight,
            )
            results[f"{name}_loss"] = loss
            counts = chosen_targets != IGNORED
            nats[places] = torch.where(counts, values, nats[places])
            if hits is not None:
                hits[places] = torch.where(counts, (logits.argmax(-1) == chosen_targets).float(), hits[places])
        hits = None if hits is None else hits.view(shape)[:, :-1]
        return {**results, "nats": nats.view(shape)[:, :-1], "hits": hits}


def flow_process(config: MegaTransformerConfig, modality: str) -> DiffusionProcess:
    """The rectified flow of a modality."""
    prediction, shift = (getattr(config, f"{modality}_{name}") for name in ("prediction", "time_shift"))
    return DiffusionProcess("rectified_flow", prediction, time_shift=shift)
