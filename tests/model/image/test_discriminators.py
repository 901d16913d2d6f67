import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from model.criteria import r1_penalty
from model.image.discriminators import MultiScaleDiscriminator, PatchDiscriminator, build_discriminator

KINDS = ["patch", "multi_scale"]


def make(kind, use_spectral_norm=False):
    torch.manual_seed(0)
    return build_discriminator(kind, 8, 3, use_spectral_norm=use_spectral_norm)


def images(n=3, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def everything(discriminator, image):
    logits, features = discriminator(image)
    return logits + features


def normed_layers(discriminator):
    return [module for module in discriminator.modules() if is_parametrized(module, "weight")]


def spectral_norms(discriminator):
    return torch.stack(
        [torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2) for layer in normed_layers(discriminator)]
    )


def test_patch_shapes():
    logits, features = make("patch")(images(2, 32))
    assert [tuple(x.shape) for x in logits] == [(2, 1, 4, 4)]
    assert [tuple(x.shape) for x in features] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]


def test_multi_scale_shapes():
    logits, features = make("multi_scale")(images(2, 32))
    assert [tuple(x.shape) for x in logits] == [(2, 1, 4, 4), (2, 1, 2, 2)]
    assert [tuple(x.shape[1:]) for x in features[:3]] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert [tuple(x.shape[1:]) for x in features[3:]] == [(8, 8, 8), (16, 4, 4), (32, 2, 2)]


def test_the_second_scale_sees_the_halved_image():
    discriminator, image = make("multi_scale"), images()
    halved = image.reshape(3, 3, 16, 2, 16, 2).mean(dim=(3, 5))
    torch.testing.assert_close(discriminator(image)[0][1], discriminator.scales[1](halved)[0][0])


def test_width_grows_up_to_eight_times():
    widths = [layer.out_channels for layer in PatchDiscriminator(4, 5).layers]
    assert widths == [4, 8, 16, 32, 32]


@pytest.mark.parametrize("n_layers", [2, 3])
def test_a_logit_sees_the_documented_pixels(n_layers):
    torch.manual_seed(0)
    image = images(1, 64).requires_grad_()
    (logits,), _ = PatchDiscriminator(4, n_layers)(image)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    touched = image.grad.abs().sum(dim=(0, 1)).nonzero()
    sides = touched.amax(dim=0) - touched.amin(dim=0) + 1
    assert sides.tolist() == [2**n_layers * 5 - 2] * 2


@pytest.mark.parametrize("kind, smallest", [("patch", 8), ("multi_scale", 16)])
def test_too_small_images_are_refused(kind, smallest):
    discriminator = make(kind)
    assert all(logits.shape[-1] >= 1 for logits in discriminator(images(1, smallest))[0])
    with pytest.raises(ValueError, match=r"pixels is too small .* 3 layers: each side needs 8 pixels"):
        discriminator(images(1, smallest - 1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_spectral_norm_is_one_after_enough_updates(kind):
    discriminator = make(kind, use_spectral_norm=True)
    assert len(normed_layers(discriminator)) == 4 * (1 + (kind == "multi_scale"))
    generator = torch.Generator().manual_seed(1)
    for layer in normed_layers(discriminator):
        original = layer.parametrizations.weight.original
        original.copy_(torch.randn(original.shape, generator=generator))
    assert (spectral_norms(discriminator) - 1).abs().max() > 0.05  # the iterations are those of the old weights
    for _ in range(150):
        discriminator.update_spectral_norms()
    # Not exact: neighbouring singular values of a random matrix are close, so the iteration converges slowly.
    assert (spectral_norms(discriminator) - 1).abs().max() < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_only_updates_advance_the_power_iteration(kind):
    discriminator, image = make(kind, use_spectral_norm=True).train(), images()
    with torch.no_grad():
        for layer in normed_layers(discriminator):
            layer.parametrizations.weight.original[0].mul_(3.0)
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    first, second = discriminator(image)[0], discriminator(image)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(before[name], value) for name, value in discriminator.state_dict().items())
    discriminator.update_spectral_norms()
    changed = {name for name, value in discriminator.state_dict().items() if not torch.equal(before[name], value)}
    assert changed and all(name.endswith(("._u", "._v")) for name in changed)
    assert not any(layer.parametrizations.training for layer in normed_layers(discriminator))


def test_without_spectral_norm_an_update_changes_nothing():
    discriminator = make("patch")
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    discriminator.update_spectral_norms()
    assert all(torch.equal(before[name], value) for name, value in discriminator.state_dict().items())


@pytest.mark.parametrize("use_spectral_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_samples_are_independent(kind, use_spectral_norm):
    discriminator, image = make(kind, use_spectral_norm).train(), images()
    changed = torch.cat([image[:1], -image[1:2], image[2:]])
    for a, b in zip(everything(discriminator, image), everything(discriminator, changed), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.equal(a[1], b[1])


@pytest.mark.parametrize("use_spectral_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_r1_reaches_every_kernel(kind, use_spectral_norm):
    discriminator = make(kind, use_spectral_norm)
    penalty = r1_penalty(discriminator, images())
    penalty.backward()
    kernels = [p for p in discriminator.parameters() if p.ndim == 4]
    assert penalty > 0
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in kernels)


def test_build_discriminator():
    assert isinstance(build_discriminator("patch"), PatchDiscriminator)
    assert isinstance(build_discriminator("multi_scale"), MultiScaleDiscriminator)
    with pytest.raises(ValueError, match="'multiscale' is not known; did you mean 'multi_scale'"):
        build_discriminator("multiscale")
    with pytest.raises(ValueError, match="'x' is not known; known: multi_scale, patch"):
        build_discriminator("x")
