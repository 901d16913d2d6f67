"""The vocoder's losses against loops over frames and bins in numpy."""

import math

import numpy as np
import pytest
import torch

from model.audio.spectral import LogMel, MelSettings, mel_filters
from model.audio.waveform_criteria import VocoderLoss, phase_distances, safe_angle

SETTINGS = MelSettings(sample_rate=8000, n_fft=128, hop_length=32, n_mels=20, f_max=4000.0)
ALL = {"mel_weight": 2.0, "stft_weight": 3.0, "phase_weight": 5.0, "complex_stft_weight": 7.0}
NAMES = {
    "mel": 2.0,
    "convergence": 3.0,
    "log_magnitude": 3.0,
    "group_delay": 5.0,
    "frequency": 5.0,
    "complex_stft": 7.0,
}


def pair(count=2, n_samples=1024):
    generator = torch.Generator().manual_seed(0)
    real = 0.1 * torch.randn(count, n_samples, generator=generator)
    return (real + 0.05 * torch.randn(count, n_samples, generator=generator)).requires_grad_(), real


def frames_of(waveform: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """Spectra (F, K) of a waveform, frame by frame."""
    pad = (n_fft - hop) // 2
    extended = np.pad(waveform.astype(np.float64), pad, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    return np.stack([np.fft.rfft(window * extended[f * hop : f * hop + n_fft]) for f in range(len(waveform) // hop)])


def wrapped(angle: float) -> float:
    """arXiv 2211.15974, eq. 12."""
    return abs(angle - 2 * math.pi * round(angle / (2 * math.pi)))


def expected_terms(fake: np.ndarray, real: np.ndarray, resolutions) -> dict[str, float]:
    """All distances of one pair of waveforms, with loops."""
    terms, scale = {}, lambda n_fft: 1 / math.sqrt(3 / 8 * n_fft)
    spectra = [frames_of(each, SETTINGS.n_fft, SETTINGS.hop_length) for each in (fake, real)]
    filters = mel_filters(SETTINGS).double().numpy()
    mels = [np.log(np.maximum(np.abs(each) @ filters.T, SETTINGS.floor)) for each in spectra]
    terms["mel"] = np.abs(mels[0] - mels[1]).mean()
    convergence, logarithm = [], []
    for n_fft in resolutions:
        first, second = (np.abs(frames_of(each, n_fft, n_fft // 4)) * scale(n_fft) for each in (fake, real))
        convergence.append(np.linalg.norm(first - second) / np.linalg.norm(second))
        logarithm.append(np.abs(np.log(np.maximum(first, 1e-5)) - np.log(np.maximum(second, 1e-5))).mean())
    terms["convergence"], terms["log_magnitude"] = np.mean(convergence), np.mean(logarithm)
    first, second = spectra
    terms["complex_stft"] = np.linalg.norm(first - second) / np.linalg.norm(second)
    n_frames, n_bins = first.shape
    phases, loudness = [np.angle(each) for each in spectra], np.minimum(np.abs(first), np.abs(second))
    delays, changes = [], []
    for f in range(n_frames):
        for k in range(n_bins):
            if k + 1 < n_bins:
                error = (phases[0][f, k + 1] - phases[0][f, k]) - (phases[1][f, k + 1] - phases[1][f, k])
                delays.append(wrapped(error) * min(loudness[f, k], loudness[f, k + 1]))
            if f + 1 < n_frames:
                error = (phases[0][f + 1, k] - phases[0][f, k]) - (phases[1][f + 1, k] - phases[1][f, k])
                changes.append(wrapped(error) * min(loudness[f, k], loudness[f + 1, k]))
    terms["group_delay"] = np.mean(delays) / np.abs(second).mean()
    terms["frequency"] = np.mean(changes) / np.abs(second).mean()
    return terms


@pytest.mark.parametrize("resolutions", [(64, 128, 256), (128,)])
def test_distances_equal_loops_in_numpy(resolutions):
    fake, real = pair()
    found = VocoderLoss(SETTINGS, **ALL, resolutions=resolutions).distances(fake, real)
    for row in range(2):
        expected = expected_terms(fake[row].detach().numpy(), real[row].numpy(), resolutions)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][row].item() == pytest.approx(value, rel=2e-4), name


def test_terms_are_weighted_means_and_those_of_weight_0_are_left_out():
    fake, real = pair(3)
    criterion = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 256))
    terms, distances = criterion(fake, real), criterion.distances(fake, real)
    assert criterion.weights == NAMES and list(terms) == list(NAMES)
    for name, weight in NAMES.items():
        torch.testing.assert_close(terms[name], weight * distances[name].mean())
    for name, left in [
        ("mel_weight", {"convergence", "log_magnitude", "group_delay", "frequency", "complex_stft"}),
        ("stft_weight", {"mel", "group_delay", "frequency", "complex_stft"}),
        ("phase_weight", {"mel", "convergence", "log_magnitude", "complex_stft"}),
        ("complex_stft_weight", {"mel", "convergence", "log_magnitude", "group_delay", "frequency"}),
    ]:
        without = VocoderLoss(SETTINGS, **{**ALL, name: 0.0}, resolutions=(64, 256))(fake, real)
        assert without.keys() == left
        assert all(torch.equal(without[term], terms[term]) for term in left)


def test_micro_batches_average_to_the_whole():
    fake, real = pair(4)
    criterion = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 256))
    whole = sum(criterion(fake, real).values())
    parts = [sum(criterion(fake[rows], real[rows]).values()) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_a_perfect_copy_costs_nothing_and_has_no_slope():
    _, real = pair()
    copy = real.clone().requires_grad_()
    terms = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 256))(copy, real)
    assert all(term.item() == pytest.approx(0, abs=1e-5) for term in terms.values())
    sum(terms.values()).backward()
    assert copy.grad.isfinite().all()


def test_phase_terms_see_neither_gain_nor_sign():
    """A sign flip changes every phase by pi and neither group delay nor frequency; another noise changes both."""
    _, real = pair()
    criterion = VocoderLoss(SETTINGS, mel_weight=0, stft_weight=0, phase_weight=1, complex_stft_weight=1)
    flipped = criterion.distances(-real, real)
    assert flipped["group_delay"].max() < 1e-3 and flipped["frequency"].max() < 1e-3
    assert flipped["complex_stft"] == pytest.approx([2.0, 2.0], rel=1e-5)
    louder = criterion.distances(3 * real, real)
    assert louder["group_delay"].max() < 1e-3
    other = criterion.distances(real.flip(0), real)
    # The mean of a uniform angle in [0, pi] is pi / 2; the smaller magnitudes of pairs weigh less than 1.
    assert other["frequency"].min() > 0.5 and other["frequency"].max() < math.pi / 2


def test_slopes_of_the_phase_terms_are_bounded():
    """The slope of an angle is one over its magnitude; weights take that back."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1, 9, 7, generator=generator, dtype=torch.complex64)
    for size in (1.0, 1e-3, 1e-6, 1e-12, 0.0):
        fake = (size * torch.randn(1, 9, 7, generator=generator, dtype=torch.complex64)).requires_grad_()
        sum(each.sum() for each in phase_distances(fake, real, floor=1e-3).values()).backward()
        assert fake.grad.isfinite().all()
        assert (fake.grad.abs() * 7 * 8 * real.abs().mean()).max() < 4.5  # Four pairs, each at most 1.


def test_angles_are_those_of_numpy_and_nothing_has_angle_0():
    values = torch.tensor([1 + 0j, -1 + 1e-9j, -1j, 3 + 4j, 0j], requires_grad=True)
    angles = safe_angle(values)
    np.testing.assert_allclose(angles.detach().numpy(), np.angle(values.detach().numpy()), atol=1e-6)
    angles.sum().backward()
    assert values.grad.isfinite().all() and values.grad[-1] == 0


@pytest.mark.parametrize("real", ["silence", "constant", "clipped", "click", "quiet"])
@pytest.mark.parametrize("fake", ["silence", "noise", "same"])
def test_no_signal_gives_nan_or_boundless_terms(fake, real):
    n_samples = 1024
    click = torch.zeros(n_samples)
    click[500] = 1.0
    reals = {
        "silence": torch.zeros(n_samples),
        "constant": torch.full((n_samples,), 0.5),
        "clipped": torch.sin(torch.arange(n_samples) * 0.05).sign(),
        "click": click,
        "quiet": 1e-6 * torch.sin(torch.arange(n_samples) * 0.5),
    }
    noise = 0.3 * torch.randn(n_samples, generator=torch.Generator().manual_seed(0))
    generated = {"silence": torch.zeros(n_samples), "noise": noise, "same": reals[real].clone()}[fake]
    generated = generated[None].requires_grad_()
    terms = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 256))(generated, reals[real][None])
    (gradient,) = torch.autograd.grad(sum(terms.values()), generated)
    assert gradient.isfinite().all() and all(0 <= term.item() < 4000 for term in terms.values())


@pytest.mark.parametrize("n_valid", [320, 512])
def test_padding_does_not_count(n_valid):
    fake, real = (each.detach() for each in pair(2, 1024))
    fake[0, n_valid:], real[0, n_valid:] = 0, 0
    criterion = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 128))
    padded = criterion.distances(fake, real, torch.tensor([n_valid, 1024]))
    longer = [torch.nn.functional.pad(each[:1], (0, 640)) for each in (fake, real)]
    alone = criterion.distances(*longer, torch.tensor([n_valid]))
    everything = criterion.distances(fake, real)
    for name in padded:
        assert padded[name][0].item() == pytest.approx(alone[name].item(), rel=1e-4), name
        assert padded[name][1].item() == pytest.approx(everything[name][1].item(), rel=1e-5), name
        assert padded[name][0].item() > 0


def test_autocast_changes_nothing():
    fake, real = pair()
    criterion = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 256))
    plain = criterion(fake, real)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = criterion(fake, real)
    assert all(torch.equal(plain[name], mixed[name]) and mixed[name].dtype == torch.float32 for name in plain)


def test_the_mel_term_is_the_mean_difference_of_log_mels():
    fake, real = pair()
    log_mel = LogMel(SETTINGS)
    expected = (log_mel(fake) - log_mel(real)).abs().mean()
    terms = VocoderLoss(SETTINGS, mel_weight=45.0, stft_weight=0.0)(fake, real)
    assert list(terms) == ["mel"]
    torch.testing.assert_close(terms["mel"], 45 * expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mel_weight": -1.0}, "the weight of mel is -1.0"),
        ({"mel_weight": 0.0, "stft_weight": 0.0}, "all 0: nothing would be learned"),
        ({"resolutions": ()}, "stft_weight=1.0 needs resolutions"),
        ({"resolutions": (100,)}, r"\[100\] must be multiples of 8"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VocoderLoss(SETTINGS, **arguments)


def test_the_shortest_waveform():
    criterion = VocoderLoss(SETTINGS, **ALL, resolutions=(64, 256))
    assert criterion.min_samples == 97
    for n_samples in (97, 128):
        fake, real = pair(1, n_samples)
        assert all(term.isfinite() for term in criterion(fake, real).values())
    with pytest.raises(ValueError, match="too short"):
        criterion(*pair(1, 96))
