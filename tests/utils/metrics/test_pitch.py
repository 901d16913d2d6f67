"""Pitch of tones and of speech."""

import math

import pytest
import torch

from tests.helpers.spoken import RATE
from utils.metrics.pitch import Pitch, normalized_cross_correlation, pitch_scores, track_pitch


def tone(f0, seconds: float = 1.0, rate: int = RATE) -> torch.Tensor:
    """Five harmonics of a pitch in Hz, a number or a function of time."""
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    phase = 2 * math.pi * torch.cumsum(torch.as_tensor(f0(time) if callable(f0) else f0 + 0 * time), 0) / rate
    return sum(torch.sin(k * phase) / k for k in range(1, 6)).float() * 0.3


# ---- Pitch.


@pytest.mark.parametrize("f0", [70.0, 110.3, 220.0, 440.0, 523.2])
def test_the_pitch_of_a_tone_is_found_within_two_cents(f0):
    pitch = track_pitch(tone(f0), RATE)
    inner = slice(5, -5)
    assert pitch.voiced[inner].all() and len(pitch.f0) == 100
    assert (1200 * (pitch.f0[inner] / f0).log2()).abs().max() < 2 and pitch.periodicity[inner].min() > 0.99


def test_a_sweep_is_followed_at_every_rate():
    for rate in (8000, 16000, 24000):
        pitch = track_pitch(tone(lambda time: 100 * 4 ** (time / 2), 2.0, rate), rate)
        truth = 100 * 4 ** (torch.arange(200) / 100 / 2)
        assert pitch.voiced[5:-5].all() and (1200 * (pitch.f0 / truth)[5:-5].log2()).abs().max() < 20


def test_noise_and_silence_are_unvoiced_and_levels_do_not_matter(speech):
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert track_pitch(noise, RATE).voiced.float().mean() < 0.05
    silent = track_pitch(torch.zeros(RATE), RATE)
    assert not silent.voiced.any() and silent.periodicity.max() == 0
    loud, soft = track_pitch(speech, RATE), track_pitch(speech * 1e-3, RATE)
    assert torch.equal(loud.voiced, soft.voiced) and torch.allclose(loud.f0, soft.f0, rtol=1e-3)


def test_correlation_equals_sums_written_out():
    waveform = torch.randn(900, generator=torch.Generator().manual_seed(0))
    found = normalized_cross_correlation(waveform, 60)
    padded = torch.nn.functional.pad(waveform.double(), (200, 4000))
    frame = padded[160 * 3 : 160 * 3 + 400 + 60]
    frame = frame - frame[:400].mean()
    head, late = frame[:400], frame[37:437]
    expected = (head * late).sum() / (head.square().sum() * late.square().sum()).sqrt()
    assert found[3, 37] == pytest.approx(expected.item(), rel=1e-3) and found[3, 0] == pytest.approx(1, abs=1e-3)


def test_our_pitch_agrees_with_another_tracker(speech):
    import librosa

    f0, voiced, _ = librosa.pyin(speech.numpy(), fmin=60, fmax=550, sr=RATE, frame_length=1024, hop_length=160)
    ours = track_pitch(speech, RATE)
    both = torch.from_numpy(voiced[: len(ours.f0)]) & ours.voiced[: len(voiced)]
    cents = 1200 * (ours.f0[: len(voiced)][both] / torch.from_numpy(f0[: len(ours.f0)])[both]).log2()
    assert both.float().mean() > 0.4 and cents.abs().median() < 20 and (cents.abs() > 100).float().mean() < 0.1


def test_pitch_scores_by_hand():
    def pitch(f0, periodicity):
        f0 = torch.tensor(f0)
        return Pitch(f0, f0 > 0, torch.tensor(periodicity))

    scores = pitch_scores(pitch([100.0, 0.0, 200.0], [1.0, 0.5, 1.0]), pitch([100.0, 50.0, 400.0], [1.0, 0.5, 0.4]))
    assert scores["voicing_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert scores["periodicity_rmse"] == pytest.approx(math.sqrt(0.36 / 3))
    assert scores["f0_rmse_cents"] == pytest.approx(math.sqrt(1200**2 / 2))
    silent = pitch([0.0], [0.0])
    assert pitch_scores(silent, silent) == {"voicing_f1": None, "periodicity_rmse": 0.0, "f0_rmse_cents": None}
