"""Keyed dropout: its statistics, what a mask depends on, and the transformer with it."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from model.causal import MegaTransformerForCausalLM
from model.dropout import (
    AXIS_STEPS,
    FACTORS,
    LEVELS,
    Dropout,
    dropout,
    dropout_threshold,
    fold,
    has_dropout,
    keep_mask,
)
from utils.configuration import MegaTransformerConfig
from utils.seeds import sample_keys

P = {"hidden_dropout": 0.2, "embedding_dropout": 0.3, "attention_dropout": 0.25, "ffn_dropout": 0.1}
FLAT = {"hidden_size": 32, "n_heads": 4, "vocab_size": 50, "n_layers": 3}
CORE = {**FLAT, "n_prelude_layers": 1, "n_layers": 0, "n_recurrent_layers": 2, "n_coda_layers": 1}
CORE |= {"recurrent_state_initialization": "zeros"}
MODELS = pytest.mark.parametrize("fields", [FLAT, CORE], ids=["flat", "recurrent"])
IDS = torch.randint(2, 50, (3, 10), generator=torch.Generator().manual_seed(1))
KEYS = sample_keys(0, 5, torch.tensor([4, 2, 9]), stream="dropout")


def build(fields, **more):
    torch.manual_seed(0)
    return MegaTransformerForCausalLM(MegaTransformerConfig(**fields, **P, initializer_range=0.2, **more)).train()


def forward(model, ids=IDS, keys=KEYS, **keywords):
    steps = {"n_thinking_steps": 5, "n_backprop_steps": 2} if model.config.n_recurrent_layers else {}
    return model(input_ids=ids, dropout_keys=keys, use_cache=False, **steps, **keywords)


def standardised(mask, p):
    """Numbers of mean 0 and variance 1 if elements stay with the probability that p is rounded to."""
    q = 1 - dropout_threshold(p) / LEVELS
    return (mask.double() - q) / math.sqrt(q * (1 - q))


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5])
def test_masks_have_their_rate_and_are_independent(p):
    keys, shape = sample_keys(1, 3, torch.arange(48), stream="dropout"), (64, 128)
    z = standardised(keep_mask(keys, shape, p), p)
    n = z.numel()
    assert abs(z.sum() / math.sqrt(n)) < 4
    # Rates of single samples, rows and columns: the sum of squares of k normal numbers.
    for axis, k in enumerate(z.shape):
        sums = z.sum([other for other in range(3) if other != axis]) / math.sqrt(n / k)
        assert abs(sums.square().sum() - k) < 5 * math.sqrt(2 * k)
    # Correlations of neighbours, of samples, of layers (folds) and of steps.
    for rows, columns in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0), (4, 3)]:
        pairs = z[:, rows:, columns:] * z[:, : 64 - rows, : 128 - columns]
        assert abs(pairs.sum()) < 5 * math.sqrt(pairs.numel())
    others = [z.roll(1, 0), z.roll(7, 0)]
    others += [standardised(keep_mask(fold(keys, number), shape, p), p) for number in (-1, 1, 2, 3, 4, 8, 257)]
    others += [standardised(keep_mask(sample_keys(1, 4, torch.arange(48), stream="dropout"), shape, p), p)]
    for other in others:
        assert abs((z * other).sum()) < 5 * math.sqrt(n)


def test_a_mask_is_a_function_of_key_and_position_alone():
    whole = keep_mask(KEYS, (4, 9, 14), 0.4)
    for shape in [(4, 9, 13), (2, 5, 3), (1, 9, 14)]:
        a, b, c = shape
        assert torch.equal(keep_mask(KEYS, shape, 0.4), whole[:, :a, :b, :c])
    assert torch.equal(keep_mask(KEYS[1:2], (4, 9, 14), 0.4), whole[1:2])


def random_word(key, positions):
    """`random_words` in whole numbers of any size."""
    bits = 2**64 - 1
    word = key + sum(position * step for position, step in zip(positions, AXIS_STEPS))
    for shift, factor in zip((30, 27), FACTORS):
        word = (word & bits) - 2**64 * (word >> 63 & 1)  # As int64.
        word = (word ^ word >> shift) * factor
    word &= bits
    return word ^ word >> 31


def test_masks_equal_a_slow_version_on_whole_numbers():
    words = [random_word(123456789, (2, column)) for column in range(5)]
    numbers = [word >> 16 * part & (LEVELS - 1) for word in words for part in range(4)]
    signed = [number - LEVELS if number >= LEVELS // 2 else number for number in numbers]
    expected = [number >= dropout_threshold(0.3) - LEVELS // 2 for number in signed][:18]
    assert keep_mask(torch.tensor([123456789]), (3, 18), 0.3)[0, 2].tolist() == expected


@pytest.mark.parametrize("p", [1e-7, 0.1, 0.5, 1 - 1e-7])
def test_the_expectation_is_the_input(p):
    x = torch.randn(3, 40, 50, requires_grad=True)
    mask, scale = keep_mask(KEYS, (40, 50), p), LEVELS / (LEVELS - dropout_threshold(p))
    assert abs(1 - 1 / scale - p) <= 2**-16 and 1 < scale <= LEVELS
    y = dropout(x, p, KEYS)
    assert torch.equal(y, torch.where(mask, x * scale, 0.0))
    y.sum().backward()
    assert torch.equal(x.grad, mask * torch.full_like(x, scale))


def test_without_keys_it_is_torchs_dropout():
    layer, torchs, x = Dropout(0.3), nn.Dropout(0.3), torch.randn(4, 50)
    outputs = []
    for module in (layer, torchs):
        torch.manual_seed(3)
        outputs.append(module(x))
    assert torch.equal(*outputs) and isinstance(layer, nn.Dropout)
    assert layer.eval()(x, KEYS) is x and Dropout(0.0)(x, KEYS) is x
    assert has_dropout(build(FLAT)) and not has_dropout(MegaTransformerForCausalLM(MegaTransformerConfig(**FLAT)))
    model, results = build(CORE, recurrent_steps_distribution="fixed"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(input_ids=IDS).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@MODELS
def test_a_samples_result_depends_on_its_key_alone(fields):
    model = build(fields)
    torch.manual_seed(1)
    whole = forward(model).logits
    torch.manual_seed(2)
    assert torch.equal(forward(model).logits, whole)
    assert (forward(model, IDS[1:2], KEYS[1:2]).logits - whole[1:2]).abs().max() <= 1e-5
    # Padding behind the sample.
    padded = torch.cat([IDS, torch.zeros(3, 7, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(3, 7, dtype=torch.int64)], 1)
    assert (forward(model, padded, attention_mask=mask).logits[:, :10] - whole).abs().max() <= 1e-5
    # Another key, and each kind of dropout, matter.
    assert (forward(model, keys=KEYS.roll(1)).logits - whole).abs().max() > 1e-2
    for name, p in P.items():
        torch.manual_seed(0)
        config = MegaTransformerConfig(**fields, initializer_range=0.2, **{name: p})
        alone = MegaTransformerForCausalLM(config).train()
        assert (forward(alone).logits - forward(alone, keys=KEYS.roll(1)).logits).abs().max() > 1e-3
        assert torch.equal(forward(alone).logits, forward(alone).logits)


@MODELS
def test_kernels_and_recomputation_see_the_same_masks(fields):
    gradients = []
    for kind in ("sdpa", "eager", "checkpointed"):
        model = build(fields, attn_implementation="eager" if kind == "eager" else "sdpa")
        if kind == "checkpointed":
            model.gradient_checkpointing_enable()
        forward(model, labels=IDS).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 1e-6 * gradients[0].abs().max()


@MODELS
def test_every_application_of_a_layer_has_masks_of_its_own(fields):
    model, masks = build(fields, attn_implementation="eager"), []
    for module in model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    weights = forward(model, output_attentions=True).attentions
    n_applied = len(weights)
    assert n_applied == (3 if fields is FLAT else 1 + 5 * 2 + 1) and len(masks) == 1 + 3 * n_applied
    # Masks of equal shape: the embedding's and those of branches, those of activations, those of attention weights.
    for kind in (
        [mask for mask in masks if mask.shape[-1] == 32],
        [mask for mask in masks if mask.shape[-1] != 32],
        [weight != 0 for weight in weights],
    ):
        for i, first in enumerate(kind):
            for second in kind[:i]:
                differing = (first != second).float().mean()
                assert differing > 0.05


@pytest.mark.slow  # Compilers take five seconds to load.
def test_compiled_blocks_are_one_graph_and_see_the_same_masks():
    model = build(FLAT)
    expected = forward(model, labels=IDS).loss
    expected.backward()
    gradient = model.model.main.layers[0].ffn.in_proj.weight.grad.clone()
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.main.layers:
        layer.compile(backend=counter, fullgraph=True)
    loss = forward(model, labels=IDS).loss
    loss.backward()
    assert counter.frame_count == 1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (model.model.main.layers[0].ffn.in_proj.weight.grad - gradient).abs().max() <= 1e-6


def test_keys_that_fit_no_batch_are_refused():
    model = build(FLAT)
    for keys in (KEYS[:2], KEYS[:, None], KEYS.float()):
        with pytest.raises(ValueError, match=r"dropout_keys is .*: give int64 of shape \(3,\)"):
            forward(model, keys=keys)
