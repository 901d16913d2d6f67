"""Metrics against their definitions written as loops, and against their properties."""

import math

import pytest
import torch

from tests.helpers.sounds import normal
from utils.metrics.images import (
    FeatureMoments,
    KernelDistance,
    SharedFeatures,
    frechet_distance,
    kernel_distance,
    psnr,
    ssim,
)


def moments(features, batch=7):
    result = FeatureMoments()
    for part in features.split(batch):
        result.update(part)
    return result


def test_psnr_is_that_of_8_bit_images():
    a, b = torch.tensor([10, 200, 255, 0.0]), torch.tensor([12, 190, 255, 3.0])
    expected = 10 * math.log10(255**2 / ((4 + 100 + 0 + 9) / 4))
    images = (each.view(1, 1, 2, 2) / 127.5 - 1 for each in (a, b))
    assert psnr(*images).item() == pytest.approx(expected, abs=1e-4)


def test_psnr_clamps_and_is_capped_and_is_per_image():
    a = torch.ones(2, 3, 4, 4)
    b = torch.stack([a[0] * 1.7, -a[1]])
    assert psnr(a, b).tolist() == pytest.approx([10 * math.log10(4 / 1e-10), 0.0], abs=1e-4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        psnr(a, a[:1])


def slow_ssim(a, b):
    """Wang et al. 2004, equation 13, pixel by pixel, for one channel (Y, X) in [-1, 1] with mirrored edges."""
    window = [[math.exp(-(i**2 + j**2) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    weights = torch.tensor(window, dtype=a.dtype) / sum(map(sum, window))
    a, b = (torch.nn.functional.pad(each[None, None], (5, 5, 5, 5), mode="reflect")[0, 0] for each in (a, b))
    total, (Y, X) = 0.0, (a.shape[0] - 10, a.shape[1] - 10)
    for y in range(Y):
        for x in range(X):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            total += (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
    return float(total / (Y * X))


def test_ssim_is_its_definition():
    a = normal(1, 3, 12, 13).tanh()
    b = (a + 0.3 * normal(1, 3, 12, 13, seed=1)).clamp(-1, 1)
    expected = sum(slow_ssim(a[0, c], b[0, c]) for c in range(3)) / 3
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_per_image_and_its_smallest_size():
    a = normal(2, 3, 16, 16).tanh()
    assert ssim(a, torch.stack([a[0], -a[1]])).tolist() == [pytest.approx(1), pytest.approx(ssim(a, -a)[1].item())]
    with pytest.raises(ValueError, match="11 pixels, got 16x10"):
        ssim(a[..., :10], a[..., :10])


def test_moments_in_batches_equal_one_pass():
    features = 1000 + normal(50, 6)
    found = moments(features)
    assert torch.allclose(found.mean, features.mean(0), atol=1e-10)
    assert torch.allclose(found.covariance(), torch.cov(features.T), atol=1e-10)


def test_moments_of_one_sample_have_no_covariance():
    with pytest.raises(ValueError, match="2 samples or more, got 1"):
        moments(normal(1, 3)).covariance()


def test_frechet_distance_of_one_dimension_is_that_of_two_normals():
    a, b = normal(40, 1), 3 + 2 * normal(30, 1, seed=1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_takes_the_root_of_the_product():
    a, b = normal(60, 8) @ normal(8, 8, seed=2), 0.5 + normal(60, 8, seed=1)
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).sqrt().sum().real
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    a, b = moments(normal(10, 40)), moments(normal(10, 40, seed=1))
    assert frechet_distance(a, a) < 1e-5
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    before = frechet_distance(a, b)
    a.update(normal(30, 40, seed=2))  # Its root is computed anew.
    assert frechet_distance(a, b) != pytest.approx(before, rel=1e-3)


def slow_kernel_distance(a, b):
    """Gretton et al. 2012, equation 4."""
    n, d = a.shape

    def kernel(x, y):
        return (float(x @ y) / d + 1) ** 3

    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i])
    return total / (n * (n - 1))


def test_kernel_distance_and_its_jackknife_error_are_their_definitions():
    a, b = normal(9, 4), normal(9, 4, seed=1) + 0.5
    value, error = kernel_distance(a, b)
    assert value == pytest.approx(slow_kernel_distance(a, b), rel=1e-9)
    without = [slow_kernel_distance(*(torch.cat([each[:i], each[i + 1 :]]) for each in (a, b))) for i in range(9)]
    mean = sum(without) / 9
    assert error == pytest.approx(math.sqrt(8 / 9 * sum((each - mean) ** 2 for each in without)), rel=1e-9)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_kernel_distance_of_equal_distributions_is_unbiased(shared):
    """Independent samples, and pairs that share most of their values."""
    common, a, b = normal(300, 20, 8), normal(300, 20, 8, seed=1), normal(300, 20, 8, seed=2)
    a, b = (math.sqrt(shared) * common + math.sqrt(1 - shared) * each for each in (a, b))
    values = torch.tensor([kernel_distance(*pair)[0] for pair in zip(a, b)])
    assert values.mean().abs() < 3 * values.std() / math.sqrt(300)


def test_the_jackknife_error_is_the_spread_of_the_estimate():
    found = torch.tensor([kernel_distance(a, b + 0.5) for a, b in zip(normal(300, 20, 8), normal(300, 20, 8, seed=1))])
    assert found[:, 1].mean().item() == pytest.approx(found[:, 0].std().item(), rel=0.2)


def test_kernel_distance_of_a_set_to_itself_is_zero_and_sizes_must_agree():
    a = normal(5, 4)
    assert kernel_distance(a, a) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(4, 4\)"):
        kernel_distance(a, a[:4])


def test_kernel_distance_of_a_stream_is_the_mean_of_its_blocks():
    a, b = normal(47, 4), normal(47, 4, seed=1) + 0.5
    stream = KernelDistance()
    stream.block = 10
    for part_a, part_b in zip(a.split(8), b.split(8)):
        stream.update(part_a, part_b)
    blocks = [slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 47)]
    results = [(len(a[block]), *kernel_distance(a[block], b[block])) for block in blocks]
    value, error = stream.compute()
    assert value == pytest.approx(sum(n * each for n, each, _ in results) / 47)
    assert error == pytest.approx(math.sqrt(sum((n * each) ** 2 for n, _, each in results)) / 47)


def test_shared_features_are_those_of_the_network_and_kept_until_cleared():
    features = SharedFeatures()
    image = normal(2, 3, 32, 32).tanh().float()
    pooled = features.pooled(image)
    assert torch.equal(pooled, features.network.pooled(image)) and pooled.shape == (2, 1280)
    taps = features(image)
    assert all(map(torch.equal, taps, features.network(image)))
    assert features(image) is taps
    features.clear()
    assert features(image) is not taps
