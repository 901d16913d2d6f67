"""What is spoken in tests of metrics, at which rate, and the same waveform in every process; a mark for tests of a
package that cannot be built on every machine."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from torch import Tensor

from dataset_loading.audio.signal import resample
from dataset_loading.embedded.speech import load_speaker
from utils.metrics.audio import not_measured

RATE = 16000
SENTENCE = "Please say the name of the person that you are calling."
needs_pesq = pytest.mark.skipif(bool(not_measured(["pesq"])), reason=not_measured(["pesq"]).get("pesq", ""))


def speak_sentence() -> Tensor:
    """The sentence at 16 kHz, (S,), spoken in this process: the waveform depends on what was spoken before."""
    speaker = load_speaker()
    return resample(speaker.speak(SENTENCE, "en-us+f2", rate=150, pitch=50), speaker.sample_rate, RATE)


def run_first(function, *arguments):
    """What a function returns in a process that has spoken nothing yet, and therefore speaks alike each time."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def speak_first() -> Tensor:
    """`speak_sentence` in a process of its own: always the same waveform."""
    return run_first(speak_sentence)
