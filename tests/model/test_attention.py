"""Attention, blocks, norms and positions against slow and obvious versions."""

import math

import pytest
import torch
import torch.nn.functional as F
from rotary_embedding_torch import RotaryEmbedding

from model.attention import (
    LayerInputs,
    MegaTransformerBlock,
    MegaTransformerSelfAttention,
    Residual,
    SimpleFFN,
    eager_attention,
)
from model.norms import LayerNorm, RMSNorm
from model.positions import (
    alibi_bias,
    alibi_slopes,
    apply_rotary,
    positions_in_segments,
    rotary_frequencies,
    rotary_table,
    sinusoidal_embedding,
    visible_keys,
)
from utils.configuration import MegaTransformerConfig


def config(implementation="sdpa", **fields):
    made = MegaTransformerConfig(**{"hidden_size": 32, "n_heads": 4, **fields})
    made._attn_implementation = implementation
    return made


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_by_loops(q, k, v, mask):
    """softmax(q k / sqrt(K)) v for each row, head and query by itself, in doubles."""
    B, H, L, K = q.shape
    out = torch.zeros(B, H, L, K, dtype=torch.double)
    for b in range(B):
        for h in range(H):
            g = h * k.shape[1] // H
            for i in range(L):
                seen = [j for j in range(k.shape[2]) if mask[b, i, j]]
                scores = torch.stack([q[b, h, i].double() @ k[b, g, j].double() / math.sqrt(K) for j in seen])
                out[b, h, i] = sum(w * v[b, g, j].double() for w, j in zip(scores.softmax(0), seen))
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_loops(groups):
    q, k, v = normal(2, 4, 6, 8), normal(2, groups, 6, 8, seed=1), normal(2, groups, 6, 8, seed=2)
    tokens = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    mask = visible_keys(torch.arange(6), torch.arange(6), attention_mask=tokens)
    expected = attention_by_loops(q, k, v, mask[:, 0])
    eager, weights = eager_attention(q, k, v, mask=mask)
    assert (eager - expected).abs().max() <= 1e-5
    assert (weights.sum(-1) - 1).abs().max() <= 1e-5 and weights[~mask.expand(2, 4, 6, 6)].abs().max() == 0
    fused = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert (fused - expected).abs().max() <= 1e-5
    causal = attention_by_loops(q, k, v, torch.ones(2, 6, 6).tril())
    assert (eager_attention(q, k, v)[0] - causal).abs().max() <= 1e-5


@pytest.mark.parametrize("groups, use_qk_norm", [(1, False), (2, True), (4, False)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_kernels_and_gradients_agree(groups, use_qk_norm, has_mask):
    x, outputs = normal(2, 6, 32), []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        attention = MegaTransformerSelfAttention(
            config(implementation, n_query_groups=groups, use_qk_norm=use_qk_norm)
        )
        shared = LayerInputs(rotary_table(rotary_frequencies(8), torch.arange(6)[None]))
        if has_mask:
            shared.mask = visible_keys(
                torch.arange(6), torch.arange(6), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
            )
        out = attention(x, shared, 0)
        out.square().sum().backward()
        outputs.append((out, attention.qkv_proj.weight.grad))
    for fused, eager in zip(*outputs):
        assert (fused - eager).abs().max() <= 1e-4


def test_rotary_equals_complex_products_and_the_library():
    x, positions = normal(2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 100, 8191]])
    frequencies = rotary_frequencies(8)
    found = apply_rotary(x, rotary_table(frequencies, positions))
    for b in range(2):
        for n, position in enumerate(positions[b].tolist()):
            for pair in range(4):
                angle = position * 10000.0 ** (-2 * pair / 8)
                z = complex(*x[b, n, 0, 2 * pair : 2 * pair + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
                assert found[b, n, 0, 2 * pair].item() == pytest.approx(z.real, abs=2e-3 if position > 1000 else 1e-5)
                assert found[b, n, 0, 2 * pair + 1].item() == pytest.approx(
                    z.imag, abs=2e-3 if position > 1000 else 1e-5
                )
    library = RotaryEmbedding(8).rotate_queries_or_keys(x[:1].transpose(1, 2)).transpose(1, 2)
    assert (library - found[:1]).abs().max() <= 1e-6


def test_rotary_in_part_stretched_and_compiled():
    x, positions = normal(1, 6, 2, 8), torch.arange(6)[None]
    part = apply_rotary(x, rotary_table(rotary_frequencies(4), positions))
    assert torch.equal(part[..., 4:], x[..., 4:])
    assert torch.equal(part[..., :4], apply_rotary(x[..., :4], rotary_table(rotary_frequencies(4), positions)))
    stretched = rotary_table(rotary_frequencies(8, interpolation=2.0), 2 * positions)
    assert (stretched - rotary_table(rotary_frequencies(8), positions)).abs().max() <= 1e-6
    assert rotary_frequencies(8, ntk_factor=4.0)[-1] < rotary_frequencies(8)[-1] and rotary_frequencies(8)[0] == 1.0
    table = rotary_table(rotary_frequencies(8), positions)
    compiled = torch.compile(apply_rotary, backend="eager", fullgraph=True)
    assert (compiled(x, table) - apply_rotary(x, table)).abs().max() <= 1e-6
    # Scores depend on the distance of query and key alone.
    q, k = (normal(1, 1, 1, 8, seed=seed).expand(1, 6, 1, 8) for seed in (3, 4))
    q, k = apply_rotary(q, table)[0, :, 0], apply_rotary(k, table)[0, :, 0]
    scores = q @ k.T
    assert (scores[1:, 1:] - scores[:-1, :-1]).abs().max() <= 1e-5


def test_alibi_equals_its_matrix():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    bias = alibi_bias(6, torch.arange(4, 7)[None], torch.arange(7)[None])
    for h, slope in enumerate(alibi_slopes(6)):
        for i, query in enumerate(range(4, 7)):
            assert bias[0, h, i].tolist() == [-slope * abs(query - key) for key in range(7)]


def test_sinusoidal_positions_equal_their_formula():
    found = sinusoidal_embedding(torch.tensor([[0, 5]]), 6)[0, 1]
    angles = [5 / 10000 ** (2 * i / 6) for i in range(3)]
    assert found.tolist() == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-6)


def test_positions_begin_anew_in_each_segment():
    segments = torch.tensor([[3, 3, 3, 0, 0, 5], [1, 1, 1, 1, 1, 1]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("use_pre, use_post", [(True, False), (False, True), (True, True)])
def test_norms_stand_where_the_flags_say(use_pre, use_post):
    fields = {"use_pre_attention_norm": use_pre, "use_post_attention_norm": use_post}
    fields |= {"use_pre_ffn_norm": use_pre, "use_post_ffn_norm": use_post}
    torch.manual_seed(0)
    block, x = MegaTransformerBlock(config(**fields, use_rotary_embedding=False)), normal(1, 5, 32)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def norm(module, values):
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    expected = x
    for norms, branch in (
        (block.attention_norms, lambda y: block.attention(y, LayerInputs(), 0)),
        (block.ffn_norms, block.ffn),
    ):
        if use_pre and use_post:
            expected = expected + norm(norms.post_norm, branch(norm(norms.pre_norm, expected)))
        elif use_pre:
            expected = expected + branch(norm(norms.pre_norm, expected))
        else:
            expected = norm(norms.post_norm, expected + branch(expected))
    assert (block(x, LayerInputs(), 0) - expected).abs().max() <= 1e-5


def test_sandwich_norms_overrule_the_flags():
    block = MegaTransformerBlock(config(), use_sandwich_norm=True)
    for norms in (block.attention_norms, block.ffn_norms):
        assert isinstance(norms.pre_norm, RMSNorm) and isinstance(norms.post_norm, RMSNorm)
    assert Residual(config(), use_pre_norm=True, use_post_norm=False).post_norm is None


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu_squared", "silu"])
def test_feed_forward_equals_its_formula(activation):
    ffn, x = SimpleFFN(config(ffn_activation=activation, use_ffn_bias=True)), normal(3, 32)
    inner = x @ ffn.in_proj.weight.T + ffn.in_proj.bias
    half = inner.shape[-1] // 2
    phi = 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    tanh = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    expected = {
        "swiglu": inner[:, :half] * inner[:, :half].sigmoid() * inner[:, half:],
        "geglu": (inner * phi)[:, :half] * inner[:, half:],
        "gelu": inner * phi,
        "gelu_tanh": inner * tanh,
        "relu": inner.clamp_min(0),
        "relu_squared": inner.clamp_min(0) ** 2,
        "silu": inner * inner.sigmoid(),
    }[activation]
    assert (ffn(x) - (expected @ ffn.out_proj.weight.T + ffn.out_proj.bias)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_their_formulas_with_fp32_statistics(dtype):
    x = (normal(4, 7, 32) * 100 + 3).to(dtype)
    rms, layer = RMSNorm(32, 1e-6), LayerNorm(32, 1e-6)
    for module in (rms, layer):
        torch.nn.init.normal_(module.weight)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight
    with torch.no_grad():
        inference = rms(x)
    for found in (rms(x), inference):
        assert (found.dtype == dtype and torch.equal(found, expected.to(torch.float32).to(dtype))) or (
            (found.double() - expected).abs() <= expected.abs() * (1e-5 if dtype == torch.float32 else 8e-3)
        ).all()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight
    assert (layer(x).double() - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 3e-2)


def test_norm_gradients_are_those_of_the_formula():
    norm, x = RMSNorm(6, 1e-6).double(), normal(3, 4, 6).double().requires_grad_()
    torch.nn.init.normal_(norm.weight)
    (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight).sin().sum().backward()
    expected, x.grad = (x.grad, norm.weight.grad), None
    norm.weight.grad = None
    norm(x).sin().sum().backward()
    assert (x.grad - expected[0]).abs().max() <= 1e-6 and (norm.weight.grad - expected[1]).abs().max() <= 1e-5
