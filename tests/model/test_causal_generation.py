"""`generate()` of transformers in all its modes; what they compute with a cache equals whole forward passes."""

import pytest
import torch
from transformers import GenerationConfig

from model.causal import MegaTransformerForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 32, "n_heads": 4, "n_query_groups": 2, "max_position_embeddings": 64}
DEPTHS = {
    "flat": {"n_layers": 2},
    "recurrent": {
        "n_layers": 0, "n_prelude_layers": 1, "n_recurrent_layers": 1, "n_coda_layers": 1,
        "recurrent_mean_thinking_steps": 3, "recurrent_max_thinking_steps": 4,
    },
}  # fmt: skip
N_NEW = 6
PROMPT = torch.tensor([[5, 9, 2, 7], [3, 3, 8, 6]])


@pytest.fixture(params=DEPTHS)
def model(request):
    torch.manual_seed(0)
    model = MegaTransformerForCausalLM.from_preset("llama-8m", **{**SIZES, **DEPTHS[request.param]}).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim == 2 else 1.0)  # so that predictions differ from token to token
    return model


def generate(model, prompt=PROMPT, **settings):
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


@torch.no_grad()
def greedy(model, prompt=PROMPT):
    """Greedy decoding by its definition: the whole sequence anew for each token."""
    for _ in range(N_NEW):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


MODES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "transformers' cache": {"cache_implementation": "dynamic"},
    "one beam": {"num_beams": 1, "num_return_sequences": 1},
    "chunked prompt": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_modes_equal_whole_forward_passes(model, mode):
    expected = greedy(model)
    assert len(set(expected[:, 4:].flatten().tolist())) > 3
    assert torch.equal(generate(model, **MODES[mode]), expected)


def test_guesses_from_the_prompt_change_nothing(model):
    prompt = torch.tensor([[5, 9, 2, 5, 9, 2, 5, 9]])
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=2), greedy(model, prompt))


def test_guesses_of_a_smaller_model_change_nothing(model):
    torch.manual_seed(1)
    smaller = MegaTransformerForCausalLM.from_preset("llama-8m", **{**SIZES, "n_layers": 1}).eval()
    found = generate(model, PROMPT[:1], assistant_model=smaller)
    assert torch.equal(found, greedy(model, PROMPT[:1]))


def test_embeddings_instead_of_tokens(model):
    embedded = model.get_input_embeddings()(PROMPT)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(found, greedy(model)[:, 4:])


def test_generation_goes_on_from_a_cache(model):
    first = generate(model, max_new_tokens=2, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 5
    assert torch.equal(
        generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=4), greedy(model)
    )


def test_scores_are_those_of_whole_forward_passes(model):
    found = generate(model, return_dict_in_generate=True, output_logits=True, output_scores=True)
    with torch.no_grad():
        whole = model(found.sequences, use_cache=False).logits[:, 3:-1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_beams_beat_greedy(model):
    def score(tokens):
        with torch.no_grad():
            nats = model(tokens, labels=tokens, use_cache=False).cross_entropy
        return -nats[:, 3:].sum(-1)

    beams = generate(
        model,
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert beams.sequences.shape == (4, 4 + N_NEW)
    torch.testing.assert_close(beams.sequences_scores, score(beams.sequences), rtol=1e-3, atol=1e-3)
    assert (beams.sequences_scores[::2] >= beams.sequences_scores[1::2]).all()
    assert score(beams.sequences[::2]).sum() >= score(greedy(model)).sum()


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"num_beams": 2}, {"top_k": 1}])
def test_samples_repeat_with_the_seed_and_stay_among_the_allowed(model, settings):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(generate(model, do_sample=True, **settings))
    assert torch.equal(*runs) and runs[0].shape == (2, 4 + N_NEW)
    if settings == {"top_k": 1}:
        assert torch.equal(runs[0], greedy(model))


def test_penalties_stops_and_limits(model):
    expected = greedy(model, PROMPT[:1])
    stop = expected[0, 6].item()
    first = 4 + expected[0, 4:].tolist().index(stop)
    assert generate(model, PROMPT[:1], eos_token_id=stop).tolist() == expected[:, : first + 1].tolist()
    assert generate(model, PROMPT[:1], eos_token_id=stop, min_new_tokens=N_NEW).shape == (1, 4 + N_NEW)
    unlike = generate(model, no_repeat_ngram_size=1)
    assert all(len(set(row.tolist()[4:]) - set(before.tolist())) == N_NEW for row, before in zip(unlike, PROMPT))


def test_settings_are_saved_with_the_model(model, tmp_path):
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = MegaTransformerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(PROMPT), greedy(model)[:, :7])
