"""The recurrent core: steps that are drawn, truncated gradients, adapters, first states, memory."""

import numpy as np
import pytest
import torch

from model.causal import MegaTransformerForCausalLM
from model.recurrent import ADAPTERS
from model.thinking import CarriedState, Thinking, lognormal_poisson, sample_thinking_steps
from utils.configuration import MegaTransformerConfig

CORE = {
    "hidden_size": 32,
    "n_heads": 4,
    "vocab_size": 50,
    "n_prelude_layers": 1,
    "n_layers": 0,
    "n_recurrent_layers": 2,
    "n_coda_layers": 1,
    "initializer_range": 0.2,
}
IDS = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def build(**fields):
    torch.manual_seed(0)
    return MegaTransformerForCausalLM(MegaTransformerConfig(**{**CORE, **fields}))


def gradients(model, n_steps, window):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, n_thinking_steps=n_steps, n_backprop_steps=window).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("mean, sigma", [(4, 0.5), (8, 0.5), (16, 0.2)])
def test_steps_have_their_distribution(mean, sigma):
    fields = {"recurrent_mean_thinking_steps": mean, "recurrent_sigma": sigma, "recurrent_max_thinking_steps": 200}
    config, generator = MegaTransformerConfig(**{**CORE, **fields}), np.random.default_rng(0)
    drawn = np.array([sample_thinking_steps(config, generator) for _ in range(20_000)])
    assert drawn.min() >= 1 and drawn.mean() == pytest.approx(mean, rel=0.02)
    # Variance of a Poisson number with a log-normal rate: rate + rate^2 (exp(sigma^2) - 1).
    assert drawn.var() == pytest.approx((mean - 1) + (mean - 1) ** 2 * (np.exp(sigma**2) - 1), rel=0.1)
    assert np.mean([sample_thinking_steps(config, generator, mean=1.0) for _ in range(50)]) == 1
    fixed = config.replace(recurrent_steps_distribution="fixed", recurrent_sigma=0.5)
    assert {sample_thinking_steps(fixed, generator) for _ in range(20)} == {mean}
    clipped = config.replace(recurrent_min_thinking_steps=mean, recurrent_max_thinking_steps=mean + 1)
    assert {sample_thinking_steps(clipped, generator) for _ in range(200)} == {mean, mean + 1}


def test_the_window_that_covers_all_steps_gives_the_full_gradient():
    model = build().train()
    full = gradients(model, 5, 5)
    for window in (6, 100):
        assert all(torch.equal(gradients(model, 5, window)[name], value) for name, value in full.items())
    truncated = gradients(model, 5, 2)
    differing = [name for name, value in full.items() if not torch.allclose(truncated[name], value, rtol=1e-3)]
    assert any(name.startswith("model.core") for name in differing)


def test_a_window_gives_the_gradient_of_its_steps_alone():
    model = build().train()
    found = gradients(model, 5, 2)
    inner, core = model.model, model.model.core
    shared, _ = inner.share(inner.embed_tokens(IDS))
    x = inner.prelude(inner.embed_tokens(IDS), shared, 0)
    state = torch.zeros_like(x)
    for step in range(5):
        hidden = state + x
        for layer in core.layers:
            hidden = layer(hidden, shared, 0)
        state = core.state_norm(hidden)
        if step == 2:
            state = state.detach()
    logits = model.lm_head(inner.norm(inner.coda(state, shared, 0)))
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - found[name]).abs().max() <= 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_used_and_learn(adapter):
    model = build(recurrent_adapter_method=adapter).train()
    found = gradients(model, 3, 3)
    names = [name for name in dict(model.named_parameters()) if "adapter" in name]
    assert bool(names) == (adapter != "sum") and all(found[name].abs().max() > 0 for name in names)
    state, x = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    module, both = model.model.core.adapter, torch.cat([state, x], dim=-1)
    if adapter == "sum":
        expected = state + x
    elif adapter == "linear":
        expected = both @ module.proj.weight.T
    else:
        gate = torch.sigmoid(both @ module.gate.weight.T + module.gate.bias)
        expected = gate * state + (1 - gate) * x
    assert (module(state, x) - expected).abs().max() <= 1e-5


def test_first_states():
    x, noise = torch.randn(2, 9, 32), torch.randn(2, 9, 32)

    def first(kind, training, **fields):
        core = build(recurrent_state_initialization=kind, **fields).model.core.train(training)
        return core.initial_state(x, noise)

    assert first("zeros", True).abs().max() == 0
    assert torch.equal(first("normal", True, recurrent_state_std=0.5), noise * 0.5)
    assert first("normal", False).abs().max() == 0
    assert torch.equal(first("embedding", True), x)
    learned = first("learned", True, recurrent_state_std=0.5)
    assert learned.std() > 0.2 and torch.equal(learned[0, 0], learned[1, 5])
    model = build(recurrent_state_initialization="learned").train()
    assert gradients(model, 2, 2)["model.core.learned_state"].abs().max() > 0


def test_depth_in_training_is_drawn_from_torchs_generator():
    model, drawn = build().train(), []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        drawn.append(int(model(input_ids=IDS).thinking_steps[0, 0]))
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert model.eval()(input_ids=IDS).thinking_steps.unique().tolist() == [8]


def test_memory_does_not_grow_with_steps_beyond_the_window():
    model = build().train()

    def kept(n_steps):
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=IDS, labels=IDS, n_thinking_steps=n_steps, n_backprop_steps=8)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}.values())

    assert kept(32) <= 1.01 * kept(8) and kept(8) > 1.5 * kept(4)


def test_more_state_norms_and_layers_take_part_in_the_gradient():
    model = build(recurrent_use_sandwich_norm=False, recurrent_use_state_norm=False).train()
    assert len(gradients(model, 3, 2)) == len(list(model.parameters()))
    assert sum(1 for name, _ in model.named_parameters() if "post_norm" in name) == 0
    model = build(recurrent_state_initialization="learned").train()
    found = gradients(model, 3, 2)
    assert len(found) == len(list(model.parameters())) and found["model.core.learned_state"].abs().max() == 0


@pytest.mark.parametrize("mean, sigma", [(0.0, 0.5), (3.0, 0.0), (3.0, 0.5), (8.0, 1.0)])
def test_lognormal_poisson_has_its_mean_for_every_sigma(mean, sigma):
    generator = np.random.default_rng(0)
    steps = np.array([lognormal_poisson(generator, mean, sigma) for _ in range(40_000)])
    assert abs(steps.mean() - mean) <= 0.05 * max(mean, 0.01)
    # Var[n] = E[rate] + Var[rate] of the log-normal rate.
    assert abs(steps.var() - mean - mean**2 * np.expm1(sigma**2)) <= 0.2 * max(mean, 0.01) ** 2


def test_a_carried_state_goes_on_where_the_last_call_stopped():
    model = build().eval()
    inner = model.model
    with torch.no_grad():
        whole = inner(IDS, thinking=Thinking(n_steps=5), return_dict=True)
        carried = CarriedState(2)
        inner(IDS, thinking=Thinking(n_steps=3, carried=carried), return_dict=True)
        rest = inner(IDS, thinking=Thinking(n_steps=5, carried=carried), return_dict=True)
    assert torch.equal(rest.last_hidden_state, whole.last_hidden_state)
    assert rest.thinking_steps.unique().tolist() == [2] and whole.thinking_steps.unique().tolist() == [5]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"carried": CarriedState(9)}, "carried n_steps=9 must be from 1 to all thinking steps, 8"),
        ({}, {"carried": CarriedState(0)}, "carried n_steps=0 must be from 1"),
        ({"recurrent_exit_criterion": "kl"}, {"carried": CarriedState(1)}, "evaluation without exits"),
        ({"n_recurrent_layers": 0}, {"carried": CarriedState(1)}, "carried has no effect"),
    ],
)
def test_a_carried_state_that_does_not_fit_is_refused(fields, options, message):
    model = build(**fields)
    with pytest.raises(ValueError, match=message):
        model.eval().model(IDS, thinking=Thinking(**options), predict=model.lm_head)
    if not fields:
        with pytest.raises(ValueError, match=r"evaluation without exits: model\.eval"):
            model.train().model(IDS, thinking=Thinking(n_steps=3, carried=CarriedState(1)))
