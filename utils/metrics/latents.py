"""Statistics of a VAE's latents per channel, and which channels are dead.  B batch, Z latent channels."""

import math

import torch
from torch import Tensor

from model.layers import in_double

DEAD_KL = 0.01  # nats per latent position
DEAD_STD = 0.05
LATENT_DEFINITION = (
    "Statistics per channel over samples and positions. mean, std: of the posterior means. posterior_std: root mean "
    "posterior variance. normalized_std: std of posterior samples divided by the stored std. kl: divergence from "
    f"N(0, 1) in nats per position. dead: kl < {DEAD_KL} or std < {DEAD_STD}."
)


def normalized_std(latents: dict[str, list], stored_std: Tensor) -> list[float]:
    """Std per channel of posterior samples after normalization with the std stored in the VAE; 1 is ideal.

    Args: latents: see `LatentHealth.compute`.
    """
    # The variance of samples is that of the means plus the mean variance.
    sampled_std = map(math.hypot, latents["std"], latents["posterior_std"])
    return [std / stored for std, stored in zip(sampled_std, stored_std.tolist())]


class LatentHealth:
    """Per-channel statistics of a diagonal Gaussian posterior over samples and positions, accumulated in fp64."""

    def __init__(self):
        self.count = 0
        self.sums = torch.zeros(())

    def update(self, mean: Tensor, logvar: Tensor) -> None:
        """Add a batch: posterior mean and log-variance, each (B, Z, ...)."""
        mean, logvar = (
            in_double(value.detach()).transpose(0, 1).flatten(1) for value in (mean, logvar)
        )  # (Z, positions)
        variance = logvar.exp()
        # KL(N(mean, variance) || N(0, 1)).
        kl = 0.5 * (mean.square() + variance - 1 - logvar)
        self.sums = self.sums + torch.stack([value.sum(1) for value in (mean, mean.square(), variance, kl)]).cpu()
        self.count += mean.shape[1]

    def compute(self) -> dict[str, list]:
        """One list over channels under each name.

        mean           of the posterior means
        std            of the posterior means
        posterior_std  root mean posterior variance: the noise that sampling adds
        kl             divergence from N(0, 1) in nats per latent position
        dead           whether kl < 0.01 or std < 0.05: the channel carries almost no information
        """
        if self.count == 0:
            raise ValueError("latent statistics of no samples")
        mean, square, variance, kl = self.sums / self.count
        std = (square - mean.square()).clamp_min(0).sqrt()
        dead = (kl < DEAD_KL) | (std < DEAD_STD)
        columns = {"mean": mean, "std": std, "posterior_std": variance.sqrt(), "kl": kl, "dead": dead}
        return {name: column.tolist() for name, column in columns.items()}
