"""Precision, recall, nearest neighbours and the quick Frechet distance against loops and definitions."""

import pytest
import torch

from utils.metrics.feature_sets import (
    compare_sets,
    frechet_of_features,
    memorisation,
    nearest_distances,
    neighbourhood_radii,
    precision_recall,
)
from utils.metrics.images import FeatureMoments, frechet_distance


def clouds(n=30, m=40, width=4, shift=0.7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=generator), torch.randn(m, width, generator=generator) + shift


def loop_coverage(points, features, k):
    covered = 0
    for point in points:
        for i, feature in enumerate(features):
            others = sorted((other - feature).norm().item() for j, other in enumerate(features) if j != i)
            if (point - feature).norm().item() <= others[k - 1]:
                covered += 1
                break
    return covered / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_definition(k):
    real, generated = clouds()
    precision, recall = precision_recall(generated, real, k)
    assert precision == pytest.approx(loop_coverage(generated, real, k)) and 0 < precision < 1
    assert recall == pytest.approx(loop_coverage(real, generated, k)) and 0 < recall < 1


def test_collapse_costs_recall_and_nonsense_costs_precision():
    real, _ = clouds(n=200, m=1)
    collapsed = real[:1] + 0.01 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1 and recall < 0.05
    assert precision_recall(real + 100, real) == (0, 0) and precision_recall(real, real) == (1, 1)


def test_chunks_change_nothing(monkeypatch):
    real, generated = clouds()
    whole = nearest_distances(real, generated), neighbourhood_radii(real), precision_recall(generated, real)
    monkeypatch.setattr("utils.metrics.feature_sets.CHUNK", 7)
    assert torch.equal(nearest_distances(real, generated), whole[0]) and torch.equal(
        neighbourhood_radii(real), whole[1]
    )
    assert precision_recall(generated, real) == whole[2]


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (30, 40)], ids=str)
def test_quick_frechet_distance_is_the_slow_one(sizes):
    a, b = clouds(*sizes, width=12)
    moments = FeatureMoments(), FeatureMoments()
    for each, features in zip(moments, (a, b)):
        each.update(features)
    # Eigenvalues that are 0 come out as 1e-16, their roots as 1e-8.
    assert frechet_of_features(a, b) == pytest.approx(frechet_distance(*moments), rel=1e-6)


def test_sets_of_few_images_have_no_distance():
    real, _ = clouds(n=3)
    assert set(compare_sets(real, real).values()) == {None}
    with pytest.raises(ValueError, match="more than 3 images in each set, got 3, 3"):
        precision_recall(real, real)


def test_copies_of_training_images_are_caught():
    training, _ = clouds(n=400, m=1, width=8)
    held_out, fresh = (torch.randn(100, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    honest = memorisation(fresh, held_out, training)
    assert honest["median_ratio"] == pytest.approx(1, abs=0.1) and honest["share_closer"] < 0.15
    copies = training[:100] + 1e-4
    assert memorisation(copies, held_out, training) == {"median_ratio": pytest.approx(0, abs=1e-3), "share_closer": 1}
    half = memorisation(torch.cat([copies[:50], fresh[:50]]), held_out, training)
    assert 0.5 <= half["share_closer"] < 0.6
