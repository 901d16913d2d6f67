"""Features of sounds from their log-mels."""

import pytest
import torch

from utils.metrics.sounds import N_BANDS, N_PLACES, sound_blocks, sound_features


def test_blocks_are_spectrum_spread_changes_course_and_duration():
    mel = torch.linspace(-8, 0, 20).repeat(16, 1) + torch.arange(16.0)[:, None] / 16
    features = sound_features(mel)
    blocks = features.split(sound_blocks(16))
    assert len(features) == sum(sound_blocks(16))
    assert torch.allclose(blocks[0], mel.mean(1)) and torch.allclose(blocks[1], mel.std(1, correction=0))
    assert torch.allclose(blocks[2], torch.full((16,), 8 / 19))
    course = blocks[3].view(N_BANDS, N_PLACES)
    assert torch.allclose(course.sum(1), torch.zeros(N_BANDS), atol=1e-4) and (course.diff(dim=1) > 0).all()
    assert blocks[4].item() == pytest.approx(torch.tensor(20.0).log().item())


def test_silence_and_single_frames_are_finite_and_the_depth_of_silence_does_not_count():
    silence = torch.full((16, 30), -11.5)
    assert sound_features(silence).isfinite().all() and sound_features(silence[:, :1]).isfinite().all()
    assert torch.equal(sound_features(silence), sound_features(silence - 3))
