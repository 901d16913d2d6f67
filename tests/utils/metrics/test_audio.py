"""Metrics of audio against known values, slow computations and what must hold of them on speech."""

import math
import sys

import numpy as np
import pytest
import torch

from dataset_loading.audio.signal import resample
from dataset_loading.embedded.speech import load_speaker
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, MelSettings
from tests.helpers.spoken import RATE, needs_pesq
from utils.metrics.audio import (
    SpeakerEncoder,
    import_optional,
    mcd,
    mel_l1,
    multi_resolution_stft_distance,
    not_measured,
    pesq_wb,
    pesq_wb_and_mean,
    pesq_wb_starts,
    stoi,
)
from utils.metrics.pitch import pitch_scores, track_pitch


@pytest.fixture(scope="module")
def noisy(speech):
    """The sentence with noise at 30, 15 and 0 dB."""
    noise = torch.randn(speech.shape, generator=torch.Generator().manual_seed(0)) * speech.square().mean().sqrt()
    return [speech + noise * 10 ** (-snr / 20) for snr in (30, 15, 0)]


# ---- Of waveforms.


@needs_pesq
def test_a_clip_against_itself_is_perfect(speech):
    assert pesq_wb(speech, speech, RATE) == pytest.approx(4.644, abs=1e-3)
    assert stoi(speech, speech, RATE) == pytest.approx(1.0, abs=1e-6)
    assert multi_resolution_stft_distance(speech, speech) == 0
    assert pitch_scores(track_pitch(speech, RATE), track_pitch(speech, RATE)) == {
        "voicing_f1": 1.0,
        "periodicity_rmse": 0.0,
        "f0_rmse_cents": 0.0,
    }


@needs_pesq
def test_pesq_depends_on_the_start_and_its_mean_does_not(speech):
    log_mel = LogMel(MelSettings())
    speech = speech[: len(speech) // 256 * 256]
    generated = griffin_lim(log_mel(speech[None]), MelSettings())[0]
    values = [pesq_wb(generated[start:], speech[start:], RATE) for start in (0, 64, 128, 192)]
    assert max(values) - min(values) > 0.1
    assert pesq_wb_starts(generated, speech, RATE) == pytest.approx(sum(values) / 4)
    assert pesq_wb_and_mean(generated, speech, RATE) == (values[0], pytest.approx(sum(values) / 4))
    moved = [pesq_wb_starts(generated[start:], speech[start:], RATE) for start in (0, 32, 96)]
    assert max(moved) - min(moved) < 0.5 * (max(values) - min(values))
    assert pesq_wb_starts(generated[:3900], speech[:3900], RATE) is None


@needs_pesq
def test_pesq_of_a_recording_with_more_utterances_than_the_package_holds():
    random = torch.Generator().manual_seed(0)
    burst = torch.cat([0.3 * torch.randn(4800, generator=random), torch.zeros(4800)])
    target = burst.repeat(90)  # 54 s; the package crashes on it.
    generated = target + 0.01 * torch.randn(len(target), generator=random)
    pieces = zip(generated.chunk(4), target.chunk(4))
    expected = sum(pesq_wb(*piece, RATE) for piece in pieces) / 4
    assert pesq_wb(generated, target, RATE) == pytest.approx(expected) and 1 < expected < 4
    silent = torch.zeros(40 * RATE)
    assert pesq_wb(silent, silent, RATE) is None


@needs_pesq
def test_noise_makes_every_metric_worse_and_more_noise_more_so(speech, noisy):
    for metric, sign in ((pesq_wb, -1), (stoi, -1)):
        values = [sign * metric(each, speech, RATE) for each in (speech, *noisy)]
        assert values == sorted(set(values)), metric.__name__
    distances = [multi_resolution_stft_distance(each, speech) for each in (speech, *noisy)]
    assert distances == sorted(set(distances))
    assert pitch_scores(track_pitch(noisy[2], RATE), track_pitch(speech, RATE))["voicing_f1"] < 0.95


@needs_pesq
def test_other_rates_and_lengths_are_taken(speech):
    high = resample(speech, RATE, 24000)
    assert pesq_wb(high[:-100], high, 24000) > 4.5 and stoi(high[:-100], high, 24000) > 0.99
    assert pesq_wb(speech.numpy(), speech.numpy(), RATE) > 4.6


@pytest.mark.parametrize(
    "metric",
    [pytest.param(pesq_wb, marks=needs_pesq), stoi, lambda a, b, rate: multi_resolution_stft_distance(a, b)],
)
def test_silence_and_clips_that_are_too_short_have_no_score(metric, speech):
    assert metric(torch.zeros(RATE), torch.zeros(RATE), RATE) is None
    assert metric(speech[2000:2300], speech[2000:2300], RATE) is None


def test_a_waveform_must_be_one_and_finite(speech):
    with pytest.raises(ValueError, match=r"shape \(S,\) with S > 0, got \(1, \d+\)"):
        stoi(speech, speech[None], RATE)
    broken = speech.clone()
    broken[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        multi_resolution_stft_distance(broken, speech)


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"'no_such_package'.*pip install -r requirements-eval.txt"):
        import_optional("no_such_package")


def test_a_metric_that_cannot_be_built_everywhere_is_named(monkeypatch, speech):
    monkeypatch.setitem(sys.modules, "pesq", None)  # As where the package is not installed.
    assert not_measured(["stoi", "mel"]) == {}
    sentence = not_measured(["pesq", "stoi"])["pesq"]
    assert "PESQ: not measured" in sentence and "C compiler" in sentence
    with pytest.raises(ValueError, match=r"'pesq'.*requirements-pesq.txt"):
        pesq_wb(speech, speech, RATE)


def test_stft_distance_equals_its_formula(speech, noisy):
    import librosa

    a, b = (each[: 16000 // 512 * 512].numpy() for each in (speech, noisy[1]))
    total = 0.0
    for n_fft, hop in ((512, 128), (1024, 256), (2048, 512)):
        padded = [np.pad(each, (n_fft - hop) // 2, mode="reflect") for each in (a, b)]
        target, generated = (np.abs(librosa.stft(each, n_fft=n_fft, hop_length=hop, center=False)) for each in padded)
        total += np.linalg.norm(target - generated) / np.linalg.norm(target)
        total += np.abs(np.log(np.maximum(target, 1e-5)) - np.log(np.maximum(generated, 1e-5))).mean()
    found = multi_resolution_stft_distance(torch.from_numpy(b), torch.from_numpy(a))
    assert found == pytest.approx(total / 3, rel=1e-4)


# ---- Of log-mels.


def test_mel_l1_counts_valid_frames_only():
    a, b = torch.zeros(4, 6), torch.zeros(4, 8)
    b[:, 3:] = 7.0
    b[0, 0] = -1.2
    assert mel_l1(a, b, 3) == pytest.approx(1.2 / 12)
    assert mel_l1(a, b) == pytest.approx((1.2 + 3 * 4 * 7) / 24)
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(5, 6\)"):
        mel_l1(a, torch.zeros(5, 6))
    with pytest.raises(ValueError, match="first 0"):
        mel_l1(a, b, 0)


def test_mcd_equals_a_cosine_transform_written_out():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 20, 7))
    total = 0.0
    for frame in range(7):
        squares = 0.0
        for i in range(1, 14):
            c = sum(2 / 20 * (a - b)[k, frame] * math.cos(math.pi * i * (k + 0.5) / 20) for k in range(20))
            squares += c**2
        total += 10 / math.log(10) * math.sqrt(2 * squares)
    assert mcd(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(total / 7, rel=1e-5)


def test_mcd_is_the_difference_in_decibels_and_leaves_the_level_out():
    a = torch.randn(80, 30, generator=torch.Generator().manual_seed(0))
    assert mcd(a, a + 2.0) == pytest.approx(0, abs=1e-5)
    # A ripple of one cosine: its root mean square in dB.
    ripple = 0.1 * torch.cos(math.pi * 3 * (torch.arange(80) + 0.5) / 80)[:, None]
    assert mcd(a, a + ripple) == pytest.approx(20 / math.log(10) * 0.1 / math.sqrt(2), rel=1e-4)


def test_a_voice_resembles_itself_more_than_another(speech):
    speaker, encoder = load_speaker(), SpeakerEncoder()
    other = resample(
        speaker.speak("Something else is said here.", "en-us+m7", rate=140, pitch=20), speaker.sample_rate, RATE
    )
    assert encoder.similarity(speech, speech, RATE) == pytest.approx(1, abs=1e-5)
    assert encoder.similarity(speech, speech * 0.1, RATE) > 0.9 > encoder.similarity(speech, other, RATE)
    assert encoder.similarity(speech, torch.zeros(RATE), RATE) is None


def test_noise_raises_the_distance_of_log_mels(speech, noisy):
    log_mel = LogMel(MelSettings())
    mel = log_mel(speech[None])[0]
    for metric in (mel_l1, mcd):
        values = [metric(mel, log_mel(each[None])[0]) for each in (speech, *noisy)]
        assert values[0] == 0 and values == sorted(set(values))
