"""Resampling and conditioning, against tones and sums whose answers are known."""

import math

import pytest
import torch

from dataset_loading.audio import signal
from dataset_loading.audio.signal import (
    StreamResampler,
    TooQuietError,
    active_level,
    cut_at_pauses,
    frame_levels,
    is_silent,
    limit_peak,
    measured_loudness,
    normalize_loudness,
    remove_hum,
    resample,
    sliding_energy,
    trim_silence,
)
from tests.helpers.sounds import RATE, amplitude_at, tone

# ---- Resampling.


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone_and_its_length(rate):
    heard = resample(tone(1000, 1.0, rate), rate, RATE)
    assert abs(len(heard) - RATE) <= 1
    assert (heard[1000:-1000] - tone(1000)[: len(heard)][1000:-1000]).abs().max() < 2e-4


@pytest.mark.parametrize("rate", [11127, 15999, 16003, 47999])
def test_rates_without_a_small_ratio_stay_in_tune(rate):
    heard = resample(tone(1000, 1.0, rate), rate, RATE)
    spectrum = torch.fft.rfft(heard[1000:15000] * torch.hann_window(14000), 1 << 18).abs()
    assert spectrum.argmax() * RATE / (1 << 18) == pytest.approx(1000, rel=2 ** (0.01 / 12) - 1)


def test_resampling_lets_nothing_fold_back():
    heard = resample(tone(9500, 1.0, 44100), 44100, RATE)
    assert heard[1000:-1000].abs().max() < 1e-3
    assert torch.equal(resample(heard, RATE, RATE), heard)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_in_blocks_is_that_of_the_whole(rate):
    waveform = torch.randn(3 * rate, generator=torch.Generator().manual_seed(0))
    whole = resample(waveform, rate, RATE)
    pieces = list(StreamResampler(rate, RATE).run(waveform.split(rate // 3 + 1)))
    assert len(pieces) > 3 and torch.allclose(torch.cat(pieces), whole, atol=1e-6)
    # One block alone has the very numbers, also where it is short.
    for n_samples in (50, len(waveform)):
        (piece,) = StreamResampler(rate, RATE).run([waveform[:n_samples]])
        assert torch.equal(piece, resample(waveform[:n_samples], rate, RATE))


# ---- Measuring.


def test_levels_are_those_of_a_loop():
    waveform = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1
    levels = frame_levels(waveform, RATE)
    frames = [waveform[start : start + 320] for start in range(0, 1000, 320)]
    slow = [10 * math.log10(sum(x * x for x in frame.tolist()) / len(frame)) for frame in frames]
    assert levels.tolist() == pytest.approx(slow, abs=1e-3)
    energies = [float(waveform[i : i + 7].square().sum()) for i in range(994)]
    assert sliding_energy(waveform, 7).tolist() == pytest.approx(energies, abs=1e-6)


def test_pauses_do_not_count_as_active():
    waveform = tone(440)
    assert active_level(waveform, RATE) == pytest.approx(-9.03, abs=0.02)
    assert active_level(torch.cat([waveform, torch.zeros(3 * RATE)]), RATE) == pytest.approx(-9.03, abs=0.02)


def test_bs1770_gives_the_standards_example_and_short_waveforms_theirs():
    loudness = measured_loudness(tone(997, 2.0, 48000, amplitude=1.0), 48000, "bs1770")
    assert loudness == pytest.approx(-3.01, abs=0.3)  # BS.1770-4, annex 1; torchaudio's filter is 0.27 dB off.
    assert measured_loudness(tone(997, 0.2, 48000, amplitude=1.0), 48000, "bs1770") == pytest.approx(loudness, abs=0.2)


def test_loudness_below_the_gate_is_an_error_and_no_number():
    with pytest.raises(TooQuietError, match="-70 LUFS"):
        measured_loudness(tone(20, 3.0, amplitude=2e-3), RATE, "bs1770")


def test_long_waveforms_are_measured_and_filtered_as_short_ones(monkeypatch):
    waveform = tone(220, 9.3) + tone(50, 9.3, amplitude=0.1)
    levels, clean = frame_levels(waveform, RATE), remove_hum(waveform, RATE, 50)
    monkeypatch.setattr(signal, "LONG_SAMPLES", 50_000)
    assert torch.equal(frame_levels(waveform, RATE), levels)
    assert torch.allclose(remove_hum(waveform, RATE, 50), clean, atol=1e-5)


def test_silence_is_seen():
    assert is_silent(torch.zeros(4000), RATE) and is_silent(tone(440, amplitude=1e-3), RATE)
    assert not is_silent(torch.cat([torch.zeros(RATE), tone(440, 0.05, amplitude=0.01)]), RATE)


# ---- Conditioning.


def test_loudness_of_long_waveforms_is_measured_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20 * RATE, generator=generator) * torch.linspace(0, 0.3, 20 * RATE)
    noise[5 * RATE : 8 * RATE] = 0
    for waveform in (noise, 0.1 + tone(100, 20.0)):
        whole = measured_loudness(waveform, RATE, "bs1770")
        with monkeypatch.context() as patch:
            patch.setattr(signal, "LONG_SAMPLES", 50_000)
            assert measured_loudness(waveform, RATE, "bs1770") == pytest.approx(whole, abs=1e-3)
            with pytest.raises(TooQuietError):
                measured_loudness(torch.zeros(20 * RATE), RATE, "bs1770")


@pytest.mark.parametrize("measure", ["active", "bs1770"])
def test_loudness_reaches_its_target(measure):
    waveform = torch.cat([tone(440, amplitude=0.02), torch.zeros(RATE)])
    assert measured_loudness(normalize_loudness(waveform, RATE, -23, measure=measure), RATE, measure) == pytest.approx(
        -23, abs=0.1
    )


def test_loudness_stops_at_full_scale():
    waveform = torch.cat([tone(440, amplitude=0.05), torch.tensor([0.9])])
    assert normalize_loudness(waveform, RATE, -9, measure="active").abs().max() == pytest.approx(1.0)
    assert torch.equal(limit_peak(waveform), waveform)


def test_trimming_leaves_the_margin():
    quiet = 1e-3 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    waveform = torch.cat([quiet[:8000], tone(440, 0.5), quiet])
    trimmed = trim_silence(waveform, RATE, 40)
    assert len(trimmed) == pytest.approx(8000 + 2 * 0.05 * RATE, abs=640)
    assert torch.equal(trim_silence(waveform, RATE, 90), waveform)
    assert torch.equal(trim_silence(tone(440), RATE, 40), tone(440))


@pytest.mark.parametrize("mains", [50, 60])
def test_hum_and_harmonics_go_and_the_voice_stays(mains):
    voice = tone(220, 3.0) + tone(1430, 3.0, amplitude=0.2)
    hum = sum(tone(mains * n, 3.0, amplitude=0.1 / n) for n in (1, 2, 3, 5))
    clean = remove_hum(voice + hum, RATE, mains)
    assert len(clean) == len(voice)
    for n in (1, 2, 3, 5):
        assert amplitude_at(clean, mains * n) < 0.05 * amplitude_at(hum, mains * n)
    assert amplitude_at(clean, 220) == pytest.approx(0.5, rel=0.03)
    assert amplitude_at(clean, 1430) == pytest.approx(0.2, rel=0.01)
    clean = remove_hum(voice, RATE, mains)
    assert (clean - voice)[RATE:-RATE].square().mean() < 1e-3 * voice.square().mean()  # No delay.


def test_cuts_fall_into_pauses_and_nothing_is_lost():
    words, pauses = [0.9, 1.6, 0.7, 1.2, 2.0, 0.4], 0.2
    waveform = torch.cat([torch.cat([tone(300, word), torch.zeros(round(pauses * RATE))]) for word in words])
    pieces = cut_at_pauses(waveform, RATE, 3 * RATE)
    assert torch.equal(torch.cat(pieces), waveform) and len(pieces) > 2
    for piece in pieces[:-1]:
        assert piece[-1] == 0 and RATE <= len(piece) <= 3 * RATE


@pytest.mark.parametrize("length", [100, 999, 1000, 1001, 1499, 1500, 1501, 2600, 12345])
def test_pieces_of_any_length_are_within_bounds(length):
    waveform = torch.randn(length, generator=torch.Generator().manual_seed(length))
    pieces = cut_at_pauses(waveform, 8000, 1000)
    assert torch.equal(torch.cat(pieces), waveform)
    assert max(map(len, pieces)) <= 1000
    assert length <= 1000 or min(map(len, pieces)) >= 333


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_filters_do_not_clip_loud_waveforms(scale):
    square = 0.95 * torch.sin(2 * torch.pi * 333 * torch.arange(16000) / 16000 + 0.3).sign()
    assert (remove_hum(scale * square, 16000, 50) - scale * remove_hum(square, 16000, 50)).abs().max() < 1e-4
    quieter = measured_loudness(scale * square, 16000, "bs1770") - measured_loudness(square, 16000, "bs1770")
    assert quieter == pytest.approx(20 * math.log10(scale), abs=0.01)
