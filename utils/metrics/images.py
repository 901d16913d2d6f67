"""Metrics of images.  B batch, C channels, Y X rows and columns, D features."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.image.feature_extractors import EfficientNetFeatures
from model.layers import in_double

MIN_MSE = 1e-10  # limits the PSNR of equal images to 106 dB
SSIM_WINDOW = 11  # pixels, a Gaussian of std 1.5


def check_images(generated: Tensor, target: Tensor) -> None:
    """Raises: ValueError: the shapes differ or are not (B, C, Y, X)."""
    if generated.shape != target.shape or target.ndim != 4:
        shapes = f"{tuple(generated.shape)} and {tuple(target.shape)}"
        raise ValueError(f"images must have the same shape (B, C, Y, X), got {shapes}")


def psnr(generated: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, both clamped to [-1, 1].

    Args:
        generated, target: (B, C, Y, X) in [-1, 1].
    Returns: (B,) fp32, 10 log10(2^2 / mean squared error); at most 106 dB.
    """
    check_images(generated, target)
    mse = (generated.float().clamp(-1, 1) - target.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(MIN_MSE))  # The peak of values in [-1, 1] is 2.


def ssim(generated: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004) over RGB, both clamped to [-1, 1].

    Args:
        generated, target: (B, C, Y, X) in [-1, 1], sides at least 11 pixels.
    Returns: (B,) fp32 in [-1, 1]; the mean over all pixels and channels, edges mirrored.
    """
    check_images(generated, target)
    if min(target.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} pixels, got {target.shape[-2]}x{target.shape[-1]}")
    # It imports scipy.signal, which takes more than a second that most who import this module need not wait for.
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(
        generated.float(), target.float(), data_range=(-1.0, 1.0), reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity.reshape(len(target))


def to_square(image: Tensor, side: int) -> Tensor:
    """Images of one size for features that are compared between images of several sizes: resized with an antialiased
    bicubic kernel, whatever their proportions (as clean-fid, arXiv 2104.11222).

    Args:
        image: (B, C, Y, X) in [-1, 1].
        side: S in pixels.
    Returns: (B, C, S, S) in [-1, 1]; the image itself where it has this size.
    """
    if tuple(image.shape[-2:]) == (side, side):
        return image
    return F.interpolate(image.float(), size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


class SharedFeatures(nn.Module):
    """Taps and pooled features of EfficientNet from one forward pass, cached per image tensor until `clear`."""

    def __init__(self):
        super().__init__()
        self.network = EfficientNetFeatures()
        self.passes: dict[int, tuple[Tensor, list[Tensor], Tensor]] = {}

    def clear(self) -> None:
        self.passes = {}

    @torch.no_grad()
    def extract(self, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The image tensor itself (a reference, so that its id is not reused), its taps, its pooled features."""
        if id(image) not in self.passes:
            final = self.network.extract(image)
            self.passes[id(image)] = (image, self.network.taps, final.mean((2, 3)))
        return self.passes[id(image)]

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, Y, X) in [-1, 1] -> taps."""
        return self.extract(image)[1]

    def pooled(self, image: Tensor) -> Tensor:
        """(B, 3, Y, X) in [-1, 1] -> (B, 1280)."""
        return self.extract(image)[2]


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), rising, and eigenvectors (D, D) as columns of a symmetric matrix on the CPU.

    Of a few samples most eigenvalues are 0, where the divide-and-conquer method of PyTorch's library (MKL) does not
    converge on some processors; numpy's does.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    return values, vectors


class FeatureMoments:
    """Mean and covariance of features, accumulated over batches in fp64 (Chan et al. 1979)."""

    def __init__(self):
        self.count = 0
        self.mean = torch.zeros(())
        self.scatter = torch.zeros(())
        self.covariance_root: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add features (B, D)."""
        features = in_double(features)
        count, mean = len(features), features.mean(0)
        centered = features - mean
        scatter = centered.T @ centered
        if self.count == 0:
            self.mean, self.scatter = mean, scatter
        else:
            # Merge both sets: the scatter gains the outer product of the difference of their means.
            delta, total = mean - self.mean, self.count + count
            self.mean = self.mean + delta * (count / total)
            self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.count += count
        self.covariance_root = None

    def covariance(self) -> Tensor:
        """(D, D), divided by count - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, got {self.count}")
        return self.scatter / (self.count - 1)

    def root(self) -> Tensor:
        """Symmetric square root of the covariance, (D, D) on the CPU; cached until the next update."""
        root = self.covariance_root
        if root is None:
            values, vectors = eigen(self.covariance().cpu())
            root = self.covariance_root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Squared Frechet distance of two Gaussians: |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), as in Heusel et al.
    2017 (arXiv 1706.08500).

    Small samples bias it upwards: below 2 D samples, use the kernel distance instead.
    """
    A, B = a.covariance().cpu(), b.covariance().cpu()
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    cross = eigen(a.root() @ B @ a.root())[0].clamp_min(0).sqrt().sum()
    gap = (a.mean - b.mean).square().sum().cpu()
    return max(0.0, (gap + A.trace() + B.trace() - 2 * cross).item())


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3: KID, Binkowski et al. 2018 (arXiv
    1801.01401), as the U-statistic of Gretton et al. 2012 (equation 4).

    The U-statistic omits the comparison of a_i with b_i. It is therefore unbiased both for independent samples and for
    pairs (an image and its reconstruction), and exactly 0 for equal sets, where the estimator that compares all a with
    all b is too low. It may be negative.

    Args:
        a, b: features, (N, D), N at least 3.
    Returns: the distance and its jackknife standard error.
    """
    if a.shape != b.shape or len(a) < 3:
        raise ValueError(f"KID needs two sets of the same size, 3 or more, got {tuple(a.shape)} and {tuple(b.shape)}")
    N, D = a.shape
    a, b = in_double(a), in_double(b)
    cross = (a @ b.T / D + 1) ** 3
    # h_ij = k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i); the sum leaves out i = j.
    terms = (a @ a.T / D + 1) ** 3 + (b @ b.T / D + 1) ** 3 - cross - cross.T  # (N, N)
    rows = terms.fill_diagonal_(0).sum(1)
    total = rows.sum()
    without = (total - 2 * rows) / ((N - 1) * (N - 2))  # the statistic without sample i
    error = ((N - 1) / N * (without - without.mean()).square().sum()).sqrt()
    return (total / (N * (N - 1))).item(), error.item()


class KernelDistance:
    """`kernel_distance` over a data set: its mean over blocks of 1000 to 1999 samples, so that memory is bounded."""

    block = 1000

    def __init__(self):
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0  # samples in `pairs`
        self.results: list[tuple[int, float, float]] = []  # samples, distance, standard error

    def update(self, a: Tensor, b: Tensor) -> None:
        """Add features (B, D) of both sets."""
        self.pairs.append((a, b))
        self.waiting += len(a)
        # A block is computed when a whole further one remains, so that the last one has 1000 samples or more.
        while self.waiting >= 2 * self.block:
            a, b = (torch.cat(side) for side in zip(*self.pairs, strict=True))
            self.results.append((self.block, *kernel_distance(a[: self.block], b[: self.block])))
            self.pairs = [(a[self.block :], b[self.block :])]
            self.waiting -= self.block

    def compute(self) -> tuple[float, float]:
        """The distance and its standard error."""
        if not self.pairs:
            raise ValueError("KID of no samples")
        a, b = (torch.cat(side) for side in zip(*self.pairs, strict=True))
        results = [*self.results, (len(a), *kernel_distance(a, b))]
        # Mean over blocks, weighted by their number of samples; errors of independent blocks add in squares.
        total = sum(count for count, _, _ in results)
        value = sum(count * distance for count, distance, _ in results) / total
        return value, math.sqrt(sum((count * error) ** 2 for count, _, error in results)) / total
