"""What is spoken in tests of metrics, at which rate, and the same waveform in every process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from torch import Tensor

from dataset_loading.audio.signal import resample
from dataset_loading.embedded.speech import load_speaker

RATE = 16000
SENTENCE = "Please say the name of the person that you are calling."


def speak_sentence() -> Tensor:
    """The sentence at 16 kHz, (S,), spoken in this process: the waveform depends on what was spoken before."""
    speaker = load_speaker()
    return resample(speaker.speak(SENTENCE, "en-us+f2", rate=150, pitch=50), speaker.sample_rate, RATE)


def speak_first() -> Tensor:
    """The sentence as a process speaks it that has spoken nothing yet: always the same waveform."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(speak_sentence).result()
