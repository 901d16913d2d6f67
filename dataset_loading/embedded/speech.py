"""Spoken sentences that need no download: the captions of `dataset_loading.embedded.scenes`, said by eSpeak NG.

    python -m dataset_loading.embedded.speech data/speech --limit 400

makes an audiofolder: `train/` and `test/` with FLAC files and a metadata.csv with the columns file_name, text and
speaker. A file is named after the scene that it describes, so that one item has an image, a text and a waveform;
the captions of the held-out scenes are in `test/`. Four voices take turns, each sentence a little slower or faster,
lower or higher than the last. The package `espeakng-loader` brings the program.
"""

import ctypes
import functools
import hashlib
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from dataset_loading.audio.signal import limit_peak, resample, trim_silence
from dataset_loading.embedded.openmoji import COLUMNS, build_once, run_command, write_splits
from dataset_loading.embedded.scenes import N_DRAWINGS, Scene, list_scenes
from model.text.espeak import UTF8, load_espeak

PACKAGE = f"espeakng-loader {version('espeakng-loader')}"
# fmt: off
VOICES = {                                                          # words per minute, pitch (0 to 99)
    "en-us":    (150, 45),
    "en-us+f3": (165, 55),
    "en-us+m7": (140, 40),
    "en-us+f2": (175, 65),
}
# fmt: on
TRIM_DB = 40.0  # Silence at both ends is cut to what `trim_silence` leaves.
STRIDE = 121  # Captions are taken in steps of this, which has no divisor in common with their number.

# Constants of eSpeak NG's speak_lib.h.
POSITION_CHARACTER = 1
RATE, PITCH = 1, 3


def build_speech(folder: str | Path, sample_rate: int = 16000, limit: int | None = None) -> dict[str, int]:
    """Write the set, or find that it is there already.

    Args:
        folder: the new folder; it appears when it is complete.
        sample_rate: in Hz; the voices have 22,050.
        limit: number of sentences, balanced over objects, grounds, places and voices; None means all.
    Returns: sentences per split.
    Raises: ValueError: the folder exists and is something else, or a set of another kind.
    """

    def write(temporary: Path) -> dict[str, int]:
        rows: dict[str, list[tuple[str, ...]]] = {"train": [], "test": []}
        for scene in mixed_scenes()[:limit]:
            rows[scene.split].append((f"{scene.name}.flac", scene.caption, voice_of(scene.name)))
        texts = {row[0]: row[1] for listed in rows.values() for row in listed}
        # One process speaks everything in turn, since a sentence depends a little on those before it.
        return write_splits(
            temporary, rows, partial(say, texts, sample_rate), columns=(*COLUMNS, "speaker"), n_workers=1
        )

    settings = {"package": PACKAGE, "sample_rate": sample_rate, "limit": limit}
    return build_once(Path(folder), settings, licence=LICENCE, write=write)


def mixed_scenes() -> list[Scene]:
    """`list_scenes` in an order whose beginning covers all objects, grounds, places and voices evenly.

    A round has each caption once; the next round has them with another voice.
    """
    scenes = list(list_scenes())
    n_captions = len(scenes) // N_DRAWINGS
    # Steps of STRIDE visit every caption once per round; the drawing changes with the position and with the round.
    places = [k * STRIDE % n_captions * N_DRAWINGS + (k + k // n_captions) % N_DRAWINGS for k in range(len(scenes))]
    return [scenes[place] for place in places]


def voice_of(name: str) -> str:
    """The voice of a scene, by the number of its drawing."""
    return list(VOICES)[int(name.rpartition("_")[2]) % len(VOICES)]


def say(texts: dict[str, str], sample_rate: int, target: Path) -> None:
    """Write one sentence as 16-bit FLAC, with rate and pitch that depend on its name."""
    voice = voice_of(target.stem)
    rate, pitch = VOICES[voice]
    # Up to 10 % slower or faster and 5 points lower or higher, seeded by the name.
    random = np.random.default_rng(int.from_bytes(hashlib.sha1(target.stem.encode()).digest()[:8], "big"))
    faster, higher = random.uniform(-1, 1, 2)
    speaker = load_speaker()
    spoken = speaker.speak(
        texts[target.name], voice, rate=round(rate * (1 + 0.1 * faster)), pitch=round(pitch + 5 * higher)
    )
    waveform = limit_peak(resample(spoken, speaker.sample_rate, sample_rate))
    soundfile.write(target, trim_silence(waveform, sample_rate, TRIM_DB).numpy(), sample_rate, subtype="PCM_16")


@functools.cache
def load_speaker() -> "Speaker":
    """The program, whose state is one per process."""
    return Speaker()


class Speaker:
    """eSpeak NG as a shared library; make one in a process only, by `load_speaker`.

    Attributes: sample_rate: of what it says, in Hz.
    Raises: OSError: the library does not find its data.
    """

    def __init__(self):
        self.library, self.sample_rate = load_espeak()
        self.pieces: list[np.ndarray] = []
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        # text, size, position, position type, end position, flags, identifier, user data
        self.library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self.receive)  # Kept, since the library keeps the pointer only.
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples, n_samples: int, events) -> int:
        """The callback of the library, which gets each piece of audio; returning 0 lets it continue."""
        if samples and n_samples > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return 0

    def speak(self, text: str, voice: str, *, rate: int, pitch: int) -> Tensor:
        """A sentence as (S,) float32 in [-1, 1].

        Args:
            voice: name of a language, followed by `+` and a variant.
            rate: words per minute.
            pitch: 0 to 99, 50 being the voice's own.
        Raises: ValueError: there is no such voice, or nothing was said.
        """
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(RATE, rate, 0)
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        # Breath noise is random; without a fixed seed it depends on the time at which the program starts.
        self.library.espeak_ng_SetRandSeed(1)
        self.pieces.clear()
        content = text.encode()
        self.library.espeak_Synth(content, len(content) + 1, 0, POSITION_CHARACTER, 0, UTF8, None, None)
        if not self.pieces:
            raise ValueError(f"eSpeak NG says nothing for {text!r}")
        # int16 -> float32 in [-1, 1), (S,).
        return torch.from_numpy(np.concatenate(self.pieces).astype(np.float32) / 32768)


LICENCE = f"""Synthetic speech by eSpeak NG; the audio is free of conditions.

Made with {PACKAGE} (https://github.com/espeak-ng/espeak-ng). The program is under GPL-3.0-or-later, which does not
extend to what the program says. The sentences are those of dataset_loading/embedded/scenes.py.
"""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    numbers = {
        "sample_rate": (16000, "sampling rate in Hz"),
        "limit": (None, "number of sentences, balanced over objects, grounds, places and voices"),
    }
    run_command(argv, build_speech, description=__doc__ or "", numbers=numbers)


if __name__ == "__main__":
    main()
