"""The head of a language model and its loss.  B batch, L positions, N tokens, D hidden, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu_kernels import Linear

IGNORED = -100  # target that does not count, as everywhere in PyTorch


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer's outputs that never holds the logits of more than a chunk of tokens.

    The gradients are computed together with the loss, while a chunk's logits are still in the processor's cache.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, z_weight, chunk_size, wants_gradient):  # type: ignore[override]
        """Args: hidden (N, D), weight (V, D), targets (N,), scale: what each token's loss is multiplied with (0-dim).

        Returns: loss, scale x sum of nats + z_weight x squares of the log-denominators; nats (N,); the latter's sum.
        """
        # Sums over chunks: cross-entropy per token, and squares of the log-denominators for the z-loss.
        nats, squares = torch.zeros(len(hidden), device=hidden.device), torch.zeros((), device=hidden.device)
        if torch.is_autocast_enabled(hidden.device.type):  # Cast once, not with each chunk.
            cast = weight.to(torch.get_autocast_dtype(hidden.device.type))
        else:
            cast = weight
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        trains_weight = wants_gradient and ctx.needs_input_grad[1]  # Not where the head is frozen.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_weight else None
        for start in range(0, len(hidden), chunk_size):
            part, target = hidden[start : start + chunk_size], targets[start : start + chunk_size]
            # Forward: log-denominator and cross-entropy of a chunk.
            logits = F.linear(part, cast).float()  # (n, V)
            counts = target != IGNORED
            target = target.clamp_min(0)[:, None]
            lse = logits.logsumexp(-1)
            nats[start : start + chunk_size] = (lse - logits.gather(1, target)[:, 0]) * counts
            squares += (lse.square() * counts).sum()
            if grad_hidden is None:
                continue
            # Backward: d loss / d logits = softmax (1 + 2 z_weight lse) - one-hot, times each token's factor.
            factor = counts * scale  # (n,)
            logits.sub_(lse[:, None]).exp_()
            logits.mul_((factor * (1 + 2 * z_weight * lse))[:, None])
            logits = logits.scatter_add_(1, target, -factor[:, None]).to(part.dtype)
            grad_hidden[start : start + chunk_size] = F.linear(logits, cast.t())
            if grad_weight is not None:
                grad_weight.add_(F.linear(logits.t(), part.t()))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nats, squares)
        return (nats.sum() + z_weight * squares) * scale, nats, squares

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight * grad
        return grad_hidden * grad, grad_weight, None, None, None, None, None


class LanguageModelHead(Linear):
    """Hidden states to logits, or, where targets are given, to the loss.

    Args:
        z_loss_weight: weight of the mean squared log of the softmax's denominator (arXiv 2204.02311, section 5).
        chunk_size: tokens per chunk of the loss; 0: all logits at once.
    """

    def __init__(self, width: int, vocabulary: int, *, z_loss_weight: float = 0.0, chunk_size: int = 0):
        super().__init__(width, vocabulary, bias=False)
        self.z_loss_weight, self.chunk_size = z_loss_weight, chunk_size

    def forward(self, hidden: Tensor, targets: Tensor | None = None, n_targets: Tensor | float | None = None):  # type: ignore[override]
        """Args:
            hidden: (..., D).
            targets: (...), the token that each position has to predict, -100 where none.
            n_targets: what the sum over targets is divided by; None: the number of targets.
        Returns:
            without targets: logits (..., V). With targets: loss (0-dim fp32), nats (...) fp32 of the cross-entropy,
            0 where there is no target, z-loss (0-dim fp32, not weighted), and logits (..., V), None in chunks.
        """
        if targets is None:
            return super().forward(hidden)
        scale = loss_scale(targets, n_targets)
        # In chunks, the logits of all tokens are never held at once.
        if self.chunk_size and not torch.compiler.is_compiling():
            loss, nats, squares = LinearCrossEntropy.apply(  # type: ignore[misc]
                hidden.flatten(0, -2),
                self.weight,
                targets.flatten(),
                scale,
                self.z_loss_weight,
                self.chunk_size,
                torch.is_grad_enabled(),
            )
            return loss, nats.view(targets.shape), squares * scale, None
        # All logits at once: the definition, which compilers fuse.
        logits = super().forward(hidden)
        return *loss_of_logits(logits, targets, scale, z_loss_weight=self.z_loss_weight), logits


def loss_of_logits(
    logits: Tensor, targets: Tensor, scale: Tensor, *, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, nats and z-loss, as `LanguageModelHead.forward` returns them.

    Args: logits: (..., V). targets: (...), -100 where none. scale: what each target's loss is multiplied with (0-dim).
    """
    rows = logits.float().flatten(0, -2)
    nats = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED, reduction="none")
    z_loss = (rows.logsumexp(-1).square() * (targets.flatten() != IGNORED)).sum() * scale
    loss = nats.sum() * scale
    if z_loss_weight:
        loss = loss + z_loss_weight * z_loss
    return loss, nats.detach().view(targets.shape), z_loss.detach()


def loss_scale(targets: Tensor, n_targets: Tensor | float | None) -> Tensor:
    """1 / n_targets, by default 1 / the number of targets (at least 1), 0-dim fp32."""
    n_targets = (targets != IGNORED).sum().clamp_min(1) if n_targets is None else n_targets
    return 1.0 / torch.as_tensor(n_targets, dtype=torch.float32, device=targets.device)


def chosen_divisor(n_targets: Tensor | float | None, num_items_in_batch: Tensor | int | None) -> Tensor | float | None:
    """The divisor of the summed loss, of which the second name is that of transformers' Trainer (at least 1).

    Raises: ValueError: both are given.
    """
    if num_items_in_batch is None:
        return n_targets
    if n_targets is not None:
        raise ValueError("n_targets and num_items_in_batch are two names of one argument; give one of them")
    return torch.as_tensor(num_items_in_batch).clamp_min(1).reshape(())


def language_model_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, n_targets: Tensor | float | None, z_loss_weight: float
):
    """What `LanguageModelHead.forward` returns with targets, of any head.

    Tools replace or wrap a model's head (PEFT's adapters); such a one gives all logits at once.
    """
    if isinstance(head, LanguageModelHead):
        return head(hidden, targets, n_targets)
    logits = head(hidden)
    scale = loss_scale(targets, n_targets)
    return *loss_of_logits(logits, targets, scale, z_loss_weight=z_loss_weight), logits


def next_token_targets(labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """The target of each position: the next label, -100 at the end and where the next label is of another document.

    Args:
        labels: (B, L), -100 where ignored.
        segment_ids: (B, L), equal numbers are the same document; None: one document.
    Returns: (B, L).
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if segment_ids is not None:
        ends = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (0, 1), value=True)
        targets = targets.masked_fill(ends, IGNORED)
    return targets
