import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.causal import MegaTransformerForCausalLM
from model.text.llama_weights import neighbouring_pairs, rename_llama_weights

SIZES = {"hidden_size": 48, "vocab_size": 61, "max_position_embeddings": 64}


def both_models(n_heads=4, n_groups=4, tied=False, bias=False, head_width=None):
    """A Llama with random weights of the size of trained ones, and ours without its weights."""
    torch.manual_seed(0)
    width = head_width or 48 // n_heads
    llama = LlamaForCausalLM(
        LlamaConfig(
            **SIZES, num_hidden_layers=3, num_attention_heads=n_heads, num_key_value_heads=n_groups, head_dim=width,
            intermediate_size=80, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    ours = MegaTransformerForCausalLM.from_preset(
        "llama-8m", **SIZES, n_layers=3, n_heads=n_heads, n_query_groups=n_groups, head_width=head_width,
        intermediate_size=80, tie_word_embeddings=tied, use_attention_bias=bias, use_ffn_bias=bias,
        rotary_theta=500.0, norm_eps=1e-5,
    )  # fmt: skip
    return llama.eval(), ours.eval()


CASES = {
    "heads": {},
    "groups": {"n_groups": 2},
    "one group, tied": {"n_groups": 1, "tied": True},
    "biases": {"n_groups": 2, "bias": True},
    "head width": {"n_heads": 3, "n_groups": 3, "head_width": 20},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_llama(case):
    llama, ours = both_models(**CASES[case])
    ours.load_state_dict(rename_llama_weights(llama.state_dict(), ours.config))
    tokens = torch.randint(61, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0  # padded on the left
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = llama(tokens, attention_mask=mask, position_ids=positions).logits
        found = ours(tokens, attention_mask=mask).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def test_generated_tokens_are_those_of_llama():
    llama, ours = both_models(n_groups=2)
    ours.load_state_dict(rename_llama_weights(llama.state_dict(), ours.config))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.randint(61, (2, 5))
    expected, found = (model.generate(prompt, **settings) for model in (llama, ours))
    assert torch.equal(found, expected) and found.shape == (2, 25)


def test_a_tied_head_may_be_absent():
    llama, ours = both_models(tied=True)
    weights = llama.state_dict()
    complete = rename_llama_weights(weights, ours.config)
    del weights["lm_head.weight"]
    ours.load_state_dict(rename_llama_weights(weights, ours.config))
    assert all(torch.equal(ours.state_dict()[name], each) for name, each in complete.items())


def test_wrong_weights_are_refused():
    llama, ours = both_models()
    weights = llama.state_dict()
    with pytest.raises(ValueError, match="n_layers=2 must be 3, as in the Llama weights"):
        rename_llama_weights(weights, ours.config.replace(n_layers=2))
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_norm.weight' is no weight of a Llama"):
        rename_llama_weights({**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(12)}, ours.config)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lack \['lm_head.weight'\]; tie_word_embeddings=False"):
        rename_llama_weights(weights, ours.config)


def test_neighbouring_pairs():
    rows = torch.arange(8)  # two heads of width 4
    assert neighbouring_pairs(rows, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
