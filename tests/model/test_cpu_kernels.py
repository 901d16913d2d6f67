import pytest
import torch
import torch.nn.functional as F

from model.cpu_kernels import (
    BLOCK,
    FEW_ROWS,
    SPLITS,
    Linear,
    attention,
    blockwise_attention,
    causal_attention,
    is_split_faster,
    split_product,
)
from model.positions import visible_keys


def tensors(L, groups, dtype=torch.double, B=2, H=4, K=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, L, K), (B, groups, L, K), (B, groups, L, K), (B, H, L, K))
    return [torch.randn(shape, generator=generator, dtype=torch.double).to(dtype) for shape in shapes]


def masks(L):
    tokens = torch.ones(2, L, dtype=torch.bool)
    tokens[0, :5] = False
    segments = torch.arange(L)[None].expand(2, L) // 37
    return {
        "causal": None,
        "padded": visible_keys(torch.arange(L), torch.arange(L), attention_mask=tokens, segment_ids=segments),
    }


@pytest.mark.parametrize("mask_kind", ["causal", "padded"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("L", [70, BLOCK, 2 * BLOCK + 9])
@pytest.mark.parametrize("keep", [True, False])
def test_blocks_equal_the_library(L, groups, mask_kind, keep):
    q, k, v, grad = tensors(L, groups)
    mask = masks(L)[mask_kind]
    inputs = [part.requires_grad_() for part in (q, k, v)]
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    gradients = torch.autograd.grad(expected, inputs, grad)
    found, kept = blockwise_attention(q, k, v, mask, keep)
    assert (found - expected).abs().max() <= 1e-12 and len(kept) == (-(-L // BLOCK) if keep else 0)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad), gradients):
        assert (ours - theirs).abs().max() <= 1e-5  # keys' gradients are summed in fp32


def test_blocks_in_bf16_are_as_exact_as_attention_by_its_definition():
    q, k, v, _ = tensors(200, 2)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    q, k, v = (part.bfloat16() for part in (q, k, v))
    error = (causal_attention(q, k, v).double() - exact).norm() / exact.norm()
    assert error < 6e-3
    assert causal_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [True, False])
def test_blocks_pass_the_librarys_checks_of_operators(keep):
    q, k, v, _ = tensors(2 * BLOCK, 2, torch.float32)
    inputs = (*(part.requires_grad_() for part in (q, k, v)), None, keep)
    torch.library.opcheck(blockwise_attention, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("n_rows", [1, 2, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("n_outputs, bias", [(12, True), (16, False), (10, True)])
def test_few_rows_equal_many(n_rows, n_outputs, bias):
    torch.manual_seed(0)
    layer, x = Linear(24, n_outputs, bias=bias), torch.randn(n_rows, 1, 24)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        found = layer(x)
        if n_outputs % SPLITS == 0:
            split = split_product(x[:, 0], layer.weight)
            assert split.is_contiguous() and (split - F.linear(x[:, 0], layer.weight)).abs().max() <= 1e-5
        assert found.is_contiguous() and (found - expected).abs().max() <= 1e-5
        assert layer(x[:0]).shape == (0, 1, n_outputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_the_faster_of_both_products_is_chosen_once_without_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choice = is_split_faster(torch.get_num_threads())
    assert torch.rand(1) == expected and is_split_faster(torch.get_num_threads()) is choice


@pytest.mark.parametrize("mask_kind", ["none", "bool", "added", "causal"])
def test_short_attention_in_bf16_is_computed_in_fp32(mask_kind):
    q, k, v, grad = (part.bfloat16() for part in tensors(40, 2))
    mask = {"bool": torch.rand(2, 1, 40, 40) < 0.8, "added": torch.randn(2, 1, 40, 40)}.get(mask_kind)
    options = {"mask": mask, "is_causal": mask_kind == "causal", "enable_gqa": True}
    inputs, exact = (
        [part.to(dtype).requires_grad_() for part in (q, k, v)] for dtype in (torch.bfloat16, torch.double)
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs, **options)
        with torch.no_grad():
            assert torch.equal(attention(*inputs, **options), out)
    expected = attention(*exact, **options)
    # A result in fp32 is rounded once, when it is returned.
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.float().bfloat16(), rtol=2**-7, atol=1e-5)
    gradients = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(torch.autograd.grad(out, inputs, grad), gradients):
        torch.testing.assert_close(ours, theirs.float().bfloat16(), rtol=2**-7, atol=1e-5)
