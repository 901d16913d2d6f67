import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from model.criteria import (
    ReconstructionLoss,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    gradient_loss,
    kl_divergence,
    lecam_penalty,
    r1_penalty,
)


def mean_absolute_error(a, b):
    """A perceptual distance for tests: (B,)."""
    return (a - b).abs().flatten(1).mean(dim=1)


class LinearDiscriminator(nn.Module):
    """One logit per 4 x 4 patch and kernel, linear in the image."""

    def __init__(self, n_kernels=1):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kernels = [torch.randn(1, 3, 4, 4, generator=generator) for _ in range(n_kernels)]
        self.kernels = nn.ParameterList(kernels)
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, image):
        return [F.conv2d(image, kernel, self.bias, stride=4) for kernel in self.kernels], []


def random_images(n=4, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, n, 3, side, side, generator=generator) * 2 - 1


def test_kl_divergence_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    reference = reference_kl(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), reference)


def test_kl_divergence_is_zero_only_at_the_prior_and_is_fp32():
    zero = torch.zeros(3, 4, 2, 2, dtype=torch.bfloat16)
    assert kl_divergence(zero, zero).tolist() == [0.0, 0.0, 0.0]
    assert kl_divergence(zero, zero).dtype == torch.float32
    assert kl_divergence(zero + 1, zero).tolist() == [8.0, 8.0, 8.0]  # 16 latents, half a nat each
    assert (kl_divergence(zero, zero + 1) > 0).all() and (kl_divergence(zero, zero - 1) > 0).all()


def test_gradient_loss_equals_a_loop():
    reconstruction, target = random_images(n=2)
    error, scales = (reconstruction - target).double(), []
    for _ in range(3):
        B, C, Y, X = error.shape
        places = [(b, c, y, x) for b in range(B) for c in range(C) for y in range(Y) for x in range(X)]
        right = [error[b, c, y, x + 1] - error[b, c, y, x] for b, c, y, x in places if x + 1 < X]
        down = [error[b, c, y + 1, x] - error[b, c, y, x] for b, c, y, x in places if y + 1 < Y]
        scales.append(torch.stack(right).abs().mean() + torch.stack(down).abs().mean())
        error = error.reshape(B, C, Y // 2, 2, X // 2, 2).mean(dim=(3, 5))
    torch.testing.assert_close(gradient_loss(reconstruction, target).double(), torch.stack(scales).mean())


def test_gradient_loss_ignores_a_constant_offset():
    image, _ = random_images()
    assert gradient_loss(image + 0.25, image).item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_loss_refuses_small_images():
    gradient_loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="8x7 pixels is too small for 3 scales"):
        gradient_loss(torch.zeros(1, 3, 8, 7), torch.zeros(1, 3, 8, 7))


def test_reconstruction_terms_are_weighted():
    reconstruction, target = random_images()
    terms = ReconstructionLoss(2.0, 0.5, 3.0, perceptual=mean_absolute_error)(reconstruction, target)
    l1 = (reconstruction - target).abs().mean()
    assert set(terms) == {"l1", "gradient", "perceptual"}
    torch.testing.assert_close(terms["l1"], 2.0 * l1)
    torch.testing.assert_close(terms["gradient"], 0.5 * gradient_loss(reconstruction, target))
    torch.testing.assert_close(terms["perceptual"], 3.0 * l1)


def test_the_perceptual_term_can_be_left_out():
    reconstruction, target = random_images()
    criterion = ReconstructionLoss(2.0, 0.5, 3.0, perceptual=mean_absolute_error)
    everything = criterion(reconstruction, target)
    assert everything.pop("perceptual") > 0
    assert criterion(reconstruction, target, with_perceptual=False) == everything


def test_reconstruction_terms_without_weight_are_left_out():
    reconstruction, target = random_images()
    assert set(ReconstructionLoss()(reconstruction, target)) == {"l1"}
    assert set(ReconstructionLoss(0.0, 1.0)(reconstruction, target)) == {"gradient"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1.0,), r"l1_weight=-1.0 must be >= 0"),
        ((1.0, -0.5), r"gradient_weight=-0.5 must be >= 0"),
        ((1.0, 0.0, -2.0), r"perceptual_weight=-2.0 must be >= 0"),
        ((0.0, 0.0, 0.0), r"are all 0"),
        ((1.0, 0.0, 1.0), r"perceptual_weight=1.0 needs a perceptual distance"),
    ],
)
def test_reconstruction_weights_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss(*arguments)


def test_a_perceptual_distance_without_weight_is_refused():
    with pytest.raises(ValueError, match=r"perceptual_weight=0 leaves it without effect"):
        ReconstructionLoss(1.0, 0.0, 0.0, perceptual=mean_absolute_error)


def test_hinge_by_hand():
    real, fake = [torch.tensor([2.0, 0.5]), torch.tensor([-1.0])], [torch.tensor([-3.0, 0.0]), torch.tensor([0.5])]
    # first: mean(0, 0.5) + mean(0, 1) = 0.75; second: 2 + 1.5 = 3.5
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx((0.75 + 3.5) / 2)
    assert generator_loss("hinge", fake).item() == pytest.approx((1.5 - 0.5) / 2)


def test_non_saturating_is_the_cross_entropy():
    real, fake = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss("non_saturating", [real], [fake]), expected)
    torch.testing.assert_close(generator_loss("non_saturating", [fake]), cross_entropy(fake, torch.ones_like(fake)))


def test_least_squares_by_hand():
    real, fake = [torch.tensor([2.0, 0.5]), torch.tensor([-1.0])], [torch.tensor([-3.0, 0.0]), torch.tensor([0.5])]
    # first: mean(1, 0.25) + mean(9, 0) = 5.125; second: 4 + 0.25 = 4.25
    assert discriminator_loss("least_squares", real, fake).item() == pytest.approx((5.125 + 4.25) / 2)
    assert generator_loss("least_squares", fake).item() == pytest.approx((8.5 + 0.25) / 2)


@pytest.mark.parametrize("kind, hint", [("hing", "did you mean 'hinge'"), ("lsgan", "known: hinge, least_squares")])
def test_unknown_adversarial_kind_is_suggested(kind, hint):
    logits = [torch.zeros(2, 1)]
    with pytest.raises(ValueError, match=f"'{kind}' is not known; {hint}"):
        discriminator_loss(kind, logits, logits)
    with pytest.raises(ValueError, match=f"'{kind}' is not known; {hint}"):
        generator_loss(kind, logits)


def test_feature_matching_by_hand():
    real = [torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0]], requires_grad=True)]
    fake = [torch.tensor([[2.0, 5.0]], requires_grad=True), torch.tensor([[-3.0]], requires_grad=True)]
    loss = feature_matching_loss(real, fake)
    assert loss.item() == pytest.approx((2.0 + 3.0) / 2)
    loss.backward()
    assert [tensor.grad for tensor in real] == [None, None]
    assert [tensor.grad.tolist() for tensor in fake] == [[[0.25, 0.25]], [[-0.5]]]


@pytest.mark.parametrize("side", [4, 8, 16])
def test_r1_of_a_linear_discriminator(side):
    discriminator = LinearDiscriminator()
    (kernel,) = discriminator.kernels
    penalty = r1_penalty(discriminator, random_images(side=side)[0])
    torch.testing.assert_close(penalty, kernel.square().sum().detach())  # at every number of patches
    penalty.backward()
    torch.testing.assert_close(kernel.grad, 2.0 * kernel.detach())


def test_r1_averages_sub_discriminators():
    discriminator = LinearDiscriminator(n_kernels=2)
    expected = torch.stack([kernel.square().sum() for kernel in discriminator.kernels]).mean()
    torch.testing.assert_close(r1_penalty(discriminator, random_images()[0]), expected)


def test_r1_is_fp32_under_autocast():
    discriminator, (real, _) = LinearDiscriminator(), random_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(discriminator, real)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, discriminator.kernels[0].square().sum(), rtol=1e-6, atol=0.0)


def test_lecam_by_hand():
    real, fake = [torch.tensor([1.0, 3.0]), torch.tensor([0.0])], [torch.tensor([-1.0, -2.0]), torch.tensor([1.0])]
    # first: mean(1.5^2, 3.5^2) + mean(3^2, 4^2) = 7.25 + 12.5; second: 0.5^2 + 1^2
    assert lecam_penalty(real, fake, ema_real=2.0, ema_fake=-0.5).item() == pytest.approx((19.75 + 1.25) / 2)


LOSSES = {
    "kl": lambda a, b: kl_divergence(a, b).mean(),
    "reconstruction": lambda a, b: sum(
        ReconstructionLoss(1.0, 1.0, 1.0, perceptual=mean_absolute_error)(a, b).values()
    ),
    "hinge": lambda a, b: discriminator_loss("hinge", [a], [b]) + generator_loss("hinge", [b]),
    "non_saturating": lambda a, b: (
        discriminator_loss("non_saturating", [a], [b]) + generator_loss("non_saturating", [b])
    ),
    "least_squares": lambda a, b: discriminator_loss("least_squares", [a], [b]) + generator_loss("least_squares", [b]),
    "feature_matching": lambda a, b: feature_matching_loss([a], [b]),
    "r1": lambda a, b: r1_penalty(LinearDiscriminator(), a),
    "lecam": lambda a, b: lecam_penalty([a], [b], ema_real=0.5, ema_fake=-0.5),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=5, deadline=None)
@given(n_parts=st.integers(1, 3), size=st.integers(1, 3), seed=st.integers(0, 1000))
def test_equal_micro_batches_average_to_the_batch(name, n_parts, size, seed):
    a, b = random_images(n_parts * size, seed=seed)
    parts = [LOSSES[name](*pair) for pair in zip(a.chunk(n_parts), b.chunk(n_parts))]
    torch.testing.assert_close(torch.stack(parts).mean(), LOSSES[name](a, b), rtol=1e-5, atol=1e-6)
