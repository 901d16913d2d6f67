import math

import pytest
import torch

from tests.helpers.sounds import normal
from utils.metrics.latents import LatentHealth, normalized_std


def test_latent_health_is_its_definition_whatever_the_batches():
    mean, logvar = normal(6, 2, 3, 4), 0.1 * normal(6, 2, 3, 4, seed=1) - 2
    health = LatentHealth()
    for part in zip(mean.split(4), logvar.split(4)):
        health.update(*part)
    found = health.compute()
    for z in range(2):
        m, v = mean[:, z].flatten(), logvar[:, z].flatten().exp()
        kl = sum(0.5 * (float(m[i]) ** 2 + float(v[i]) - 1 - math.log(v[i])) for i in range(72)) / 72
        assert found["kl"][z] == pytest.approx(kl)
        assert found["mean"][z] == pytest.approx(m.mean().item())
        assert found["std"][z] == pytest.approx(m.std(correction=0).item())
        assert found["posterior_std"][z] == pytest.approx(v.mean().sqrt().item())


def test_dead_channels_are_collapsed_or_constant():
    mean = torch.stack([normal(4, 5, 5), torch.zeros(4, 5, 5), 3 + 0.01 * normal(4, 5, 5)], 1)
    logvar = torch.tensor([-3.0, 0.0, -3.0]).view(1, 3, 1, 1).expand_as(mean)
    health = LatentHealth()
    health.update(mean, logvar)
    assert health.compute()["dead"] == [False, True, True]
    with pytest.raises(ValueError, match="no samples"):
        LatentHealth().compute()


def test_samples_have_the_std_of_means_and_noise_together():
    generator = torch.Generator().manual_seed(0)
    mean = 2 * torch.randn(64, 3, 50, generator=generator)
    logvar = torch.zeros(64, 3, 50)
    health = LatentHealth()
    health.update(mean, logvar)
    samples = mean + torch.randn(mean.shape, generator=generator)
    stored = torch.tensor([1.0, 2.0, 4.0])
    expected = samples.std((0, 2)) / stored
    assert normalized_std(health.compute(), stored) == pytest.approx(expected.tolist(), rel=0.05)
