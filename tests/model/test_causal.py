"""The causal transformer: cached equals whole, packed equals separate, padded equals alone, with exits and without."""

import copy
import itertools
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from model.causal import MegaTransformerForCausalLM
from model.kv_cache import KeyValueCache
from utils.configuration import MegaTransformerConfig

FLAT = {"n_layers": 2}
RECURRENT = {
    "n_prelude_layers": 1,
    "n_layers": 0,
    "n_recurrent_layers": 2,
    "n_coda_layers": 1,
    "recurrent_mean_thinking_steps": 3,
    "recurrent_max_thinking_steps": 8,
    "recurrent_backprop_steps": 2,
}
SPREAD = {"initializer_range": 0.2, "embedding_initializer_range": 0.3, "use_depth_scaled_initialization": False}
DEPTHS = {"flat": FLAT, "recurrent": RECURRENT}
POSITIONS = {
    "rotary": {},
    "alibi": {"use_rotary_embedding": False, "use_alibi_bias": True},
    "none": {"use_rotary_embedding": False},
    "learned": {"use_rotary_embedding": False, "position_embedding": "learned"},
}


def build(**fields):
    torch.manual_seed(0)
    defaults = {"hidden_size": 32, "n_heads": 4, "vocab_size": 50, "initializer_range": 0.2}
    return MegaTransformerForCausalLM(MegaTransformerConfig(**{**defaults, **fields})).eval()


def tokens(B=2, L=12):
    return torch.randint(2, 50, (B, L), generator=torch.Generator().manual_seed(1))


def in_pieces(model, ids, sizes, mask=None, cache=None, **kwargs):
    cache, logits, start = KeyValueCache() if cache is None else cache, [], 0
    for size in sizes:
        piece = {"input_ids": ids[:, start : start + size], "past_key_values": cache}
        if mask is not None:
            piece["attention_mask"] = mask[:, : start + size]
        logits.append(model(**piece, **kwargs).logits)
        start += size
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("position", POSITIONS)
def test_cached_equals_whole(position, groups, depth, is_padded):
    model = build(n_query_groups=groups, **POSITIONS[position], **DEPTHS[depth])
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    if is_padded:
        mask[0, :3] = 0
    whole = model(input_ids=ids, attention_mask=mask).logits
    for sizes in ([5, 1, 1, 3, 1, 1], [1] * 12):
        pieces = in_pieces(model, ids, sizes, mask)
        assert (pieces - whole)[mask.bool()].abs().max() <= 1e-5
    if is_padded:  # The padded row is what it is without padding.
        alone = model(input_ids=ids[:1, 3:]).logits
        assert (whole[:1, 3:] - alone).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "criterion, threshold, fields",
    [
        ("kl", 1e-2, {}),
        ("kl", 1e-4, {}),
        ("kl", 1e-4, {"recurrent_exit_min_steps": 3}),
        ("latent_difference", 0.1, {}),
        ("latent_difference", 0.1, {"recurrent_cache_steps": 8}),
    ],
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_cached_equals_whole_with_exits(criterion, threshold, fields, is_padded):
    fields = {"recurrent_exit_criterion": criterion, "recurrent_exit_criteria_threshold": threshold, **fields}
    model = build(**RECURRENT, **fields, **SPREAD)
    ids, mask = tokens(L=20), torch.ones(2, 20, dtype=torch.int64)
    if is_padded:
        mask[0, :3] = 0
    whole = model(input_ids=ids, attention_mask=mask, n_thinking_steps=8)
    steps = whole.thinking_steps[mask.bool()]
    assert steps.min() < steps.max() <= 8 and whole.thinking_steps[~mask.bool()].sum() == 0
    pieces = in_pieces(model, ids, [9, 1, 1, 6, 1, 1, 1], mask, n_thinking_steps=8)
    assert (pieces - whole.logits)[mask.bool()].abs().max() <= 1e-5
    alone = model(input_ids=ids[:1, 3:] if is_padded else ids[:1], n_thinking_steps=8)
    assert (alone.logits - whole.logits[:1, -alone.logits.shape[1] :]).abs().max() <= 1e-5


@torch.no_grad()
def test_exits_that_never_come_change_nothing():
    model = build(**RECURRENT, recurrent_exit_criterion="kl")
    ids = tokens()
    full = model(input_ids=ids, n_thinking_steps=5, exit_threshold=0.0)
    slow = model(input_ids=ids, n_thinking_steps=5, exit_threshold=1e-30)
    assert (full.logits - slow.logits).abs().max() <= 1e-5
    assert slow.thinking_steps.unique().tolist() == [5]


@torch.no_grad()
def test_exits_equal_their_definition_token_by_token():
    """A loop over tokens that keeps keys of every step itself: each token stops alone and fills its later steps."""
    model = build(**RECURRENT, recurrent_exit_criterion="kl", recurrent_exit_criteria_threshold=1e-2, **SPREAD)
    ids = tokens(B=1, L=10)
    found = model(input_ids=ids, n_thinking_steps=8)
    inner, core = model.model, model.model.core
    past = {}  # (step, layer) -> list of (key, value) of the tokens so far
    for t in range(ids.shape[1]):
        shared, _ = inner.share(inner.embed_tokens(ids[:, : t + 1]))
        x = inner.prelude(inner.embed_tokens(ids[:, : t + 1]), shared, 0)[:, t:]
        shared.rotary, shared.mask = shared.rotary[:, t:], None

        def attend(layer, number, step, h, shared=shared):
            q, k, v = layer.attention.project(layer.attention_norms.before(h), shared.rotary)
            past.setdefault((step, number), []).append((k, v))
            keys, values = (torch.cat(part, 1).transpose(1, 2) for part in zip(*past[step, number]))
            branch = layer.attention.o_proj(layer.attention.attend(q, keys, values, shared=shared))
            h = layer.attention_norms.after(h, branch)
            return layer.ffn_norms.after(h, layer.ffn(layer.ffn_norms.before(h)))

        state, before, layers = torch.zeros_like(x), None, [*core.layers, *inner.coda.layers]
        for step in range(8):
            h = state + x
            for number in range(2):
                h = attend(layers[number], number, step, h)
            state = core.state_norm(h)
            h = attend(layers[2], 2, step, state)
            now = model.lm_head(inner.norm(h)).log_softmax(-1)
            if before is not None and (before.exp() * (before - now)).sum() < 1e-2:
                break
            before = now
        for later in range(step + 1, 8):
            for number in range(3):
                past.setdefault((later, number), []).append(past[step, number][-1])
        assert found.thinking_steps[0, t] == step + 1
        assert (found.logits[0, t].log_softmax(-1) - now[0, 0]).abs().max() <= 1e-5
    assert found.thinking_steps.min() < found.thinking_steps.max()


@torch.no_grad()
@pytest.mark.parametrize("position, depth", itertools.product(POSITIONS, DEPTHS))
def test_packed_equals_separate(position, depth):
    model = build(**POSITIONS[position], **DEPTHS[depth])
    ids = tokens(B=1)
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4])
    packed = model(input_ids=ids, segment_ids=segments, labels=ids)
    parts = [model(input_ids=part, labels=part) for part in ids.split([5, 3, 4], dim=1)]
    assert (packed.logits - torch.cat([part.logits for part in parts], dim=1)).abs().max() <= 1e-5
    nats = sum(part.cross_entropy.sum() for part in parts)
    assert packed.loss.item() == pytest.approx(nats.item() / (4 + 2 + 3), abs=1e-6)
    assert model.count_targets(ids, segments) == 9


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
def test_future_tokens_do_not_leak(depth):
    model, ids = build(**DEPTHS[depth]), tokens()
    changed = torch.cat([ids[:, :7], ids[:, 7:] % 40 + 3], dim=1)
    first, second = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(first[:, :7], second[:, :7]) and not torch.allclose(first[:, 7:], second[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_in_a_left_padded_batch_equals_single_runs(mode, depth):
    model, ids = build(**DEPTHS[depth]), tokens(B=8)
    lengths = [12, 3, 7, 1, 9, 12, 5, 2]
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    padded = ids * mask
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=6, **mode)[:, 12:]
    for b, length in enumerate(lengths):
        alone = model.generate(ids[b : b + 1, 12 - length :], max_new_tokens=6, **mode)[:, length:]
        assert torch.equal(batch[b : b + 1], alone)


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
def test_static_and_transformers_caches_give_the_same(depth):
    model, ids = build(**DEPTHS[depth], n_query_groups=2), tokens()
    ours = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static"))
    assert torch.equal(ours, model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="dynamic"))
    assert torch.equal(ours, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    static = StaticCache(config=model.config, max_cache_len=16)
    assert (in_pieces(model, ids, [5, 1, 6], cache=static) - model(input_ids=ids).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_steps_that_share_slots_are_exact_with_enough_of_them_and_smaller_with_few():
    ids = tokens()
    exact = build(**RECURRENT)(input_ids=ids, n_thinking_steps=4).logits
    for slots, is_exact in ((4, True), (2, False)):
        model, cache = build(**RECURRENT, recurrent_cache_steps=slots), KeyValueCache()
        assert torch.equal(model(input_ids=ids, n_thinking_steps=4, use_cache=False).logits, exact)
        pieces = in_pieces(model, ids, [5, 1, 6], cache=cache, n_thinking_steps=4)
        assert ((pieces - exact).abs().max() <= 1e-5) == is_exact
        assert len(cache.layers) == 1 + slots * 3 and {layer.get_seq_length() for layer in cache.layers} <= {0, 12}


def test_a_cache_with_fewer_steps_is_refused():
    model, ids, cache = build(**RECURRENT), tokens(), KeyValueCache()
    model(input_ids=ids, past_key_values=cache, n_thinking_steps=2)
    with pytest.raises(ValueError, match="holds 12 tokens, but only 0 of them in slot 7, which 4 thinking steps"):
        model(input_ids=ids, past_key_values=cache, n_thinking_steps=4)
    with pytest.raises(ValueError, match="n_thinking_steps=9 must be from 1 to recurrent_max_thinking_steps=8"):
        model(input_ids=ids, n_thinking_steps=9)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_save_and_load(depth, dtype, is_tied, tmp_path):
    extra = {"recurrent_state_initialization": "learned"} if depth == "recurrent" else {}
    model = build(**DEPTHS[depth], **extra, tie_word_embeddings=is_tied, use_zero_output_initialization=True).to(dtype)
    model.save_pretrained(tmp_path)
    for loaded in (
        MegaTransformerForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype),
    ):
        assert type(loaded) is MegaTransformerForCausalLM and loaded.dtype == dtype
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert not list(loaded.buffers())
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
        assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    blocks = [module for name, module in model.named_modules() if name.endswith(("o_proj", "out_proj"))]
    assert blocks and all(module.weight.abs().max() == 0 for module in blocks)
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size <= n_bytes * 1.01 + 8192


def test_rotary_is_exact_far_out_in_bf16():
    model = build(**FLAT, max_position_embeddings=8192)
    ids = tokens(B=1, L=4)
    low = copy.deepcopy(model).bfloat16()
    for positions in (torch.arange(4), torch.arange(8188, 8192)):
        exact, rounded = (
            model(input_ids=ids, position_ids=positions[None]),
            low(input_ids=ids, position_ids=positions[None]),
        )
        error = (exact.logits - rounded.logits.float()).norm() / exact.logits.norm()
        assert error < 0.03  # that of bf16 weights and activations, near and far


@pytest.mark.parametrize("depth", DEPTHS)
def test_gradient_checkpointing_changes_nothing(depth):
    model, ids = build(**DEPTHS[depth]).train(), tokens()
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, ids).items():
        assert (gradient - plain[name]).abs().max() <= 1e-6 * max(1.0, plain[name].abs().max().item())


def gradients(model, ids, **kwargs):
    model.zero_grad()
    steps = {"n_thinking_steps": 4} if model.config.n_recurrent_layers else {}
    model(input_ids=ids, labels=ids, **{**steps, **kwargs}).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("is_tied", [True, False])
def test_chunked_loss_equals_whole(is_tied, z_loss_weight):
    ids, labels = tokens(B=3), tokens(B=3).masked_fill(torch.rand(3, 12) < 0.3, -100)
    fields = {**FLAT, "tie_word_embeddings": is_tied, "z_loss_weight": z_loss_weight}
    whole, chunked = build(**fields), build(**fields, loss_chunk_size=5)
    first, second = (model(input_ids=ids, labels=labels, n_targets=40) for model in (whole, chunked))
    assert second.logits is None and first.logits.shape == (3, 12, 50)
    assert first.loss.item() == pytest.approx(second.loss.item(), rel=1e-6)
    assert (first.cross_entropy - second.cross_entropy).abs().max() <= 1e-5
    assert first.z_loss.item() == pytest.approx(second.z_loss.item(), rel=1e-5)
    first.loss.backward()
    second.loss.backward()
    for one, two in zip(whole.parameters(), chunked.parameters()):
        assert (one.grad - two.grad).abs().max() <= 1e-6 * max(1.0, one.grad.abs().max().item())
    n_targets = whole.count_targets(labels)
    expected = (first.cross_entropy.sum() + z_loss_weight * first.z_loss * 40) / 40
    assert first.loss.item() == pytest.approx(expected.item(), rel=1e-5) and n_targets == (labels[:, 1:] >= 0).sum()


def test_a_frozen_head_gets_no_gradient_in_chunks():
    ids, fields = tokens(B=3), {**FLAT, "tie_word_embeddings": False, "loss_chunk_size": 5}
    whole, frozen = build(**fields), build(**fields)
    frozen.lm_head.requires_grad_(False)
    kept = []
    for model in (whole, frozen):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            loss = model(input_ids=ids, labels=ids).loss
        kept.append("end")
        loss.backward()
    # Neither computed nor held: of the shape of the head's weight, (V, D).
    shape, end = tuple(whole.lm_head.weight.shape), kept.index("end")
    assert shape in kept[:end] and shape not in kept[end:]
    assert frozen.lm_head.weight.grad is None
    rest = dict(frozen.named_parameters())
    for name, parameter in whole.named_parameters():
        assert name == "lm_head.weight" or torch.equal(parameter.grad, rest[name].grad)


def test_unequal_micro_batches_add_up_to_the_batch():
    ids, model = tokens(B=4), build(**FLAT)
    labels = ids.clone()
    labels[0, 3:], labels[2, 8:] = -100, -100
    whole = gradients(model, ids)
    n_targets = model.count_targets(labels)
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part in range(4):
        model(input_ids=ids[part : part + 1], labels=labels[part : part + 1], n_targets=n_targets).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - whole[name]).abs().max() <= 1e-6


@torch.no_grad()
def test_ready_masks_may_look_ahead_and_meet_segments():
    ids = tokens(B=1, L=200)
    mask = torch.ones(200, 200, dtype=torch.bool).tril()
    mask[:150, :150] = True
    logits = []
    for implementation in ("sdpa", "eager"):
        model = build(**FLAT)
        model.set_attn_implementation(implementation)
        logits.append(model(input_ids=ids, attention_mask=mask[None, None]).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    assert not torch.allclose(logits[0], model(input_ids=ids).logits, atol=1e-3)
    segments = (torch.arange(200) >= 60).long()[None]
    apart = model(input_ids=ids, attention_mask=mask[None, None], segment_ids=segments).logits
    assert not torch.allclose(apart[:, 60:], logits[0][:, 60:], atol=1e-3)
    assert len(model(input_ids=ids, output_attentions=True).attentions) == 2


@torch.no_grad()
def test_the_cache_has_the_names_of_old_and_new_transformers():
    model, ids = build(**FLAT), tokens()
    whole = model(input_ids=ids).logits
    for name in ("cache", "past_key_values"):
        first = model(input_ids=ids[:, :4], **{name: KeyValueCache()})
        assert first.cache is first.past_key_values and first.cache.get_seq_length() == 4
        rest = model(input_ids=ids[:, 4:], **{name: first.cache}).logits
        torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cache and past_key_values"):
        model(input_ids=ids, cache=KeyValueCache(), past_key_values=KeyValueCache())


def test_a_cache_outlives_changes_of_gradient_mode():
    model, ids, cache = build(**FLAT), tokens(), KeyValueCache()
    with torch.inference_mode():
        parts = [model(input_ids=ids[:, :4], past_key_values=cache).logits.clone()]
    with torch.no_grad():
        parts.append(model(input_ids=ids[:, 4:5], past_key_values=cache).logits)
    parts.append(model(input_ids=ids[:, 5:8], past_key_values=cache).logits.detach())
    with torch.no_grad():
        parts.append(model(input_ids=ids[:, 8:], past_key_values=cache).logits)
        assert (torch.cat(parts, dim=1) - model(input_ids=ids).logits).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
def test_assisted_generation_equals_greedy(depth):
    model, ids = build(**DEPTHS[depth]), tokens(B=1)
    ids = torch.cat([ids, ids], dim=1)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3))


@torch.no_grad()
def test_exits_in_corner_cases():
    model, ids = build(**RECURRENT, recurrent_exit_criterion="kl"), tokens()
    assert model(input_ids=ids, attention_mask=torch.zeros_like(ids)).thinking_steps.max() == 0
    one = model(input_ids=ids, n_thinking_steps=1)
    assert (one.logits - model(input_ids=ids, n_thinking_steps=1, exit_threshold=0.0).logits).abs().max() <= 1e-5
    cache = KeyValueCache()
    model(input_ids=ids, past_key_values=cache, exit_threshold=0.0)
    with pytest.raises(ValueError, match="3 thinking steps with exits read"):
        model(input_ids=ids, past_key_values=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="not kept with early exits"):
        model(input_ids=ids, output_hidden_states=True)


@pytest.mark.parametrize("fields", [{"ffn_activation": "gelu_tanh"}, {"ffn_activation": "relu_squared"}])
def test_models_are_pickled_and_copied(fields):
    model = build(**FLAT, **fields)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_chunked_loss_of_bf16_weights_and_without_gradient():
    ids, model = tokens(), build(**FLAT, loss_chunk_size=5).bfloat16()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32 and model.lm_head.weight.grad.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_odd_heads_rotate_in_part():
    ids = tokens()
    model = build(hidden_size=20, rotary_fraction=0.8, n_layers=1)
    assert (in_pieces(model, ids, [5, 7]) - model(input_ids=ids).logits).abs().max() <= 1e-5


def test_wrong_arguments_are_refused():
    ids = tokens()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        build(**FLAT)()
    with pytest.raises(ValueError, match="segment_ids"):
        build(**FLAT)(input_ids=ids, segment_ids=ids, past_key_values=KeyValueCache())
    with pytest.raises(ValueError, match=r"exit_threshold=0\.1 has no effect"):
        build(**RECURRENT)(input_ids=ids, exit_threshold=0.1)
    with pytest.raises(ValueError, match="n_thinking_steps has no effect"):
        build(**FLAT)(input_ids=ids, n_thinking_steps=2)
    with pytest.raises(ValueError, match="n_thinking_steps=0 must be from 1"):
        build(**RECURRENT)(input_ids=ids, n_thinking_steps=0)
    with pytest.raises(ValueError, match="initial_state has no effect"):
        build(**RECURRENT)(input_ids=ids, initial_state=torch.zeros(2, 12, 32))
    with pytest.raises(ValueError, match="eager"):
        build(**FLAT)(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match="modalities"):
        build(modalities=["text", "image"])


@pytest.mark.parametrize("depth, lengths", [("flat", [80, 12, 100]), ("recurrent", [12, 9])])
def test_whole_model_compiles_without_graph_breaks(depth, lengths):
    model, steps = build(**DEPTHS[depth]), {"n_thinking_steps": 4} if depth == "recurrent" else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in lengths:
        ids = tokens(L=length)
        expected = gradients(model, ids)
        model.zero_grad()
        compiled(input_ids=ids, labels=ids, use_cache=False, **steps).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad - expected[name]).abs().max() <= 1e-5
