"""Every change does what its name says: tones tell pitch, lengths tell speed, powers tell gain and noise."""

import math

import pytest
import torch

from dataset_loading.audio.augmentation import AudioAugmentation, add_noise, pitch_shift, time_stretch

RATE = 16000


def tone(frequency, seconds=1.0, amplitude=0.4):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)


def pitch_of(waveform):
    """The frequency of a tone, by the peak of a zero-padded spectrum; resolution 0.06 Hz."""
    inner = waveform[800:-800]
    return torch.fft.rfft(inner * torch.hann_window(len(inner)), 1 << 18).abs().argmax().item() * RATE / (1 << 18)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("speed", [0.5, 0.8, 0.9, 1.1, 1.25, 2.0])
def test_stretching_changes_the_length_alone(speed):
    for frequency in (110, 440, 1000):
        stretched = time_stretch(tone(frequency), RATE, speed)
        assert len(stretched) == round(RATE / speed)
        assert pitch_of(stretched) == pytest.approx(frequency, rel=2e-3)
        assert stretched[400:-400].std() == pytest.approx(0.4 / math.sqrt(2), rel=0.02)


def test_stretching_moves_events_and_speed_one_changes_nothing():
    waveform = torch.cat([torch.zeros(8000), tone(300, 0.5)])
    for speed in (0.8, 1.25):
        onset = int((time_stretch(waveform, RATE, speed).abs() > 0.05).nonzero()[0])
        assert onset == pytest.approx(8000 / speed, abs=0.02 * RATE)
    noise = torch.randn(5000, generator=generator())
    assert torch.allclose(time_stretch(noise, RATE, 1.0), noise, atol=1e-5)
    assert len(time_stretch(noise[:50], RATE, 1.5)) == 33


@pytest.mark.parametrize("semitones", [-12, -3, -0.5, 0.5, 2, 12])
def test_shifting_changes_the_pitch_alone(semitones):
    for frequency in (220, 1000):
        shifted = pitch_shift(tone(frequency), RATE, semitones)
        assert len(shifted) == RATE
        assert pitch_of(shifted) == pytest.approx(frequency * 2 ** (semitones / 12), rel=3e-3)
    assert torch.equal(pitch_shift(tone(440), RATE, 0.0), tone(440))


@pytest.mark.parametrize("snr_db", [-5.0, 10.0, 30.0])
def test_noise_has_its_ratio_and_no_colour(snr_db):
    waveform = tone(440)
    noise = add_noise(waveform, snr_db, generator()) - waveform
    ratio = 10 * math.log10(waveform.square().mean() / noise.square().mean())
    assert ratio == pytest.approx(snr_db, abs=0.01)
    low, high = torch.fft.rfft(noise).abs().square().tensor_split(2)
    assert low.sum() == pytest.approx(high.sum().item(), rel=0.1)


def test_gain_is_within_its_range_and_peaks_within_full_scale():
    gains = [AudioAugmentation(gain_db=6.0)(tone(440), RATE, generator(i)).std() / tone(440).std() for i in range(40)]
    in_db = [20 * math.log10(gain) for gain in gains]
    assert -6.001 <= min(in_db) < -4 and 4 < max(in_db) <= 6.001
    assert AudioAugmentation(gain_db=40.0)(tone(440), RATE, generator(6)).abs().max() <= 1


def test_draws_cover_the_ranges():
    lengths = [len(AudioAugmentation(time_stretch=0.25)(tone(440, 0.2), RATE, generator(i))) for i in range(30)]
    assert 3200 / 1.25 - 1 <= min(lengths) < 2750 and 3750 < max(lengths) <= 3200 * 1.25 + 1
    pitches = [pitch_of(AudioAugmentation(pitch_shift=2.0)(tone(440, 0.3), RATE, generator(i))) for i in range(20)]
    shifts = [12 * math.log2(pitch / 440) for pitch in pitches]
    assert -2.1 < min(shifts) < -1 and 1 < max(shifts) < 2.1
    ratios = []
    for i in range(30):
        noise = AudioAugmentation(noise_snr_db=10.0)(tone(440), RATE, generator(i)) - tone(440)
        ratios.append(10 * math.log10(tone(440).square().mean() / noise.square().mean()))
    assert 9.99 < min(ratios) < 13 and 27 < max(ratios) < 30.01


def test_all_randomness_comes_from_the_generator():
    change = AudioAugmentation(time_stretch=0.1, pitch_shift=1.0, gain_db=6.0, noise_snr_db=20.0)
    torch.manual_seed(0)
    first = change(tone(300), RATE, generator(1))
    torch.manual_seed(1)
    assert torch.equal(first, change(tone(300), RATE, generator(1)))
    other = change(tone(300), RATE, generator(2))
    assert len(first) != len(other)
    assert torch.equal(AudioAugmentation()(tone(300), RATE, generator()), tone(300))
