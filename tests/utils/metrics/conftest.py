"""Speech."""

import pytest

from dataset_loading.audio.signal import resample
from dataset_loading.embedded.speech import load_speaker
from tests.helpers.spoken import RATE, SENTENCE


@pytest.fixture(scope="module")
def speech():
    """One spoken sentence at 16 kHz, (S,)."""
    speaker = load_speaker()
    return resample(speaker.speak(SENTENCE, "en-us+f2", rate=150, pitch=50), speaker.sample_rate, RATE)
