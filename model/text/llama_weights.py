"""Weights of transformers' `LlamaForCausalLM` under this model's names.  H query heads, G key groups, K head width.

Three things differ: queries, keys and values come from one product here, gate and up projection too, and the rotary
embedding turns neighbouring channels (0, 1), (2, 3), ..., where Llama turns channel i with channel i + K / 2.

    ours = MegaTransformerForCausalLM(MegaTransformerConfig(**config_from_llama(llama.config)))
    ours.load_state_dict(rename_llama_weights(llama.state_dict(), ours.config))
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from utils.configuration import MegaTransformerConfig

# Llama's name within a layer, and ours; joined projections of a layer stand one after the other.
LAYER_NAMES = {
    "input_layernorm": "attention_norms.pre_norm",
    "self_attn.q_proj": "attention.qkv_proj",
    "self_attn.k_proj": "attention.qkv_proj",
    "self_attn.v_proj": "attention.qkv_proj",
    "self_attn.o_proj": "attention.o_proj",
    "post_attention_layernorm": "ffn_norms.pre_norm",
    "mlp.gate_proj": "ffn.in_proj",
    "mlp.up_proj": "ffn.in_proj",
    "mlp.down_proj": "ffn.out_proj",
}
OTHER_NAMES = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
# Fields that all Llamas have the same value of.
FIXED: dict[str, Any] = {
    **dict.fromkeys(("n_prelude_layers", "n_recurrent_layers", "n_coda_layers"), 0),
    "use_rotary_embedding": True,
    "rotary_fraction": 1.0,
    "rotary_ntk_factor": 1.0,
    "position_embedding": "none",
    "use_alibi_bias": False,
    "use_embedding_scale": False,
    "use_qk_norm": False,
    "norm_type": "rmsnorm",
    "use_pre_attention_norm": True,
    "use_pre_ffn_norm": True,
    "use_final_norm": True,
    "use_post_attention_norm": False,
    "use_post_ffn_norm": False,
    "ffn_activation": "swiglu",
}


def config_from_llama(config: LlamaConfig) -> dict[str, Any]:
    """Fields of `MegaTransformerConfig`; the longest sequence is not among them, since no weight depends on it.

    Raises: ValueError: the Llama has an activation or a scaling of its positions that ours does not have.
    """
    rope = config.rope_parameters or {}
    kind, activation = rope.get("rope_type", "default"), config.hidden_act
    if kind not in ("default", "linear"):
        raise ValueError(f"rope_parameters={rope}: rope_type must be 'default' or 'linear', not {kind!r}")
    if activation != "silu":
        raise ValueError(f"hidden_act={activation!r}: only 'silu' can be read, which gates the feed-forward network")
    return {
        "hidden_size": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads,
        "head_width": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_attention_bias": config.attention_bias,
        "use_ffn_bias": config.mlp_bias,
        "norm_eps": config.rms_norm_eps,
        "rotary_theta": rope.get("rope_theta", 10000.0),
        "rotary_interpolation": rope.get("factor", 1.0) if kind == "linear" else 1.0,
        **FIXED,
    }


def rename_llama_weights(state_dict: dict[str, Tensor], config: MegaTransformerConfig) -> dict[str, Tensor]:
    """A state dict for `MegaTransformerForCausalLM` with which it computes what the Llama model does.

    Args:
        state_dict: of `LlamaForCausalLM`, with or without `lm_head.weight` where embedding and head are tied.
        config: of the model that gets the weights: main layers alone, pre norms, RMSNorm, SwiGLU, no QK-norm; sizes,
            `rotary_theta` and `norm_eps` as Llama has them.
    Raises:
        ValueError: a name that Llama does not have, another number of layers, no head for a model that is not tied.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if not name.endswith("rotary_emb.inv_freq")}
    # Embedding, final norm and head.
    renamed = {name: weights[name] for name in OTHER_NAMES if name in weights}
    if config.tie_word_embeddings:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    if missing := [name for name in OTHER_NAMES if name not in renamed]:
        raise ValueError(f"the Llama weights lack {missing}; tie_word_embeddings={config.tie_word_embeddings}")

    # Weights of the layers, by the layer's number.
    layers: dict[int, dict[str, Tensor]] = {}
    for name in weights.keys() - set(OTHER_NAMES):
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None or match[2] not in LAYER_NAMES:
            raise ValueError(f"{name!r} is no weight of a LlamaForCausalLM")
        layers.setdefault(int(match[1]), {})[f"{match[2]}.{match[3]}"] = weights[name]
    if len(layers) != config.n_layers:
        raise ValueError(f"n_layers={config.n_layers} must be {len(layers)}, as in the Llama weights")
    for number, layer in layers.items():
        for name, tensor in rename_layer(layer, config).items():
            renamed[f"model.main.layers.{number}.{name}"] = tensor
    return renamed


def rename_layer(layer: dict[str, Tensor], config: MegaTransformerConfig) -> dict[str, Tensor]:
    """The same within one layer."""
    joined: dict[str, list[Tensor]] = {}
    for theirs, ours in LAYER_NAMES.items():
        for kind in ("weight", "bias"):
            if (tensor := layer.get(f"{theirs}.{kind}")) is None:
                continue
            # Of all weights only those that rotate order their channels differently.
            if theirs in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = neighbouring_pairs(tensor, config.width_per_head)
            joined.setdefault(f"{ours}.{kind}", []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in joined.items()}  # q, k, v; gate, up


def neighbouring_pairs(rows: Tensor, width: int) -> Tensor:
    """Rows of a query or key projection, (H K, ...), with channel i of each head at 2 i and i + K / 2 at 2 i + 1."""
    # (H, 2, K / 2) -> (H, K / 2, 2).
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
