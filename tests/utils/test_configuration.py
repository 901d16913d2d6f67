import copy
import json
import pickle
import re

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from model.presets import MEGATRANSFORMER, MULTIMODAL
from utils.configuration import MegaTransformerConfig
from utils.exporting.configuration_docs import COMMAND, DOCUMENT, document
from utils.options import declared_fields, declared_sections, default_value, from_preset

FIELDS = {field.name: field for field in declared_fields(MegaTransformerConfig)}
CORE = {"n_recurrent_layers": 1}
AUDIO, IMAGE = {"modalities": ["text", "audio"]}, {"modalities": ["text", "image"]}
WRONG = [
    # Layers, attention, positions, norms.
    ({"hiden_size": 4}, "no field 'hiden_size'; did you mean 'hidden_size'"),
    ({"head_size": 4}, "no field 'head_size'"),
    ({"n_layers": 0}, "n_layers=0 gives no layer"),
    ({"modalities": ["audio"]}, "modalities=['audio'] must contain 'text'"),
    ({"modalities": ["text", "text"]}, "modalities=['text', 'text'] must name each modality once"),
    ({"modalities": ["text", "adio"]}, "'adio' must be one of 'text', 'audio', 'image'; did you mean 'audio'"),
    ({"modalities": ("text",)}, "modalities=('text',) must be list"),
    ({"n_heads": 7}, "n_heads=7 must divide hidden_size=256, or give head_width"),
    ({"n_query_groups": 3}, "n_query_groups=3 must divide n_heads=8"),
    ({"n_query_groups": 16}, "n_query_groups=16 must divide n_heads=8"),
    ({"hidden_dropout": 1}, "hidden_dropout=1 must be < 1"),
    ({"use_alibi_bias": True}, "use_alibi_bias=True needs use_rotary_embedding=False"),
    (
        {"use_rotary_embedding": False, "rotary_theta": 5.0},
        "rotary_theta=5.0 has no effect with use_rotary_embedding=F",
    ),
    ({"head_width": 9}, "rotary_fraction=1.0 rotates 9 of 9 values, which must be an even number"),
    ({"rotary_fraction": 0.3}, "rotary_fraction=0.3 rotates 9.6 of 32 values, which must be an even number"),
    ({"rotary_fraction": 0.001}, "rotary_fraction=0.001 rotates 0.032 of 32 values"),
    ({"head_width": 2, "rotary_ntk_factor": 2}, "rotary_ntk_factor=2 needs more than 2 rotated values"),
    ({"rotary_interpolation": 0.5}, "rotary_interpolation=0.5 must be >= 1"),
    ({"hidden_size": 3, "head_width": 4, "position_embedding": "sinusoidal"}, "hidden_size=3 must be even"),
    ({"use_norm_bias": True}, "use_norm_bias=True has no effect with norm_type='rmsnorm'"),
    ({"use_pre_attention_norm": False}, "use_pre_attention_norm=False needs use_post_attention_norm=True"),
    ({"use_pre_ffn_norm": False}, "use_pre_ffn_norm=False needs use_post_ffn_norm=True"),
    ({"ffn_activation": "swigl"}, "ffn_activation='swigl' must be one of 'swiglu'"),
    ({"norm_eps": float("nan")}, "norm_eps=nan must be finite"),
    # The recurrent core.
    ({"recurrent_sigma": 0.1}, "recurrent_sigma=0.1 has no effect with n_recurrent_layers=0"),
    ({**CORE, "recurrent_mean_thinking_steps": 33}, "recurrent_mean_thinking_steps=33 must lie between recurrent_min"),
    ({**CORE, "recurrent_min_thinking_steps": 9}, "recurrent_min_thinking_steps=9 and recurrent_max"),
    (
        {**CORE, "recurrent_backprop_steps": 33},
        "recurrent_backprop_steps=33 must be <= recurrent_max_thinking_steps=32",
    ),
    (
        {**CORE, "recurrent_cache_steps": 4, "recurrent_exit_criterion": "kl"},
        "recurrent_cache_steps=4 must be None with recurrent_exit_criterion='kl'",
    ),
    ({**CORE, "recurrent_cache_steps": 33}, "recurrent_cache_steps=33 must be <= recurrent_max_thinking_steps=32"),
    ({**CORE, "recurrent_test_thinking_steps": 64}, "recurrent_test_thinking_steps=64 must be <= recurrent_max"),
    (
        {**CORE, "recurrent_state_std": 1.0},
        "recurrent_state_std=1.0 has no effect with recurrent_state_initialization=",
    ),
    (
        {**CORE, "recurrent_exit_min_steps": 3},
        "recurrent_exit_min_steps=3 has no effect with recurrent_exit_criterion",
    ),
    ({**CORE, "recurrent_exit_criteria_threshold": 1.0}, "has no effect with recurrent_exit_criterion='none'"),
    (
        {**CORE, "recurrent_exit_criterion": "kl", "recurrent_exit_min_steps": 9},
        "recurrent_exit_min_steps=9 must be <= 8, the steps of generation",
    ),
    (
        {**CORE, "recurrent_steps_distribution": "fixed", "recurrent_sigma": 1},
        "recurrent_sigma=1 has no effect with recurrent_steps_distribution='fixed'",
    ),
    # Tokens.
    ({"eos_token_id": 258}, "eos_token_id=258 must be < vocab_size=258"),
    ({"pad_token_id": -1}, "pad_token_id=-1 must be >= 0"),
    ({"null_token_id": 5}, "null_token_id=5 has no effect with modalities=['text']"),
    ({**IMAGE, "null_token_id": 1}, "bos_token_id=1 must differ from null_token_id"),
    (
        {**IMAGE, "image_begin_token_id": 7, "image_end_token_id": 7},
        "image_begin_token_id=7 must differ from image_end",
    ),
    # Sound and images.
    ({"audio_max_tokens": 100}, "audio_max_tokens=100 has no effect with modalities=['text']"),
    ({**IMAGE, "audio_max_tokens": 9}, "audio_max_tokens=9 has no effect with modalities=['text', 'image']"),
    ({**AUDIO, "max_position_embeddings": 95}, "audio_max_tokens=96 must be <= max_position_embeddings=95"),
    (
        {**AUDIO, "audio_length_token_id": 163},
        "audio_length_token_id=163 and audio_max_tokens=96 exceed vocab_size=258",
    ),
    (
        {**AUDIO, "use_rotary_embedding": False},
        "audio_position='text' needs use_rotary_embedding=True",
    ),
    (
        {**AUDIO, "position_embedding": "learned"},
        "audio_position='text' needs use_rotary_embedding=True and position_",
    ),
    ({**IMAGE, "position_embedding": "learned"}, "position_embedding='learned' needs modalities=['text']"),
    (
        {**AUDIO, "audio_position": "count", "position_embedding": "learned"},
        "position_embedding='learned' needs modalities=['text']",
    ),
    ({"text_loss_weight": 0.2}, "text_loss_weight=0.2 has no effect with modalities=['text']"),
    (
        {**AUDIO, "audio_time_sampling": "uniform", "audio_time_mean": 1.0},
        "audio_time_mean=1.0 has no effect with audio_time_sampling='uniform'",
    ),
    ({**IMAGE, "image_size": 60}, "image_compression=8 must divide image_size=60"),
    ({**IMAGE, "image_encoder_patch_size": 3}, "image_encoder_patch_size=3 must divide the side 8 of the latents"),
    ({**IMAGE, "max_position_embeddings": 63}, "image_size=64 gives 64 tokens, more than max_position_embeddings=63"),
    (
        {**IMAGE, "image_condition_dropout": 0, "image_guidance_scale": 2.0},
        "image_guidance_scale=2.0 has no effect with image_condition_dropout=0",
    ),
    (
        {**IMAGE, "hidden_size": 90, "n_heads": 5, "image_position_embedding": "sinusoidal"},
        "hidden_size=90 must be divisible by 4",
    ),
    # Initialisation.
    (
        {"use_zero_output_initialization": True, "use_depth_scaled_initialization": False},
        "use_depth_scaled_initialization=False has no effect with use_zero_output_initialization=True",
    ),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[" ".join(wrong) for wrong, _ in WRONG])
def test_wrong_configurations_are_explained(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MegaTransformerConfig(**wrong)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_checks_its_type(name):
    with pytest.raises(ValueError, match=f"{name}={{}} must be"):
        MegaTransformerConfig(**{name: {}})


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.metadata["bounds"]])
def test_every_bound_is_checked(name):
    for kind, bound in FIELDS[name].metadata["bounds"].items():
        outside = bound if kind in ("gt", "lt") else bound - 1 if kind == "ge" else bound + 1
        with pytest.raises(ValueError, match=f"{name}={outside} must be"):
            MegaTransformerConfig(**{name: outside})


def test_fields_have_sections_of_one_screen():
    sections = declared_sections(MegaTransformerConfig)
    assert len(FIELDS) > 90
    assert all(section.title for section in sections)
    assert [field for fields in sections.values() for field in fields] == list(FIELDS.values())
    assert max(map(len, sections.values())) <= 30


@pytest.mark.parametrize(
    "valid",
    [
        {"use_rotary_embedding": False, "use_alibi_bias": True, "rotary_theta": 10000},
        {"norm_type": "layernorm", "use_norm_bias": True, "use_pre_ffn_norm": False, "use_post_ffn_norm": True},
        {"rotary_theta": 500000, "rotary_fraction": 0.5, "hidden_dropout": 0, "head_width": 24},
        {"eos_token_id": 0, "bos_token_id": None},
        {"position_embedding": "learned", "use_rotary_embedding": False},
        {"n_layers": 0, **CORE, "recurrent_exit_criterion": "latent_difference", "recurrent_cache_steps": 1},
        {"modalities": ["text", "audio", "image"], **CORE, "audio_time_shift": 0.03, "null_token_id": 2},
        {**AUDIO, "audio_position": "count", "use_rotary_embedding": False, "audio_guidance_scale": 3},
    ],
    ids=" ".join,
)
def test_valid_configurations_survive_json(valid, tmp_path):
    config = MegaTransformerConfig(**valid)
    config.save_pretrained(tmp_path)
    assert MegaTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", MEGATRANSFORMER)
def test_presets_survive_json_and_copies(name, tmp_path):
    config = from_preset(MegaTransformerConfig, MEGATRANSFORMER, name)
    assert name == "llama-8m" or config.width_per_head == 64
    config.save_pretrained(tmp_path)
    loaded = MegaTransformerConfig.from_pretrained(tmp_path)
    for twin in (loaded, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.to_dict() == config.to_dict() and twin.describe() == config.describe()
    assert config.replace().to_dict() == config.to_dict()


def test_copies_do_not_share_lists():
    config = MegaTransformerConfig()
    copy.deepcopy(config).modalities.append("image")
    MegaTransformerConfig().modalities.append("image")
    assert config.modalities == MegaTransformerConfig().modalities == ["text"]


def test_older_files_load_with_defaults_and_later_ones_are_refused(tmp_path):
    config = MegaTransformerConfig(hidden_size=128, n_heads=4)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert set(FIELDS) <= set(written)  # All are written, so that a default may change later.
    older = {key: value for key, value in written.items() if not key.startswith(("recurrent_", "image_", "z_loss"))}
    path.write_text(json.dumps(older))
    assert MegaTransformerConfig.from_pretrained(tmp_path).describe() == config.describe()
    path.write_text(json.dumps({**written, "recurrent_sgima": 0.5}))
    with pytest.raises(ValueError, match="no field 'recurrent_sgima'; did you mean 'recurrent_sigma'"):
        MegaTransformerConfig.from_pretrained(tmp_path)


def test_files_of_text_models_may_have_fields_that_are_gone(tmp_path):
    config = MegaTransformerConfig(hidden_size=128, n_heads=4)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    former = {"image_sampler": "euler", "image_n_sampling_steps": 32, "audio_n_sampling_steps": 16}
    gone = {"image_decoder_type": "flow", "audio_block_frames": 16, "image_carried_thinking_steps": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), **former, **gone}))
    assert MegaTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="no field 'audio_block_frames'"):
        MegaTransformerConfig(audio_block_frames=8)
    with pytest.raises(ValueError, match="image_sampler='euler' has no effect"):
        MegaTransformerConfig(image_sampler="euler")


def test_modalities_can_be_left_out():
    config = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny")
    restricted = config.with_modalities(["text", "audio"])
    assert restricted.image_begin_token_id is None and restricted.audio_time_mean == config.audio_time_mean == 0.8
    assert restricted.effective_depth == config.effective_depth == 3 + 2


def test_what_transformers_writes_is_read(tmp_path):
    config = MegaTransformerConfig(dtype=torch.bfloat16, attn_implementation="eager", architectures=["Causal"])
    config.output_attentions = True
    config.use_cache = False
    config.quantization_config = {"quant_method": "none"}
    config.save_pretrained(tmp_path)
    loaded = MegaTransformerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded.dtype == torch.bfloat16 and loaded.output_attentions


def test_names_of_transformers_are_understood():
    config = MegaTransformerConfig(num_attention_heads=4, n_query_groups=2)
    assert (config.n_heads, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 2, 64)


@pytest.mark.parametrize("name, n_slots", [("tiny", 4), ("recurrent-tiny", 1 + 16 * 3)])
def test_transformers_builds_caches_and_generation_settings(name, n_slots):
    config = from_preset(MegaTransformerConfig, MEGATRANSFORMER, name, eos_token_id=2)
    assert (
        len(DynamicCache(config=config).layers) == len(StaticCache(config=config, max_cache_len=8).layers) == n_slots
    )
    generation = GenerationConfig.from_model_config(config)
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)


def test_derived_values():
    config = MegaTransformerConfig(**CORE, n_prelude_layers=2, n_coda_layers=3, recurrent_cache_steps=5)
    assert (config.num_hidden_layers, config.effective_depth) == (2 + 8 + 5 * (1 + 3), 2 + 8 + 8 + 3)
    assert (config.ffn_size, config.replace(ffn_activation="gelu").ffn_size) == (704, 1024)
    assert config.replace(intermediate_size=100).ffn_size == 100
    flat = MegaTransformerConfig(n_prelude_layers=2, n_coda_layers=3)
    assert flat.num_hidden_layers == flat.effective_depth == 13


def test_description_is_grouped():
    blocks = MegaTransformerConfig().describe().split("\n\n")
    assert len(blocks) == len(declared_sections(MegaTransformerConfig))
    assert blocks[1].startswith("[Attention]\nn_heads = 8 ") and "n_query_groups = None" in blocks[1]


def test_defaults_are_the_declared_ones():
    config = MegaTransformerConfig()
    assert {name: getattr(config, name) for name in FIELDS} == {name: default_value(FIELDS[name]) for name in FIELDS}


def test_documentation_is_up_to_date():
    text = DOCUMENT.read_text()
    assert text == document(MegaTransformerConfig), f"{DOCUMENT.name} is not up to date: run `{COMMAND}`"
    assert all(f"| `{name}` |" in text for name in FIELDS)
