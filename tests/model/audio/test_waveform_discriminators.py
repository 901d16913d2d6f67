import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.audio.waveform_discriminators import (
    DISCRIMINATORS,
    LEAKY_SLOPE,
    PeriodDiscriminator,
    ResolutionDiscriminator,
    build_waveform_discriminator,
)


def waveforms(n_samples=4096, count=2):
    return 0.1 * torch.randn(count, n_samples, generator=torch.Generator().manual_seed(0))


def column_network(part: PeriodDiscriminator, column: torch.Tensor) -> torch.Tensor:
    """The layers as 1-D convolutions of one column of samples."""
    x = column[None, None]
    for layer in part.layers:
        x = F.conv1d(x, layer.weight[:, :, 0], layer.bias, layer.stride[1], layer.padding[1])
        x = F.leaky_relu(x, LEAKY_SLOPE)
    return F.conv1d(x, part.head.weight[:, :, 0], part.head.bias, 1, 1)[0, 0]


@pytest.mark.parametrize("n_samples", [150, 152])
def test_a_period_discriminator_is_one_network_on_every_column(n_samples):
    torch.manual_seed(0)
    part = PeriodDiscriminator(5, (4, 6), (3, 2))
    waveform = waveforms(n_samples, 1)
    (logits,), features = part(waveform)
    extended = np.pad(waveform[0].numpy(), (0, -n_samples % 5), mode="reflect")
    for column in range(5):
        expected = column_network(part, torch.from_numpy(extended[column::5].copy()))
        torch.testing.assert_close(logits[0, 0, column], expected)
    assert [tuple(each.shape[1:3]) for each in features] == [(6, 5), (1, 5)]


def test_columns_never_mix():
    part = PeriodDiscriminator(7, (4, 4), (3, 3))
    waveform = waveforms(700, 1)
    changed = waveform.clone()
    changed[0, 3::7] += 1
    difference = (part(waveform)[0][0] - part(changed)[0][0]).abs().amax(dim=(0, 1, 3))
    assert [column for column in range(7) if difference[column] > 0] == [3]


def test_a_resolution_discriminator_reads_the_compressed_complex_spectrogram():
    part = ResolutionDiscriminator(64, ((4, (3, 3), (1, 1)),), compression=0.3)
    waveform = waveforms(512)
    x = part.spectrum(waveform)
    window = np.hanning(65)[:64]
    extended = np.pad(waveform[1].numpy().astype(np.float64), 24, mode="reflect")
    for frame in (0, 13, 31):
        expected = np.fft.rfft(window * extended[16 * frame : 16 * frame + 64]) / np.sqrt((window**2).sum())
        expected *= (np.abs(expected) ** 2 + part.power_floor) ** -0.35
        found = x[1, :, frame].detach().numpy()
        np.testing.assert_allclose(found[0] + 1j * found[1], expected, atol=1e-5)
    loud = part.spectrum(100 * waveform).square().sum(1).sqrt().mean() / x.square().sum(1).sqrt().mean()
    assert loud.item() == pytest.approx(100**0.3, rel=0.02)


def test_bands_split_all_bins_and_have_weights_of_their_own():
    part = ResolutionDiscriminator(64, ((4, (3, 3), (1, 1)), (2, (3, 3), (1, 1))), bands=(0.0, 0.25, 1.0))
    (logits,), features = part(waveforms(512))
    assert part.bands == [(0, 8), (8, 33)] and logits.shape == (2, 1, 32, 33)
    assert [tuple(each.shape) for each in features] == [(2, 2, 32, 8), (2, 2, 32, 25), (2, 1, 32, 33)]
    assert not torch.equal(part.stacks[0][0].weight, part.stacks[1][0].weight)


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_silence_and_noise_have_finite_logits_and_gradients(kind):
    discriminator = build_waveform_discriminator(kind, widening=1 / 16)
    waveform = torch.cat([waveforms(), torch.zeros(1, 4096), torch.full((1, 4096), 0.5)]).requires_grad_()
    logits, features = discriminator(waveform)
    assert len(logits) == len(discriminator.parts) and all(each.isfinite().all() for each in [*logits, *features])
    sum(each.square().mean() for each in [*logits, *features]).backward()
    assert waveform.grad.isfinite().all() and waveform.grad[0].abs().sum() > 0
    assert all(p.grad.isfinite().all() and p.grad.any() for p in discriminator.parameters() if p.ndim == 4)


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_samples_are_independent(kind):
    discriminator = build_waveform_discriminator(kind, (3,), (256,), widening=1 / 16)
    waveform = waveforms(1024, 3)
    together, alone = discriminator(waveform), discriminator(waveform[1:2])
    for first, second in zip([*together[0], *together[1]], [*alone[0], *alone[1]]):
        torch.testing.assert_close(first[1:2], second, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_published_discriminators():
    with torch.device("meta"):
        periods = build_waveform_discriminator("full", resolutions=())
        full, thin = build_waveform_discriminator("full"), build_waveform_discriminator("thin")
    count = {part: sum(p.numel() for p in part.parameters()) for part in (periods, full, thin)}
    # Five times kernels, biases and lengths of weight norm of 1-32-128-512-1024-1024-1 channels.
    widths = (1, 32, 128, 512, 1024, 1024)
    kernels = sum(5 * first * second for first, second in zip(widths, widths[1:])) + 3 * 1024
    assert count[periods] == 5 * (kernels + 2 * (sum(widths[1:]) + 1)) == 41_105_770
    assert count[full] - count[periods] == 1_413_990 and count[thin] == 236_022


def test_all_kernels_are_channels_last():
    discriminator = build_waveform_discriminator("thin")
    kernels = [p for p in discriminator.parameters() if p.ndim == 4]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    _, features = discriminator(waveforms())
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in features)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("thinn",), "discriminator 'thinn' is not known; did you mean 'thin'"),
        (("thin", (), ()), "sees nothing"),
        (("thin", (2, 0)), r"periods \[2, 0\] must be > 0"),
        (("thin", (2,), (100,)), r"resolutions \[100\] must be multiples of 8"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_waveform_discriminator(*arguments)


def test_a_short_waveform_is_refused():
    with pytest.raises(ValueError, match=r"a waveform of 768 samples is too short .* it needs 769"):
        build_waveform_discriminator("thin")(torch.zeros(1, 768))
    build_waveform_discriminator("thin")(torch.zeros(1, 769))
