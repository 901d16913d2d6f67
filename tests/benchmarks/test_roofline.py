"""The roofline: operations of known products and of our own kernels, shares of a step, and a table of every stage."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.roofline import ROWS, BenchmarkArguments, Family, causal_step, count_operations, measure, vocoder_step
from model.cpu_kernels import BLOCK, causal_attention


def test_operations_of_a_product_and_of_attention():
    a = torch.randn(3, 5, requires_grad=True)
    assert count_operations(lambda: (a @ torch.randn(5, 7)).sum().backward()) == 2 * (2 * 3 * 5 * 7)
    # Blocks of queries see the keys up to their ends; the backward pass has twice as many products.
    q, k, v = (torch.randn(1, 2, 2 * BLOCK, 8, requires_grad=True) for _ in range(3))
    seen = BLOCK * BLOCK + BLOCK * 2 * BLOCK
    assert count_operations(lambda: causal_attention(q, k, v).sum().backward()) == (2 + 4) * 2 * 2 * seen * 8
    # The library's kernel counts all keys, also those that its queries do not see.
    whole = (2 * BLOCK) ** 2
    assert count_operations(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 6 * 2 * 2 * whole * 8


def test_the_product_itself_reaches_its_own_rate():
    a, b = torch.randn(256, 256), torch.randn(256, 256)

    def run():
        for _ in range(8):
            a @ b

    row = measure(run, "fp32", 5, size=256)
    assert row["operations"] == 8 * 2 * 256**3
    assert 0.1 < row["share"] < 10  # A busy machine may slow either side.


@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_step_with_its_own_backward_passes_is_counted(is_bf16):
    # A GAN step computes gradients with `autograd.grad` and updates both sides.
    step = vocoder_step("tiny", is_bf16)
    assert count_operations(step) > 2 * count_operations(vocoder_step("tiny", is_bf16, has_adversary=False))


def test_operations_of_text_are_six_per_weight_and_token_and_those_of_attention():
    n_weights = 8 * (4 * 256 * 256 + 3 * 256 * 704) + 256 * 4096
    seen = sum(range(BLOCK, 512 + 1, BLOCK)) * BLOCK  # pairs of a query and a key in the blocks that are computed
    attention = (2 + 4) * 2 * 4 * 8 * seen * 32
    assert count_operations(causal_step("llama-8m", False)) == 6 * n_weights * 4 * 512 + 8 * attention


def test_every_stage_has_rows():
    assert [*ROWS] == [*Family.__args__] == BenchmarkArguments().stages
