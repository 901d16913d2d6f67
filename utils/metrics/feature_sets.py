"""Sets of images compared by their features: distances, precision and recall, memorised training images.

N, M images, D features. Everything is fp64: the distance of equal features is 0.
"""

import torch
from torch import Tensor

from utils.metrics.images import FeatureMoments, KernelDistance, frechet_distance

N_NEIGHBOURS = 3  # as in arXiv 1904.06991
CHUNK = 1024  # rows of a matrix of distances that are held at once


def frechet_of_features(a: Tensor, b: Tensor) -> float:
    """`frechet_distance` of two sets of features (N, D) and (M, D), quick where a set is smaller than D.

    With centred features a, b the trace of (A B)^(1/2) is the sum of the singular values of a b^T, (N, M), divided by
    ((N - 1)(M - 1))^(1/2).
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) > a.shape[1]:
        moments = FeatureMoments(), FeatureMoments()
        moments[0].update(a)
        moments[1].update(b)
        return frechet_distance(*moments)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    a, b = (each - each.mean(0) for each in (a, b))
    a, b = (each / (len(each) - 1) ** 0.5 for each in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, (gap + a.square().sum() + b.square().sum() - 2 * cross).item())


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, (N, M) fp64, of rows (N, D) and (M, D)."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Distance of each query (N, D) to the nearest reference (M, D): (N,)."""
    parts = references.split(CHUNK)
    return torch.cat(
        [torch.stack([distances(q, part).amin(1) for part in parts]).amin(0) for q in queries.split(CHUNK)]
    )


def neighbourhood_radii(features: Tensor, n_neighbours: int = N_NEIGHBOURS) -> Tensor:
    """Distance of each of (N, D) to its k-th nearest other one, (N,)."""
    radii = []
    for start in range(0, len(features), CHUNK):
        found = distances(features[start : start + CHUNK], features)
        found[torch.arange(len(found)), start + torch.arange(len(found))] = torch.inf
        radii.append(found.kthvalue(n_neighbours, dim=1).values)
    return torch.cat(radii)


def coverage(points: Tensor, features: Tensor, radii: Tensor) -> float:
    """Share of points (N, D) that lie in a ball around any of the features (M, D) with these radii (M,)."""
    inside = [(distances(part, features) <= radii).any(1) for part in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real: Tensor, generated: Tensor, n_neighbours: int = N_NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is the union of balls around its features that reach to the k-th nearest other one. Precision is
    the share of generated images on the real manifold, recall the share of real ones on the generated manifold.

    Args:
        real, generated: (N, D), (M, D), more than k each.
    """
    if min(len(real), len(generated)) <= n_neighbours:
        raise ValueError(
            f"precision and recall need more than {n_neighbours} images, got {len(real)}, {len(generated)}"
        )
    precision = coverage(generated, real, neighbourhood_radii(real, n_neighbours))
    return precision, coverage(real, generated, neighbourhood_radii(generated, n_neighbours))


def memorisation(generated: Tensor, held_out: Tensor, training: Tensor) -> dict[str, float]:
    """Whether generated images are nearer to training images than images that were never trained on.

    Args: features (N, D), (M, D), (T, D).
    Returns:
        median_ratio: median distance of generated images to the nearest training image, over that of held-out ones
        share_closer: share of generated images nearer than 95 % of the held-out ones; 0.05 where nothing is copied
    """
    found, usual = nearest_distances(generated, training), nearest_distances(held_out, training)
    return {
        "median_ratio": (found.median() / usual.median().clamp_min(1e-12)).item(),
        "share_closer": (found < usual.quantile(0.05)).double().mean().item(),
    }


def compare_sets(real: Tensor, other: Tensor) -> dict[str, float | None]:
    """Distances of a set of features (N, D) to the real ones (N, D), both of the same size; None under 4 images."""
    names = ("frechet", "kid", "kid_error", "precision", "recall")
    if len(real) <= N_NEIGHBOURS:
        return dict.fromkeys(names)
    kernel = KernelDistance()
    kernel.update(real, other)
    return dict(zip(names, (frechet_of_features(real, other), *kernel.compute(), *precision_recall(real, other))))
