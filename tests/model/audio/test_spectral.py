"""The log-mel against librosa, the transform against its inverse."""

import dataclasses

import librosa
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.audio.spectral import (
    MEL_PRESETS,
    LogMel,
    MelSettings,
    Spectrogram,
    check_same_mel,
    mel_filters,
    mel_preset,
    mirror_by_slices,
)


@pytest.fixture
def waveform():
    time = torch.arange(16384) / 16000
    noise = torch.randn(2, 16384, generator=torch.Generator().manual_seed(0))
    return 0.3 * torch.sin(2 * torch.pi * 220 * time) + 0.1 * noise


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_log_mel_equals_librosa(name, waveform):
    settings = mel_preset(name)
    pad = (settings.n_fft - settings.hop_length) // 2
    extended = np.pad(waveform.numpy(), ((0, 0), (pad, pad)), mode="reflect")
    mel = librosa.feature.melspectrogram(
        y=extended,
        sr=settings.sample_rate,
        n_fft=settings.n_fft,
        hop_length=settings.hop_length,
        n_mels=settings.n_mels,
        fmin=settings.f_min,
        fmax=settings.f_max,
        power=1.0,
        center=False,
    )
    reference = np.log(np.maximum(mel, settings.floor))
    assert np.abs(LogMel(settings)(waveform).numpy() - reference).max() < 1e-4


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_filters_equal_librosa(name):
    settings = mel_preset(name)
    reference = librosa.filters.mel(
        sr=settings.sample_rate,
        n_fft=settings.n_fft,
        n_mels=settings.n_mels,
        fmin=settings.f_min,
        fmax=settings.f_max,
    )
    assert np.abs(mel_filters(settings).numpy() - reference).max() < 1e-6


@pytest.mark.parametrize(("n_fft", "hop_length"), [(1024, 256), (512, 256), (2048, 256)])
def test_round_trip(n_fft, hop_length, waveform):
    waveform = waveform[:, : 60 * hop_length]
    transform = Spectrogram(n_fft, hop_length)
    assert (transform.inverse(transform(waveform)) - waveform).abs().max() < 1e-5


@pytest.mark.parametrize("n_samples", [16000, 16128, 16127, 400])
def test_frames_are_samples_over_hop(n_samples, waveform):
    assert LogMel(MelSettings())(waveform[:, :n_samples]).shape == (2, 80, n_samples // 256)


def test_fp32_under_autocast(waveform):
    log_mel = LogMel(MelSettings())
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_mel(waveform)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, log_mel(waveform))


@pytest.mark.parametrize("before, after", [(0, 0), (0, 3), (3, 0), (9, 2), (9, 9)])
def test_reflection_by_slices_equals_the_kernel(before, after):
    """Values and gradients, up to the longest extension of 10 samples."""
    waveform, weights = torch.randn(2, 10), torch.randn(2, 10 + before + after)
    results = []
    for reflect in (mirror_by_slices, lambda x, *ends: F.pad(x, ends, mode="reflect")):
        leaf = waveform.clone().requires_grad_()
        extended = reflect(leaf, before, after)
        (extended * weights).sum().backward()
        results.append((extended, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    with pytest.raises(ValueError, match="10 samples is too short"):
        mirror_by_slices(waveform, 10, 0)


def test_silence_is_the_floor():
    settings = MelSettings()
    assert torch.equal(LogMel(settings)(torch.zeros(1, 4096)), torch.full((1, 80, 16), settings.log_floor))


def test_too_short_waveform_is_refused():
    settings = MelSettings()
    LogMel(settings)(torch.zeros(1, settings.min_samples))
    with pytest.raises(ValueError, match="384 samples is too short"):
        LogMel(settings)(torch.zeros(1, settings.min_samples - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hop_length": 300}, "hop_length=300 must divide n_fft=1024"),
        ({"n_fft": 1323, "hop_length": 441}, "must be even"),
        ({"f_max": 9000.0}, "f_max=9000.0"),
        ({"n_mels": 0}, "n_mels=0"),
        ({"floor": 0.0}, "floor=0.0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MelSettings(**change)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"no mel preset '16'.*16k"):
        mel_preset("16")


def test_different_mels_are_shown():
    first, second = MelSettings(), dataclasses.replace(MelSettings(), n_mels=100)
    check_same_mel(first, first, first_name="cache", second_name="vocoder", remedy="")
    with pytest.raises(ValueError, match="differ in n_mels") as error:
        check_same_mel(first, second, first_name="cache", second_name="vocoder", remedy="make it again")
    assert "n_mels=80" in str(error.value) and "n_mels=100" in str(error.value) and "make it again" in str(error.value)
