"""Health of a VAE's latents.  B batch, Z latent channels."""

import torch
from torch import Tensor

DEAD_KL = 0.01  # nats per latent position
DEAD_STD = 0.05


class LatentHealth:
    """Per-channel statistics of a diagonal Gaussian posterior over samples and positions."""

    def __init__(self):
        self.count = 0
        self.sums = torch.zeros(())

    def update(self, mean: Tensor, logvar: Tensor) -> None:
        """Add a batch: posterior mean and log-variance, each (B, Z, ...)."""
        mean, logvar = (each.detach().double().transpose(0, 1).flatten(1) for each in (mean, logvar))  # (Z, positions)
        variance = logvar.exp()
        kl = 0.5 * (mean.square() + variance - 1 - logvar)
        self.sums = self.sums + torch.stack([each.sum(1) for each in (mean, mean.square(), variance, kl)]).cpu()
        self.count += mean.shape[1]

    def compute(self) -> dict[str, list]:
        """One list over channels under each name.

        mean           of the posterior means
        std            of the posterior means
        posterior_std  root mean posterior variance: the noise that sampling adds
        kl             divergence from N(0, 1) in nats per latent position
        dead           whether kl < 0.01 or std < 0.05: the channel carries next to nothing
        """
        if self.count == 0:
            raise ValueError("latent statistics of no samples")
        mean, square, variance, kl = self.sums / self.count
        std = (square - mean.square()).clamp_min(0).sqrt()
        dead = (kl < DEAD_KL) | (std < DEAD_STD)
        columns = {"mean": mean, "std": std, "posterior_std": variance.sqrt(), "kl": kl, "dead": dead}
        return {name: column.tolist() for name, column in columns.items()}
