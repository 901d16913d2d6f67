import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from model.audio.lengths import masked_mean
from model.audio.mel_criteria import MelLoss, mel_gradient_loss
from model.audio.mel_discriminators import build_mel_discriminator
from model.criteria import r1_penalty

KINDS = ["patch_1d", "patch_2d"]
MEAN, STD = torch.linspace(-3, -6, 16), torch.linspace(1, 2, 16)


def make(kind, use_spectral_norm=False, n_layers=2):
    torch.manual_seed(0)
    return build_mel_discriminator(kind, MEAN, STD, channels=8, n_layers=n_layers, use_spectral_norm=use_spectral_norm)


def mels(n=3, n_frames=32):
    noise = torch.randn(n, 16, n_frames, generator=torch.Generator().manual_seed(0))
    return noise * STD[:, None] + MEAN[:, None]


@pytest.mark.parametrize("kind, logits, maps", [("patch_1d", (8,), [(8, 16), (16, 8)]), ("patch_2d", (4, 8), None)])
def test_shapes(kind, logits, maps):
    (found,), features = make(kind)(mels())
    assert found.shape == (3, 1, *logits)
    assert [each.shape[1] for each in features] == [8, 16]
    assert maps is None or [tuple(each.shape[1:]) for each in features] == maps


@pytest.mark.parametrize("kind", KINDS)
def test_mels_are_normalised_per_bin(kind):
    discriminator, other = make(kind), make(kind)
    other.band_mean.zero_()
    other.band_std.fill_(1.0)
    normalised = (mels() - MEAN[:, None]) / STD[:, None]
    torch.testing.assert_close(discriminator(mels())[0][0], other(normalised)[0][0])
    assert {"band_mean", "band_std"} <= discriminator.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_sees_the_documented_frames(kind):
    mel = mels(1, 64).requires_grad_()
    (logits,), _ = make(kind)(mel)
    logits[..., logits.shape[-1] // 2].sum().backward()
    touched = mel.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (touched.max() - touched.min() + 1).item() == 2**2 * 5 - 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_spectral_norm", [False, True])
def test_samples_are_independent_and_r1_reaches_every_kernel(kind, use_spectral_norm):
    discriminator = make(kind, use_spectral_norm)
    changed = torch.cat([mels()[:1], -mels()[1:2], mels()[2:]])
    first, second = discriminator(mels())[0][0], discriminator(changed)[0][0]
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and not torch.equal(first[1], second[1])
    r1_penalty(discriminator, mels()).backward()
    kernels = [p for p in discriminator.parameters() if p.ndim >= 3]
    assert len(kernels) == 3 and all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in kernels)


@pytest.mark.parametrize("kind", KINDS)
def test_only_updates_advance_the_power_iteration(kind):
    discriminator = make(kind, use_spectral_norm=True).train()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    discriminator(mels())
    assert all(torch.equal(before[name], value) for name, value in discriminator.state_dict().items())
    discriminator.update_spectral_norms()
    changed = {name for name, value in discriminator.state_dict().items() if not torch.equal(before[name], value)}
    assert changed and all(name.endswith(("._u", "._v")) for name in changed)
    assert sum(is_parametrized(module, "weight") for module in discriminator.modules()) == 3


def test_wrong_kinds_and_sizes_are_refused():
    with pytest.raises(ValueError, match="'patch1d' is not known; did you mean 'patch_1d'"):
        build_mel_discriminator("patch1d", MEAN, STD, channels=8, n_layers=2)
    with pytest.raises(
        ValueError, match="16 bins and 3 frames is too small for a discriminator of 2 layers: it needs 4"
    ):
        make("patch_1d")(mels(1, 3))
    with pytest.raises(ValueError, match="and as many bins"):
        make("patch_2d", n_layers=5)(mels(1, 32))


# ---- Losses.


def test_losses_are_means_over_valid_values_of_each_sample():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, 7, generator=generator)
    lengths = [7, 3, 1]
    error = first - second
    expected = [error[b, :, :n].abs().mean().item() for b, n in enumerate(lengths)]
    assert masked_mean(error.abs(), torch.tensor(lengths)).tolist() == pytest.approx(expected)
    slopes = []
    for b, n in enumerate(lengths):
        part = error[b, :, :n]
        over_time = (part[:, 1:] - part[:, :-1]).abs().mean().item() if n > 1 else 0.0
        slopes.append(over_time + (part[1:] - part[:-1]).abs().sum().item() / (4 * n) * 4 / 3)
    assert mel_gradient_loss(error, torch.tensor(lengths)).tolist() == pytest.approx(slopes)
    squares = [error[b, :, :n].square().mean().item() for b, n in enumerate(lengths)]
    terms = MelLoss(2.0, 3.0, 0.5)(first, second, torch.tensor(lengths))
    assert terms["l1"].item() == pytest.approx(2 * sum(expected) / 3)
    assert terms["l2"].item() == pytest.approx(3 * sum(squares) / 3)
    assert terms["gradient"].item() == pytest.approx(0.5 * sum(slopes) / 3)


def test_losses_of_weight_zero_are_left_out_and_wrong_weights_refused():
    assert MelLoss()(mels(), mels(), torch.tensor([32] * 3)).keys() == {"l1"}
    with pytest.raises(ValueError, match="l2_weight=-1"):
        MelLoss(1.0, -1)
    with pytest.raises(ValueError, match="are all 0"):
        MelLoss(0.0)
