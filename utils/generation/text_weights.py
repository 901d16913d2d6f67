"""A multimodal model that takes over what a model of text has learnt: trunk, embeddings and head.

V vocabulary, D hidden.
"""

import logging
from pathlib import Path

import torch

from model.causal import MegaTransformerForCausalLM
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.parameters import PARTS
from utils.checkpoints import load_config, load_model, read_stage, resolve_checkpoint
from utils.configuration import MegaTransformerConfig
from utils.generation.foreign_weights import format_of
from utils.options import declared_fields

logger = logging.getLogger(__name__)

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # Weights with a row per token, (V, D).
# Fields that change neither the shapes of the trunk's weights nor what it computes, with those of other modalities.
FREE_FIELDS = {
    *("modalities", "vocab_size", "max_position_embeddings", "use_cache"),
    *("hidden_dropout", "embedding_dropout", "attention_dropout", "ffn_dropout"),
    *("text_loss_weight", "begin_loss_weight", "z_loss_weight", "loss_chunk_size"),
    *("recurrent_mean_thinking_steps", "recurrent_sigma", "recurrent_min_thinking_steps"),
    *("recurrent_max_thinking_steps", "recurrent_steps_distribution", "recurrent_backprop_steps"),
    *("recurrent_test_thinking_steps", "recurrent_exit_criterion", "recurrent_exit_criteria_threshold"),
    *("recurrent_exit_min_steps", "recurrent_cache_steps"),
    *("initializer_range", "embedding_initializer_range", "use_depth_scaled_initialization"),
    "use_zero_output_initialization",
}


def is_text_run(path: str | Path) -> bool:
    """Whether a checkpoint of the multimodal stage is of text alone.

    Raises: ValueError: it is another library's folder.
    """
    if format_of(path):
        raise ValueError(
            f"--init_from {path} is no run of this repository: train a model of text from it first, with "
            "pretrain_multimodal.py --include_modes text, and give that run"
        )
    return not read_stage(resolve_checkpoint(path), "multimodal").get("latents")


def check_trunk(config: MegaTransformerConfig, path: str | Path) -> None:
    """Raises: ValueError: a model of text has another trunk than a configuration; names the fields that differ."""
    text = load_config(MegaTransformerConfig, resolve_checkpoint(path))
    names = [field.name for field in declared_fields(config) if not is_free(field.name)]
    pairs = {name: (getattr(text, name), getattr(config, name)) for name in names}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        overrides = " ".join(f"{name}={value}" for name, (value, _) in differing.items())
        raise ValueError(
            f"--init_from {path}: the trunks (checkpoint, this run) differ in {differing}; give --override "
            f"{overrides}, or train the model of text with this run's"
        )


def is_free(name: str) -> bool:
    """Whether a field may differ from that of the model of text."""
    return name in FREE_FIELDS or name.startswith(("image_", "audio_")) or name.endswith("_token_id")


def model_from_text(config: MegaTransformerConfig, path: str | Path) -> MegaTransformerMultimodal:
    """A new model with the trunk, the embeddings and the head of a model of text.

    Rows of the vocabulary belong to the ids of the tokenizer, which are those below <null>; the rows above it and
    all weights without a counterpart are initialised, and named in the log.
    """
    check_trunk(config, path)
    source = load_model(MegaTransformerForCausalLM, path).state_dict()
    model = MegaTransformerMultimodal(config)
    state, n_text = model.state_dict(), config.null_token_id
    with torch.no_grad():
        for name, value in source.items():
            has_rows = name in VOCABULARY
            (state[name][:n_text] if has_rows else state[name]).copy_(value[:n_text] if has_rows else value)
    modules = [module for name in config.modalities if name != "text" for module in PARTS[name]]
    logger.info(
        "%s gives the trunk and %d rows of the vocabulary; initialised: rows %d to %d of the vocabulary, %s",
        *(path, n_text, n_text, config.vocab_size - 1, ", ".join(modules)),
    )
    return model
