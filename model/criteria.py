"""Losses: tensors in, scalars or named weighted terms out.  B batch, C channels, Y X rows and columns.

Every loss is computed in fp32 and is a mean over the batch, so that equal micro-batches or ranks average exactly.
"""

from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.flags.choices import AdversarialKind
from utils.options import suggest


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per sample, summed over all latents.

    The one reduction used everywhere: a trainer adds `kl_weight * kl_divergence(mean, logvar).mean() / (C * Y * X)`,
    nats per input value. Reconstruction losses are means over input values, so at every resolution the sum is an ELBO
    up to scale.
    Args:
        mean, logvar: (B, ...).
    Returns:
        (B,) fp32.
    """
    mean, logvar = mean.float(), logvar.float()
    # In closed form (arXiv 1312.6114, appendix B).
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def gradient_loss(reconstruction: Tensor, target: Tensor, n_scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring-pixel differences, averaged over scales 1, 1/2, 1/4, ...

    Args:
        reconstruction, target: (B, C, Y, X); the smaller side at least 2**n_scales pixels.
    Raises:
        ValueError: the image is too small for the number of scales.
    """
    error = reconstruction.float() - target.float()
    if min(error.shape[-2:]) < 2**n_scales:
        raise ValueError(f"an image of {error.shape[-2]}x{error.shape[-1]} pixels is too small for {n_scales} scales")
    # Pooling and differences are linear: they act on the error, not on both images.
    total = error.new_zeros(())
    for scale in range(n_scales):
        if scale > 0:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()  # columns, rows
    return total / n_scales


def l1_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over all values of (B, C, Y, X), in fp32."""
    return F.l1_loss(reconstruction.float(), target.float())


# Distances (reconstruction, target) -> scalar or (B,), by name, in the order of their sum. A new term is a row here
# and a weight of `ReconstructionLoss`. The perceptual distance is a network, and so an argument.
TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1_loss, "gradient": gradient_loss}


class ReconstructionLoss(nn.Module):
    """Weighted distances between a reconstruction and its target, by name: `TERMS` and the perceptual distance.

    Args:
        l1_weight: weight of the mean absolute error.
        gradient_weight: weight of `gradient_loss`.
        perceptual_weight: weight of the perceptual distance.
        perceptual: (reconstruction, target) -> (B,), needed exactly where perceptual_weight is positive.
    Raises:
        ValueError: a negative weight, all weights zero, or a weight and a perceptual distance that do not go together.
    """

    def __init__(
        self,
        l1_weight: float = 1.0,
        gradient_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        *,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        weights = {"l1": l1_weight, "gradient": gradient_weight, "perceptual": perceptual_weight}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name}_weight={weight} must be >= 0")
        if not any(weights.values()):
            raise ValueError(
                "l1_weight, gradient_weight and perceptual_weight are all 0: nothing would be reconstructed"
            )
        # A weight without its distance, or a distance without its weight, is a mistake.
        if perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                f"perceptual_weight={perceptual_weight} needs a perceptual distance; see build_perceptual"
            )
        if perceptual_weight == 0 and perceptual is not None:
            raise ValueError("a perceptual distance is given but perceptual_weight=0 leaves it without effect")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.perceptual = perceptual

    def forward(self, reconstruction: Tensor, target: Tensor, *, with_perceptual: bool = True) -> dict[str, Tensor]:
        """Args:
            reconstruction, target: (B, C, Y, X) in [-1, 1].
            with_perceptual: False leaves the perceptual distance out.
        Returns: weighted fp32 scalars "l1", "gradient", "perceptual"; those with weight 0 are left out."""
        terms = {**TERMS, "perceptual": self.perceptual}
        # `mean` averages terms that are numbers per sample, and leaves scalars as they are.
        return {
            name: weight * terms[name](reconstruction, target).float().mean()
            for name, weight in self.weights.items()
            if with_perceptual or name != "perceptual"
        }


# What a logit costs: a real one and a generated one for the discriminator, a generated one for the generator.
ADVERSARIAL_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "hinge": (lambda x: F.relu(1.0 - x), lambda x: F.relu(1.0 + x), lambda x: -x),
    "non_saturating": (lambda x: F.softplus(-x), lambda x: F.softplus(x), lambda x: F.softplus(-x)),
    "least_squares": (lambda x: (1.0 - x).square(), lambda x: x.square(), lambda x: (1.0 - x).square()),
}


def check_adversarial_kind(kind: str) -> None:
    """ValueError for a kind that is none of `AdversarialKind`."""
    known = get_args(AdversarialKind)
    if kind not in known:
        raise ValueError(f"adversarial loss {kind!r} is not known{suggest(kind, known)}")


def discriminator_loss(kind: AdversarialKind, real_logits: list[Tensor], fake_logits: list[Tensor]) -> Tensor:
    """What the discriminator minimises, averaged over sub-discriminators.

    hinge (arXiv 1705.02894):            mean max(0, 1 - real) + mean max(0, 1 + fake)
    non_saturating (arXiv 1406.2661):    mean softplus(-real) + mean softplus(fake)
    least_squares (arXiv 1611.04076):    mean (1 - real)^2 + mean fake^2
    Args:
        real_logits, fake_logits: one tensor of any shape per sub-discriminator.
    """
    check_adversarial_kind(kind)
    # In fp32; each sub-discriminator counts the same, whatever the size of its map.
    of_real, of_fake, _ = ADVERSARIAL_LOSSES[kind]
    losses = [
        of_real(real.float()).mean() + of_fake(fake.float()).mean()
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return torch.stack(losses).mean()


def generator_loss(kind: AdversarialKind, fake_logits: list[Tensor]) -> Tensor:
    """What the generator minimises, averaged over sub-discriminators: -mean(fake) (hinge), mean softplus(-fake)
    (non-saturating), or mean (1 - fake)^2 (least squares)."""
    check_adversarial_kind(kind)
    *_, of_generator = ADVERSARIAL_LOSSES[kind]
    return torch.stack([of_generator(fake.float()).mean() for fake in fake_logits]).mean()


def feature_matching_loss(real_features: list[Tensor], fake_features: list[Tensor]) -> Tensor:
    """Mean absolute difference of a discriminator's feature maps, averaged over maps; no gradient to the real ones."""
    distances = [
        F.l1_loss(fake.float(), real.detach().float()) for real, fake in zip(real_features, fake_features, strict=True)
    ]
    return torch.stack(distances).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Squared gradient of the logits with respect to real images (arXiv 1801.04406), without the factor gamma / 2.

    A map of n logits counts as the sum of its logits over sqrt(n): for patches that look at different pixels this is
    the mean squared gradient per logit, whatever the size of the image. Sub-discriminators are averaged.
    Args:
        discriminator: image -> (list of logits, list of features); runs in fp32 also under autocast.
        real: (B, C, Y, X).
    Returns:
        fp32 scalar with a graph into the discriminator's parameters.
    """
    with torch.autocast(real.device.type, enabled=False):
        # A leaf of its own: the gradient is that of the pixels.
        real = real.detach().float().requires_grad_()
        all_logits, _ = discriminator(real)
        penalties = []
        for logits in all_logits:
            output = logits.sum() / logits[0].numel() ** 0.5  # sum over sqrt(n) for each sample
            # Samples do not mix, so that the gradient of the sum holds each sample's own, (B, C, Y, X).
            (gradient,) = torch.autograd.grad(output, real, create_graph=True)
            penalties.append(gradient.square().flatten(1).sum(dim=1).mean())
    return torch.stack(penalties).mean()


def lecam_penalty(
    real_logits: list[Tensor], fake_logits: list[Tensor], *, ema_real: Tensor | float, ema_fake: Tensor | float
) -> Tensor:
    """LeCam regularisation of the discriminator (arXiv 2104.03310, equation 5), averaged over sub-discriminators.

    mean (real - ema_fake)^2 + mean (fake - ema_real)^2; the averages are of mean logits over past updates.
    """
    losses = [
        # Each side is drawn to the average logit of the other.
        (real.float() - ema_fake).square().mean() + (fake.float() - ema_real).square().mean()
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return torch.stack(losses).mean()
