"""Kernels that are faster on a CPU than the library's: causal attention in blocks, attention to short sequences under
bf16, and, on some processors, products with a few rows.

B batch, L positions, H query heads, G key/value groups, K head width, r = H / G heads per group. Both are exact: they
change the order of sums alone. benchmarks/README.md has the measurements.
"""

import contextlib
import time
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128  # queries that are worked on together
KEPT_BYTES = 48 << 20  # Attention weights of a layer beyond this are computed again in the backward pass.
FEW_PAIRS = 1 << 16  # Up to this number of queries x keys, attention in bf16 has a slower backward pass than in fp32.
FEW_ROWS = 8  # up to here reading the weight takes longest
SPLITS = 4  # Smaller products into which a product with few rows is split.


def weights_of_block(q: Tensor, k: Tensor, mask: Tensor | None, *, groups: int, start: int, end: int) -> Tensor:
    """Attention weights of the queries from `start` to `end`: (B G, r n, end) from q (B G, r, L, K), k (B G, L, K)."""
    N, r, _, K = q.shape
    n = end - start
    scores = torch.bmm(q[:, :, start:end].reshape(N, r * n, K), k[:, :end].transpose(1, 2))
    if mask is None:
        # All queries of the block see the keys before it; within it they are causal.
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1)
        scores.view(N, r, n, end)[..., start:].masked_fill_(future, -torch.inf)
    else:
        visible = mask[:, :, start:end, :end]
        scores.view(N // groups, groups * r, n, end).masked_fill_(~visible, -torch.inf)
    return scores.softmax(-1)


@torch.library.custom_op("megatransformer::blockwise_attention", mutates_args=())
def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k' / sqrt(K)) v under a causal mask, block of queries by block, without the keys after a block.

    Args:
        q: (B, H, L, K). k, v: (B, G, L, K); each group serves H / G neighbouring heads.
        mask: (B or 1, 1, L, L) bool, true where a key is seen, false above the diagonal; None: causal alone.
        keep: return the weights, for the backward pass.
    Returns: outputs (B, H, L, K), and the weights of each block, (B G, r n, end), or none.
    """
    (B, H, L, K), G = q.shape, k.shape[1]
    r, N = H // G, B * G
    q = (q * K**-0.5).reshape(N, r, L, K)
    # Groups join the batch, and the r heads of a group share its keys.
    k, v = k.reshape(N, L, K), v.reshape(N, L, K)
    out, saved = q.new_empty(N, r, L, K), []
    # A block of queries sees the keys up to its end alone: half of all products are never computed.
    for start in range(0, L, BLOCK):
        end = min(start + BLOCK, L)
        weights = weights_of_block(q, k, mask, groups=G, start=start, end=end)
        out[:, :, start:end] = torch.bmm(weights, v[:, :end]).view(N, r, end - start, K)
        if keep:
            saved.append(weights)
    return out.view(B, H, L, K), saved


@torch.library.custom_op("megatransformer::blockwise_attention_backward", mutates_args=())
def blockwise_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `blockwise_attention` for q, k and v."""
    (B, H, L, K), G = q.shape, k.shape[1]
    r, N = H // G, B * G
    scaled, grad = (q * K**-0.5).reshape(N, r, L, K), grad.reshape(N, r, L, K)
    keys, values = k.reshape(N, L, K), v.reshape(N, L, K)
    grad_q = torch.empty_like(scaled)
    grad_k, grad_v = (torch.zeros(N, L, K, dtype=torch.float32, device=q.device) for _ in range(2))
    for start in range(0, L, BLOCK):
        end = min(start + BLOCK, L)
        # The weights were saved or are computed again.
        size = (N, r * (end - start), K)
        part, upper = scaled[:, :, start:end].reshape(size), grad[:, :, start:end].reshape(size)
        weights = (
            saved[start // BLOCK] if saved else weights_of_block(scaled, keys, mask, groups=G, start=start, end=end)
        )
        # d scores = softmax'(d weights), then the gradients of values, keys and queries from it.
        grad_weights = torch.bmm(upper, values[:, :end].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        for total, left, right in ((grad_v, weights, upper), (grad_k, grad_scores, part)):
            if total.dtype == left.dtype:
                total[:, :end].baddbmm_(left.transpose(1, 2), right)
            else:
                total[:, :end] += torch.bmm(left.transpose(1, 2), right)
        grad_q[:, :, start:end] = torch.bmm(grad_scores, keys[:, :end]).view(N, r, end - start, K)
    grad_q.mul_(K**-0.5)
    return grad_q.view(B, H, L, K), grad_k.to(k.dtype).view(k.shape), grad_v.to(v.dtype).view(v.shape)


@blockwise_attention.register_fake
def _(q, k, v, mask, keep):
    (B, H, L, _), G = q.shape, k.shape[1]
    ends = [(start, min(start + BLOCK, L)) for start in range(0, L, BLOCK)] if keep else []
    return torch.empty_like(q, memory_format=torch.contiguous_format), [
        q.new_empty(B * G, H // G * (end - start), end) for start, end in ends
    ]


@blockwise_attention_backward.register_fake
def _(grad, q, k, v, mask, saved):
    return tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, k, v))


def remember(ctx, inputs, output) -> None:
    """Keep what the backward pass needs."""
    q, k, v, mask, _ = inputs
    ctx.save_for_backward(q, k, v, *([] if mask is None else [mask]), *output[1])
    ctx.has_mask = mask is not None


def differentiate(ctx, grad, _):
    """Gradients of q, k, v; none of mask and keep."""
    q, k, v, *rest = ctx.saved_tensors
    mask, saved = (rest[0], rest[1:]) if ctx.has_mask else (None, rest)
    return *blockwise_attention_backward(grad.contiguous(), q, k, v, mask, saved), None, None


blockwise_attention.register_autograd(differentiate, setup_context=remember)


def is_blockwise_faster(q: Tensor, k: Tensor, *, mask: Tensor | None, dropout: float) -> bool:
    """Whether `blockwise_attention` can and should do the work: on a CPU, whole sequences, causal masks without
    biases."""
    L = q.shape[2]
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False  # An exported graph serves every length.
    if q.device.type != "cpu" or dropout > 0 or k.shape[2] != L or L < BLOCK // 2:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, L, L))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`blockwise_attention`, keeping the weights for the backward pass where they are small: (B, H, L, K)."""
    # Queries of block i have i blocks of keys: half of L x (L + BLOCK) weights.
    n_bytes = q.shape[0] * q.shape[1] * q.shape[2] * (q.shape[2] + BLOCK) // 2 * q.element_size()
    keep = torch.is_grad_enabled() and q.requires_grad and n_bytes <= KEPT_BYTES
    return blockwise_attention(q, k, v, mask, keep)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, in fp32 instead of bf16 on a CPU with few queries and keys, with and without
    gradients; a single query, as in generation, keeps its type.

    Args:
        q: (B, H, L, K). k, v: (B, G, S, K).
        mask: (B or 1, H or 1, L or 1, S), bool (true: visible) or what is added to the scores.
        options: others of the library's function.
    Returns: (B, H, L, K), of the type of q.
    """
    is_short = q.shape[2] > 1 and q.shape[2] * k.shape[2] <= FEW_PAIRS
    dtype = torch.float32 if is_short and q.device.type == "cpu" and q.dtype == torch.bfloat16 else q.dtype
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    with torch.autocast("cpu", enabled=False) if dtype != q.dtype else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, **options)
    return out.to(q.dtype)


def split_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, D) times weight (D', D) transposed, as SPLITS products: (N, D'); SPLITS divides D'."""
    # (SPLITS, D' / SPLITS, D) x (SPLITS, D, N).
    out = torch.bmm(weight.view(SPLITS, -1, weight.shape[1]), x.t().expand(SPLITS, -1, -1))
    return out.view(weight.shape[0], -1).t().contiguous()


@cache
def is_split_faster(n_threads: int) -> bool:
    """Whether this processor takes less time for `split_product` than for the library's product of one row.

    On AMD's processors the library (MKL) reads the weight on one thread, and the split product is 4 times as fast; on
    Intel's it is 3 to 4 times as slow. So both are measured, once per process and number of threads, in about 2 ms.
    """
    x, weight = torch.ones(1, 256), torch.ones(1024, 256)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(10):
        for is_split, product in ((True, split_product), (False, F.linear)):
            start = time.perf_counter()
            product(x, weight)
            seconds[is_split].append(time.perf_counter() - start)
    return min(seconds[True]) < 0.7 * min(seconds[False])


class Linear(nn.Linear):
    """A linear layer whose product with one to eight rows in fp32, as in generation, is split where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * self.in_features or not self.can_split(x):
            return super().forward(x)
        out = split_product(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def can_split(self, x: Tensor) -> bool:
        """Whether inputs and weights are in fp32 on a CPU that gains by it, outside of autocast and compilers, and
        outputs divide."""
        weight = self.weight
        is_plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
        if not is_plain or weight.shape[0] % SPLITS or torch.compiler.is_compiling():
            return False
        return not torch.is_autocast_enabled("cpu") and is_split_faster(torch.get_num_threads())
