"""transformers' own tests of models and configurations, for this model; started by `test_transformers_mixins.py`.

The tests are those of the installed version's source distribution, whose folder `tests` is the package
`transformers_tests` here. It lacks three modules that they import: the tests of exports and of generation
(`tests/model/test_causal_generation.py` has our own of the latter), and a list of fields that configurations share.
What it holds back by itself with a reason (no accelerator, no flash attention, no sub-configurations) shows with -rs.
"""

import sys
import types
import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from model.causal import MegaTransformerForCausalLM, MegaTransformerModel
from utils.configuration import MegaTransformerConfig

COMMON_FIELDS = {
    "architectures": ["MegaTransformerForCausalLM"],
    "dtype": "float16",
    "id2label": {0: "a", 1: "b"},
    "label2id": {"a": 0, "b": 1},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": COMMON_FIELDS},
}
for name, contents in ABSENT.items():
    for path in (name.split(".")[0], name):
        module = sys.modules.setdefault(f"transformers_tests.{path}", types.ModuleType(path))
    vars(module).update(contents)

import transformers_tests.test_configuration_common as configuration_common  # type: ignore[import-not-found]  # noqa: E402
import transformers_tests.test_modeling_common as modeling_common  # type: ignore[import-not-found]  # noqa: E402

# So the tests know which class has a loss.
MODEL_MAPPING_NAMES["megatransformer"] = "MegaTransformerModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megatransformer"] = "MegaTransformerForCausalLM"
# By default this sets the eps of every norm that any model has; a configuration that is saved with fields that ours
# does not have is refused when it is loaded.
modeling_common.set_config_for_less_flaky_test = lambda config: setattr(config, "norm_eps", 1.0)

SIZES = {"vocab_size": 99, "hidden_size": 32, "n_heads": 4, "max_position_embeddings": 128}
PRESETS = {
    "flat": {**SIZES, "n_layers": 2, "n_query_groups": 2},
    "recurrent": {
        **SIZES, "n_layers": 0, "n_prelude_layers": 1, "n_recurrent_layers": 1, "n_coda_layers": 1,
        "recurrent_mean_thinking_steps": 2, "recurrent_max_thinking_steps": 4, "recurrent_steps_distribution": "fixed",
        "use_qk_norm": True,
    },
    "untied": {
        **SIZES, "n_layers": 2, "tie_word_embeddings": False, "norm_type": "layernorm", "use_norm_bias": True,
        "use_rotary_embedding": False, "use_alibi_bias": True, "position_embedding": "learned",
        "ffn_activation": "gelu", "use_attention_bias": True, "use_ffn_bias": True,
        "use_post_attention_norm": True, "use_post_ffn_norm": True,
    },
}  # fmt: skip


class ModelTester:
    """Sizes and inputs, as the mixins ask for them."""

    is_training = True
    batch_size, seq_length = 3, 7
    attn_implementation: str | None = None

    def __init__(self, fields):
        self.fields = fields
        config = self.get_config()
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_attention_heads = config.n_heads
        self.num_hidden_layers = config.effective_depth  # the core's layers put out one state per step

    def get_config(self):
        return MegaTransformerConfig(**self.fields, attn_implementation=self.attn_implementation)

    def prepare_config_and_inputs_for_common(self):
        input_ids = modeling_common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class Checks(modeling_common.ModelTesterMixin):
    all_model_classes = (MegaTransformerModel, MegaTransformerForCausalLM)
    all_generative_model_classes = ()
    preset: str

    def setUp(self):
        fields = PRESETS[self.preset]
        self.model_tester = ModelTester(fields)
        self.config_tester = configuration_common.ConfigTester(self, config_class=MegaTransformerConfig, **fields)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_outputs_equivalence(self):
        self.all_model_classes = (MegaTransformerForCausalLM,)  # the backbone has no `return_dict`
        self.model_tester.attn_implementation = "eager"  # for its attention weights
        super().test_model_outputs_equivalence()

    @unittest.skip('attention weights are refused with attn_implementation="sdpa", which keeps none')
    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self):
        pass

    @unittest.skip("labels are shifted by the model alone; the argument shift_labels is refused")
    def test_causal_lm_loss_honors_shift_labels(self):
        pass


class FlatTest(Checks, unittest.TestCase):
    preset = "flat"


class RecurrentTest(Checks, unittest.TestCase):
    preset = "recurrent"

    @unittest.skip("four layers of two sets of weights, the core counted twice; the limit is two")
    def test_num_layers_is_small(self):
        pass


class UntiedTest(Checks, unittest.TestCase):
    preset = "untied"
