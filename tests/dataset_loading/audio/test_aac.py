import io
import math
import sys

import numpy as np
import pytest

from dataset_loading.audio.aac import is_av
from dataset_loading.audio.decoding import decode_audio
from dataset_loading.audio.signal import AUDIO_SUFFIXES

RATE = 16000


def encoded(container, codec, seconds=1.0):
    """A tone of 440 Hz, encoded by PyAV."""
    av = pytest.importorskip("av")
    tone = 0.5 * np.sin(2 * math.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize(("container", "ending"), [("ipod", ".m4a"), ("adts", ".aac")])
def test_aac_is_decoded(container, ending):
    content = encoded(container, "aac")
    samples, rate = decode_audio({"path": None, "bytes": content})
    assert ending in AUDIO_SUFFIXES and is_av(content[:8])
    assert rate == RATE and samples.shape[0] == 1 and abs(samples.shape[1] - RATE) < 2100  # Frames of 1024, a delay.
    spectrum = samples[0, 4000:12000].numpy() * np.hanning(8000)
    assert abs(np.abs(np.fft.rfft(spectrum)).argmax() * RATE / 8000 - 440) < 3
    assert samples.square().mean().sqrt().item() == pytest.approx(0.5 / 2**0.5, rel=0.1)


def test_files_that_are_cut_off_are_errors():
    content = encoded("ipod", "aac", seconds=4.0)
    for size in (len(content) // 2, 40):
        with pytest.raises(ValueError, match=r"damaged|cut off"):
            decode_audio({"path": None, "bytes": content[:size]})


def test_without_the_package_the_remedy_is_named(monkeypatch):
    content = encoded("adts", "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-av\.txt"):
        decode_audio({"path": None, "bytes": content})
