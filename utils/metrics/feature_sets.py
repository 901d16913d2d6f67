"""Metrics of sets of images, computed from their features: distances, precision and recall, memorisation.

N, M images, D features. Everything is computed in fp64, so that the distance of equal features is 0.
"""

import torch
from torch import Tensor

from model.layers import in_double
from utils.metrics.images import FeatureMoments, KernelDistance, frechet_distance

N_NEIGHBOURS = 3  # as in arXiv 1904.06991
CHUNK = 1024  # rows of a distance matrix that are in memory at once


def frechet_of_features(a: Tensor, b: Tensor) -> float:
    """`frechet_distance` of two sets of features (N, D) and (M, D), fast where a set is smaller than D.

    For centred features a, b the trace of (A B)^(1/2) is the sum of the singular values of a b^T, (N, M), divided by
    ((N - 1)(M - 1))^(1/2).
    """
    a, b = in_double(a), in_double(b)
    if min(len(a), len(b)) > a.shape[1]:
        moments = FeatureMoments(), FeatureMoments()
        moments[0].update(a)
        moments[1].update(b)
        return frechet_distance(*moments)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    # Centre and scale, so that A = a^T a and tr A = |a|^2.
    a, b = (features - features.mean(0) for features in (a, b))
    a, b = (features / (len(features) - 1) ** 0.5 for features in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, (gap + a.square().sum() + b.square().sum() - 2 * cross).item())


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, (N, M) fp64, of rows (N, D) and (M, D)."""
    return torch.cdist(in_double(a), in_double(b), compute_mode="donot_use_mm_for_euclid_dist")


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Distance of each query (N, D) to the nearest reference (M, D): (N,)."""
    chunks = references.split(CHUNK)
    return torch.cat(
        [torch.stack([distances(q, chunk).amin(1) for chunk in chunks]).amin(0) for q in queries.split(CHUNK)]
    )


def neighbourhood_radii(features: Tensor, n_neighbours: int = N_NEIGHBOURS) -> Tensor:
    """Distance of each feature vector (N, D) to its k-th nearest neighbour, (N,)."""
    radii = []
    for start in range(0, len(features), CHUNK):
        rows = distances(features[start : start + CHUNK], features)  # (chunk, N)
        rows[torch.arange(len(rows)), start + torch.arange(len(rows))] = torch.inf  # not its own neighbour
        radii.append(rows.kthvalue(n_neighbours, dim=1).values)
    return torch.cat(radii)


def coverage(points: Tensor, features: Tensor, radii: Tensor) -> float:
    """Share of points (N, D) inside at least one of the balls around the features (M, D) with radii (M,)."""
    inside = [(distances(chunk, features) <= radii).any(1) for chunk in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def precision_recall(generated: Tensor, target: Tensor, n_neighbours: int = N_NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    The manifold of a set is the union of balls around its features, each with the distance to the k-th nearest
    neighbour as radius. Precision is the share of generated images on the manifold of the target (real) images,
    recall the share of target images on the manifold of the generated ones.

    Args:
        generated, target: (N, D), (M, D), more than k each.
    """
    if min(len(generated), len(target)) <= n_neighbours:
        sizes = f"{len(generated)}, {len(target)}"
        raise ValueError(f"precision and recall need more than {n_neighbours} images in each set, got {sizes}")
    precision = coverage(generated, target, neighbourhood_radii(target, n_neighbours))
    recall = coverage(target, generated, neighbourhood_radii(generated, n_neighbours))
    return precision, recall


def memorisation(generated: Tensor, held_out: Tensor, training: Tensor) -> dict[str, float]:
    """Compares distances to the nearest training image: those of generated images and those of held-out images.

    Args: features (N, D), (M, D), (T, D).
    Returns:
        median_ratio: median distance of generated images divided by that of held-out images.
        share_closer: share of generated images that are closer than 95 % of the held-out images; 0.05 is expected
            without memorisation.
    """
    nearest, baseline = nearest_distances(generated, training), nearest_distances(held_out, training)
    return {
        "median_ratio": (nearest.median() / baseline.median().clamp_min(1e-12)).item(),
        "share_closer": (nearest < baseline.quantile(0.05)).double().mean().item(),
    }


def compare_sets(generated: Tensor, target: Tensor) -> dict[str, float | None]:
    """All metrics of two sets of features of the same size, each (N, D); None below 4 images."""
    names = ("frechet", "kid", "kid_error", "precision", "recall")
    if len(target) <= N_NEIGHBOURS:
        return dict.fromkeys(names)
    kernel = KernelDistance()
    kernel.update(generated, target)
    frechet = frechet_of_features(generated, target)
    return dict(zip(names, (frechet, *kernel.compute(), *precision_recall(generated, target))))
