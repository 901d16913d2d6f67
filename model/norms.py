"""Norms over the last axis, with their statistics in fp32.  D width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight with a backward pass in closed form, which keeps nothing but the input and 1 / rms."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        # 1 / rms, (..., 1): one pass over x, the rest in place on one number per row.
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        # As matrices: rows (N, D), rstd (N, 1).
        rows, grad, rstd = x.flatten(0, -2), grad.flatten(0, -2), rstd.flatten(0, -2)
        product = grad * rows
        grad_weight = torch.mv(product.t(), rstd[:, 0])
        # d/dx of x r w with r = (mean x^2 + eps)^(-1/2): r (w g) - x r^3 mean(w g x).
        share = torch.mv(product, weight)[:, None].mul_(rstd**3).div_(-x.shape[-1])
        return (grad * (rstd * weight)).addcmul_(rows, share).view(x.shape), grad_weight, None


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) with a gain, no bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (..., D) of any float type. Returns: (..., D) in the same type."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            # Compilers fuse this by themselves; without gradients there is nothing to save.
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        return RMSNormFunction.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32 whatever the type of its input and of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (..., D) of any float type. Returns: (..., D) in the same type."""
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


def build_norm(config, width: int | None = None) -> nn.Module:
    """The norm that `config.norm_type` names, of the hidden width or of `width`."""
    width = config.hidden_size if width is None else width
    if config.norm_type == "rmsnorm":
        return RMSNorm(width, config.norm_eps)
    return LayerNorm(width, eps=config.norm_eps, bias=config.use_norm_bias)
