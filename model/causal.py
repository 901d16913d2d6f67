"""The causal transformer: embedding, prelude, main layers, recurrent core, coda, language-model head.

B batch, L positions, S keys, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.attention import LayerInputs, OutputLinear, SimpleBlock
from model.checkpointing import is_checkpointing
from model.dropout import Dropout, check_keys, fold
from model.generation import CausalGenerationMixin
from model.kv_cache import CACHE_NAME, CACHE_NAMES, CacheOutput, KeyValueCache, chosen_cache
from model.language_head import LanguageModelHead, chosen_divisor, language_model_loss, next_token_targets
from model.norms import LayerNorm, RMSNorm, build_norm
from model.positions import (
    alibi_bias,
    check_attention_mask,
    positions_in_segments,
    rotary_frequencies,
    rotary_table,
    sinusoidal_embedding,
    visible_keys,
)
from model.presets import MEGATRANSFORMER
from model.recurrent import MegaTransformerRecurrentBlock
from model.thinking import ResolvedThinking, Thinking
from utils.configuration import MegaTransformerConfig
from utils.options import from_preset


@dataclass
class BackboneOutput(CacheOutput, BaseModelOutputWithPast):
    """What `MegaTransformerModel.forward` returns.

    Args:
        last_hidden_state: (B, L, D), normed.
        cache: the cache, where one is used; also as `past_key_values`.
        hidden_states: what each layer reads, then `last_hidden_state`, each (B, L, D), where asked for.
        attentions: weights of each layer, (B, H, L, S), where asked for (eager attention only).
        thinking_steps: steps of the core per token, (B, L) int64; None without a core.
    """

    thinking_steps: Tensor | None = None


@dataclass
class CausalOutput(CacheOutput, CausalLMOutputWithPast):
    """What `MegaTransformerForCausalLM.forward` returns; see `BackboneOutput` for what is not named here.

    Args:
        loss: cross-entropy in nats per target, plus the weighted z-loss; fp32; None without labels.
        logits: (B, L, V), or of the last positions only; None where the loss is computed in chunks.
        cross_entropy: cross-entropy in nats of predicting the next token, (B, L - 1) fp32, 0 without a target.
        z_loss: mean squared log of the softmax's denominator, not weighted.
    """

    cross_entropy: Tensor | None = None
    z_loss: Tensor | None = None
    thinking_steps: Tensor | None = None


class MegaTransformerPreTrainedModel(PreTrainedModel):
    """What transformers has to know of every model with this stack."""

    config_class = MegaTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`
    _no_split_modules = ["MegaTransformerBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called once per module by `post_init`, and for what a checkpoint lacks.

        Linear                 weight normal, std initializer_range; bias 0
        OutputLinear           the same / sqrt(2 x effective_depth), or 0: the last layer of a residual branch
        Embedding              normal, std embedding_initializer_range
        RMSNorm, LayerNorm     weight 1, bias 0
        learned first state    normal, std recurrent_state_std
        """
        config = self.config
        if isinstance(module, OutputLinear) and config.use_zero_output_initialization:
            initialization.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            is_scaled = isinstance(module, OutputLinear) and config.use_depth_scaled_initialization
            divisor = (2 * config.effective_depth) ** 0.5 if is_scaled else 1.0
            initialization.normal_(module.weight, std=config.initializer_range / divisor)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=config.embedding_initializer_range)
        elif isinstance(module, RMSNorm | LayerNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, MegaTransformerRecurrentBlock) and hasattr(module, "learned_state"):
            initialization.normal_(module.learned_state, std=config.recurrent_state_std)
        # Biases of all of them.
        if getattr(module, "bias", None) is not None:
            initialization.zeros_(module.bias)


class MegaTransformerModel(MegaTransformerPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: MegaTransformerConfig):
        super().__init__(config)
        # Embedding: tokens and, where learned, positions.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        # The stack; a part with 0 layers does nothing.
        self.prelude = SimpleBlock(config, config.n_prelude_layers)
        self.main = SimpleBlock(config, config.n_layers)
        self.core = MegaTransformerRecurrentBlock(config) if config.n_recurrent_layers else None
        self.coda = SimpleBlock(config, config.n_coda_layers)
        self.norm = build_norm(config) if config.use_final_norm else nn.Identity()
        # Plain numbers and no buffer, so that casting the model does not round them.
        if config.use_rotary_embedding:
            self.frequencies = rotary_frequencies(
                config.rotary_width,
                theta=config.rotary_theta,
                interpolation=config.rotary_interpolation,
                ntk_factor=config.rotary_ntk_factor,
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        thinking: Thinking | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        predict: Any = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        dropout_keys: Tensor | None = None,
    ) -> BackboneOutput | tuple:
        """See `MegaTransformerForCausalLM.forward`; `predict` maps normed hidden states (N, D) to logits (N, V)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        # Input (B, L, D), and the cache, which training does without.
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_keys(dropout_keys, x.shape[0])  # `len` would fix the batch size of an exported graph.
        past_key_values = chosen_cache(cache, past_key_values)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and is_checkpointing(self):
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError(
                    "past_key_values with gradient checkpointing in train mode: layers that run again would write "
                    "twice; call gradient_checkpointing_disable()"
                )
            use_cache, past_key_values = False, None  # layers run again would write twice
        if use_cache and past_key_values is None and not self.training:
            past_key_values = KeyValueCache()
        # The options in force, and what all layers share.
        thinking = (thinking or Thinking()).resolve(self.config, self.training)
        first_slot = self.config.n_prelude_layers + self.config.n_layers  # of core and coda
        if self.core is not None:
            self.core.check_past(past_key_values, first_slot, thinking)
        shared, positions = self.share(
            x, past_key_values, attention_mask=attention_mask, position_ids=position_ids, segment_ids=segment_ids
        )
        shared.dropout_keys = dropout_keys
        shared.states = [] if self.wants("output_hidden_states", output_hidden_states) else None
        shared.weights = [] if self.wants("output_attentions", output_attentions) else None
        if thinking.exit_threshold and (shared.states is not None or shared.weights is not None):
            raise ValueError("hidden states and attentions are not kept with early exits; pass exit_threshold=0")
        if shared.weights is not None and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs attn_implementation="eager": other kernels keep no weights')

        # Layers.
        x = self.place(x, positions)
        x = self.embedding_dropout(x, fold(dropout_keys, -1))  # Layers count from 0.
        x = self.prelude(x, shared, 0)
        x = self.main(x, shared, self.config.n_prelude_layers)
        steps = None
        if self.core is None:
            x = self.coda(x, shared, first_slot)
        else:
            x, steps = self.think(
                x, shared, first_slot, thinking=thinking, attention_mask=attention_mask, predict=predict
            )
        # Outputs.
        hidden = self.norm(x)
        if shared.states is not None:
            shared.states.append(hidden)
        output = BackboneOutput(
            last_hidden_state=hidden,
            **{CACHE_NAME: past_key_values},
            thinking_steps=steps,
            hidden_states=None if shared.states is None else tuple(shared.states),
            attentions=None if shared.weights is None else tuple(shared.weights),
        )
        return output if self.wants("return_dict", return_dict) else output.to_tuple()

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (B, L, D), scaled, with the embeddings of their positions (B, L)."""
        if self.config.use_embedding_scale:
            x = x * self.config.hidden_size**0.5  # arXiv 1706.03762, section 3.4
        if self.config.position_embedding == "learned":
            x = x + self.embed_positions(positions)
        elif self.config.position_embedding == "sinusoidal":
            x = x + sinusoidal_embedding(positions, x.shape[-1]).to(x.dtype)
        return x

    def wants(self, name: str, given: bool | None) -> bool:
        """Whether an optional output is asked for, by the call or by the configuration."""
        return bool(getattr(self.config, name, False) if given is None else given)

    def share(
        self,
        x: Tensor,
        cache: Cache | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> tuple[LayerInputs, Tensor]:
        """What all layers share, and the positions (B or 1, L)."""
        # A mask for FlexAttention comes with whole streams, which have their positions.
        if isinstance(attention_mask, BlockMask):
            assert position_ids is not None
            rotary = rotary_table(self.frequencies, position_ids) if self.config.use_rotary_embedding else None
            return LayerInputs(rotary=rotary, is_causal=False, blocks=attention_mask), position_ids
        L, device = x.shape[1], x.device
        past = 0 if cache is None else cache.get_seq_length()  # tokens in the cache
        # Positions: given, counted within documents, from the mask of tokens, or from the beginning.
        queries = torch.arange(L, device=device) + past
        positions = position_ids
        n_keys = L if cache is None else cache.get_mask_sizes(L, 0)[0]
        if attention_mask is not None and not torch.compiler.is_compiling():
            n_tokens = past + L if isinstance(past, int) else None  # static caches count on the device
            check_attention_mask(attention_mask, batch=x.shape[0], queries=L, keys=n_keys, tokens=n_tokens)
        if positions is not None and positions.shape[-1] != L:
            raise ValueError(f"position_ids has shape {tuple(positions.shape)}; give one per token, {L} in a row")
        if positions is None and segment_ids is not None:
            positions = positions_in_segments(segment_ids)
        elif positions is None and attention_mask is not None and attention_mask.ndim == 2:
            positions = (attention_mask.bool().long().cumsum(-1) - 1).clamp_min(0)[:, -L:]
        elif positions is None:
            positions = queries[None]

        # Keys that a query may not see, and biases.
        is_static = cache is not None and cache.is_compileable
        mask, is_causal = None, True
        # A ready mask (B, 1, L, S) replaces ours; it need not be causal.
        if attention_mask is not None and attention_mask.ndim == 4:
            mask, is_causal, attention_mask = attention_mask, False, None
            if segment_ids is not None:
                same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
                mask = mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)
        # Compilers cannot branch on values; training, or one query, does not wait for a GPU: any mask means padding.
        reads = not torch.compiler.is_compiling() and (not x.is_cuda or (L > 1 and not self.training))
        is_padded = attention_mask is not None and not (reads and attention_mask.bool().all())
        has_past = L > 1 and n_keys > L  # several queries after a past
        # Otherwise kernels do without a mask: whole sequences, or a single query that sees everything.
        if mask is None and (is_padded or segment_ids is not None or is_static or has_past):
            tokens = attention_mask if is_padded else None
            mask = visible_keys(
                queries, torch.arange(n_keys, device=device), attention_mask=tokens, segment_ids=segment_ids
            )
        # ALiBi: a bias on the scores, -inf where a key is hidden.
        if self.config.use_alibi_bias:
            keys = torch.arange(n_keys, device=device)
            mask = visible_keys(queries, keys) if mask is None else mask
            bias = alibi_bias(self.config.n_heads, queries[None], keys[None])
            mask = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        rotary = rotary_table(self.frequencies, positions) if self.config.use_rotary_embedding else None
        return LayerInputs(rotary=rotary, mask=mask, is_causal=is_causal, cache=cache), positions

    def think(
        self,
        x: Tensor,
        shared: LayerInputs,
        first_slot: int,
        *,
        thinking: ResolvedThinking,
        attention_mask: Tensor | None,
        predict: Any,
    ) -> tuple[Tensor, Tensor]:
        """Core and coda.

        Args:
            x: embedded input, (B, L, D).
            first_slot: the cache's slot of the core's first layer.
            thinking: resolved.
        Returns: the coda's output (B, L, D), and the steps taken (B, L) int64.
        """
        config, core = self.config, self.core
        # Slots of the coda come after those of the core's last step.
        last_slot = core.slot(thinking.n_steps - 1, first_slot) + len(core.layers)
        # Without exits, every token takes all steps.
        if not thinking.exit_threshold:
            steps = torch.full(x.shape[:2], thinking.n_taken, device=x.device)
            state = core(x, shared, first_slot, thinking=thinking)
            return self.coda(state, shared, last_slot), steps
        # With exits, padding takes no step, and criterion "kl" needs the head at each step.
        is_token = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            is_token = attention_mask[:, -x.shape[1] :].bool()  # without the past
        if config.recurrent_exit_criterion == "kl" and predict is None:
            raise ValueError('recurrent_exit_criterion="kl" compares predictions, which this model has no head for')
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("early exits have no gradient: use torch.no_grad(), or pass exit_threshold=0")
        out, steps = core.forward_until_exit(
            x,
            shared,
            first_slot,
            thinking=thinking,
            coda=self.coda,
            predict=lambda hidden: predict(self.norm(hidden)).float().log_softmax(-1),
            is_token=is_token,
        )
        return out if config.recurrent_exit_criterion == "kl" else self.coda(out, shared, last_slot), steps


class MegaTransformerForCausalLM(MegaTransformerPreTrainedModel, CausalGenerationMixin):
    """A language model on the stack; `generate()` is that of transformers.

    Raises: ValueError: the configuration has modalities beside text.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegaTransformerConfig):
        super().__init__(config)
        if config.modalities != ["text"]:
            raise ValueError(f"modalities={config.modalities} need MegaTransformerMultimodal; this one has text alone")
        self.model = MegaTransformerModel(config)
        extras = {"z_loss_weight": config.z_loss_weight, "chunk_size": config.loss_chunk_size}
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, **extras)
        self.post_init()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MegaTransformerForCausalLM":
        """A new model of a row of `model.presets.MEGATRANSFORMER`, with some fields replaced."""
        return cls(from_preset(MegaTransformerConfig, MEGATRANSFORMER, name, **overrides))

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head; a plain linear layer becomes a `LanguageModelHead` with its weight."""
        head = new_embeddings
        if type(head) is nn.Linear and head.bias is None:
            extras = {"z_loss_weight": self.config.z_loss_weight, "chunk_size": self.config.loss_chunk_size}
            with torch.device("meta"):
                head = LanguageModelHead(new_embeddings.in_features, new_embeddings.out_features, **extras)
            head.weight = new_embeddings.weight
            head._is_hf_initialized = getattr(new_embeddings, "_is_hf_initialized", False)  # `post_init` keeps it
        self.lm_head = head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """That of transformers. Raises: ValueError: special tokens lie outside of the new vocabulary."""
        if new_num_tokens is not None:
            self.config.replace(vocab_size=new_num_tokens)  # checks
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        n_targets: Tensor | float | None = None,
        n_thinking_steps: int | None = None,
        n_backprop_steps: int | None = None,
        initial_state: Tensor | None = None,
        exit_threshold: float | None = None,
        logits_to_keep: int | Tensor | None = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        dropout_keys: Tensor | None = None,
    ) -> CausalOutput | tuple:
        """Args:
            input_ids: (B, L) tokens; or `inputs_embeds`, (B, L, D).
            attention_mask: (B, S), 1 where there is a token, for the past as well; or ready, (B or 1, H or 1, L, S)
                bool (true: visible) or float (added to the scores), causal or not.
            position_ids: (B, L), for rotary, sinusoidal and learned positions (ALiBi counts tokens); default: counted
                from the mask, or from each document's beginning.
            segment_ids: (B, L), equal numbers are the same document; tokens see their own document alone.
            past_key_values: cache of what came before; written to. `cache` is the same, as newer transformers name it.
            labels: (B, L), the tokens themselves (they are shifted here), -100 where there is no target.
            n_targets: what the summed loss is divided by; default: the number of targets in this batch.
                `num_items_in_batch` is the same, as transformers' Trainer names it.
            n_thinking_steps: steps of the core, the maximum where exits are on; default: sampled in training, else
                `recurrent_test_thinking_steps`.
            n_backprop_steps: the last steps, which are differentiated; default: `recurrent_backprop_steps`.
            initial_state: standard normal noise for `recurrent_state_initialization="normal"`, (B, L, D).
            exit_threshold: instead of `recurrent_exit_criteria_threshold`; 0: no exits. They need `torch.no_grad()`.
            dropout_keys: (B,) int64, numbers that dropout is a function of (`model.dropout`); default: PyTorch's.
            logits_to_keep: only the last so many positions, or those indices, get logits; 0: all; None: those that the
                loss needs. A loss in chunks gives logits only where no gradient is computed.
        Raises: ValueError: arguments that contradict each other or the configuration.
        """
        past_key_values = chosen_cache(cache, past_key_values)
        n_targets = chosen_divisor(n_targets, num_items_in_batch)
        if segment_ids is not None and past_key_values is not None:
            raise ValueError("segment_ids describe whole sequences; they cannot be used with past_key_values")
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            segment_ids=segment_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            thinking=Thinking(
                n_steps=n_thinking_steps,
                n_backprop_steps=n_backprop_steps,
                initial_state=initial_state,
                exit_threshold=exit_threshold,
            ),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            predict=self.lm_head,
            return_dict=True,
            dropout_keys=dropout_keys,
        )
        # The head: the loss where there are labels, and logits.
        results = self.head_outputs(
            output.last_hidden_state, labels, segment_ids, n_targets=n_targets, logits_to_keep=logits_to_keep
        )
        result = CausalOutput(
            **results,
            **{CACHE_NAME: getattr(output, CACHE_NAME)},
            thinking_steps=output.thinking_steps,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self.model.wants("return_dict", return_dict) else result.to_tuple()

    def head_outputs(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        segment_ids: Tensor | None,
        *,
        n_targets: Tensor | float | None,
        logits_to_keep: int | Tensor | None,
    ) -> dict[str, Tensor | None]:
        """What the head makes of the normed hidden states (B, L, D): logits, and the losses where there are labels."""
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None:
            return {"logits": self.lm_head(hidden if positions is None else hidden[:, positions])}
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; give one per token, {tuple(hidden.shape[:2])}")
        targets = next_token_targets(labels, segment_ids)
        loss, nats, z_loss, logits = language_model_loss(
            self.lm_head, hidden, targets, n_targets=n_targets, z_loss_weight=self.config.z_loss_weight
        )
        # A loss in chunks has no logits; without a gradient there is room for those that metrics need.
        if positions is not None and logits is not None:
            logits = logits[:, positions]
        elif positions is not None and not torch.is_grad_enabled():
            logits = self.lm_head(hidden[:, positions])
        return {"loss": loss, "logits": logits, "cross_entropy": nats[:, :-1], "z_loss": z_loss}

    @staticmethod
    def count_targets(labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """How many targets the loss of a batch has."""
        return (next_token_targets(labels, segment_ids) != -100).sum()


AutoConfig.register(MegaTransformerConfig.model_type, MegaTransformerConfig)
AutoModel.register(MegaTransformerConfig, MegaTransformerModel)
AutoModelForCausalLM.register(MegaTransformerConfig, MegaTransformerForCausalLM)
# Where the Trainer looks whether label smoothing shifts the labels, and pipelines which models they take.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MegaTransformerConfig.model_type] = MegaTransformerForCausalLM.__name__
