"""Recordings with wild samples, offsets, inverted channels and samples beyond full scale."""

import logging
import math

import numpy as np
import pytest
import torch

from dataset_loading.audio import decoding
from dataset_loading.audio.recording import read_recording
from tests.helpers.sounds import RATE, encoded, tone


def recorded(samples, rate=RATE, **options):
    content = encoded(np.asarray(samples), rate, **{"format": "WAV", "subtype": "FLOAT", **options})
    return read_recording({"path": None, "bytes": content}, RATE)


def test_channels_are_mixed_and_clipping_is_that_of_the_worst():
    # A sine of amplitude 1.5 is beyond 1 for 1 - 2 / pi * asin(2 / 3) of the time.
    samples = torch.stack([tone(440), (3 * tone(440)).clamp(-1, 1)], 1)
    waveform, clipped = recorded(samples, subtype="PCM_16")
    assert torch.allclose(waveform, samples.mean(1), atol=1e-4)
    assert clipped == pytest.approx(1 - 2 / math.pi * math.asin(2 / 3), abs=0.005)
    assert recorded(tone(440)).clipped_share == 0


@pytest.mark.parametrize("other", [-1.0, -0.9])
def test_inverted_channels_do_not_cancel(other, caplog):
    with caplog.at_level(logging.WARNING):
        waveform, _ = recorded(torch.stack([tone(440), other * tone(440)], 1))
    assert torch.allclose(waveform, tone(440)) and "channel 0" in caplog.text


def test_channels_that_differ_are_mixed(caplog):
    noise = 0.1 * torch.randn(RATE, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(recorded(noise).waveform, noise.mean(1), atol=2e-3)
    assert torch.allclose(recorded(torch.stack([tone(440), 0 * tone(440)], 1)).waveform, tone(440) / 2, atol=1e-6)
    assert not caplog.text


def test_offsets_are_removed():
    assert torch.allclose(recorded(tone(440) + 0.2).waveform, tone(440), atol=1e-4)
    assert recorded(torch.full((RATE,), 0.3)).waveform.abs().max() < 1e-4
    # Below what counts as sound, the samples stay as they are.
    assert torch.equal(recorded(tone(440) + 2e-4).waveform, (tone(440) + 2e-4))


@pytest.mark.parametrize("scale", [1.5, 3.0, 32768.0])
def test_recordings_beyond_full_scale_are_scaled_and_not_clipped(scale):
    waveform, clipped = recorded(scale * 2 * tone(441))
    assert torch.allclose(waveform, 2 * tone(441), atol=1e-3) and clipped < 0.05
    # Where their own peak is held, they are.
    assert recorded((12 * tone(441)).clamp(-3, 3)).clipped_share == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e4, 30.0])
def test_a_wild_sample_is_damage(value):
    samples = tone(441)
    samples[4000] = value
    with pytest.raises(ValueError, match=r"damaged: 1 samples .* at 0.250 s"):
        recorded(samples)


def test_long_files_are_read_in_blocks(monkeypatch):
    samples = torch.stack([tone(440, 3, 44100), tone(700, 3, 44100)], 1)
    whole = recorded(samples, 44100)
    monkeypatch.setattr(decoding.AudioReader.blocks, "__defaults__", (10_000,))
    blocks = recorded(samples, 44100)
    assert torch.allclose(blocks.waveform, whole.waveform, atol=1e-6) and len(whole.waveform) == 3 * RATE
