"""The phone HMM compared with eSpeak NG's own phone times, and the cost of fitting, aligning and searching.

    python benchmarks/alignment.py                              # captions of the embedded scenes
    python benchmarks/alignment.py --dataset_name my_speech     # the transcripts of a data set, spoken by eSpeak NG
    python benchmarks/alignment.py --vae_checkpoint runs/audio_vae/demo    # also the latents of an audio VAE
    python benchmarks/alignment.py --voices en-us en-us+f3      # texts in turn by several voices, one HMM and two

eSpeak NG speaks every text and reports when each phone begins. The HMM sees log-mels, or latents, and phones alone. An
error is the distance between the two beginnings of a phone. Synthetic speech is easier to align than recordings.
"""

import ctypes
import dataclasses
import itertools
import logging
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.audio.signal import AUDIO_SUFFIXES, resample
from dataset_loading.embedded.scenes import list_scenes
from dataset_loading.sources import open_source
from model.audio.alignment import PhoneHMM, latents_at_frames, monotonic_alignment
from model.audio.lengths import latents_to_sequence
from model.audio.speaker_aligners import SpeakerAligners
from model.audio.spectral import LogMel, MelSettings, check_same_mel
from model.text.espeak import DO_NOT_EXIT, SYNCHRONOUS_RETRIEVAL, UTF8
from model.text.phonemes import PAUSES, SpeechTokenizer, split_stress
from utils.checkpoints import resolve_checkpoint
from utils.command_line import explained_errors, parse_arguments
from utils.generation.latents import load_vae, standardized_posterior
from utils.options import option

# Constants of eSpeak NG's speak_lib.h.
PHONEME_EVENTS, PHONEME_EVENTS_IN_IPA = 1, 2
PHONEME_EVENT = 7
MILLISECONDS_BEYOND = (50, 100)


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    dataset_name: str = option("", "data set whose transcripts are spoken; default: captions of the embedded scenes")
    dataset_split: str = option("train", "its split")
    caption_column: str = option("transcription", "its column with the transcripts")
    limit: int = option(400, "number of texts, spread over all", gt=0)
    n_states: int = option(2, "states per phone", gt=0)
    n_passes: int = option(3, "rounds of estimation and alignment", gt=0)
    voices: list[str] = option(
        ["en-us"], "voices that speak the texts in turn, each with an HMM of its own if several"
    )
    vae_checkpoint: str = option("", "run or checkpoint folder of an audio VAE whose latents are aligned, too")
    threads: int = option(1, "CPU threads of torch", gt=0)


class Event(ctypes.Structure):
    """espeak_EVENT; `name` is the phone that begins."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "unique", "text_position", "length", "milliseconds", "sample")),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


def speak(texts: list[str], voices: list[str]) -> list[tuple[np.ndarray, int, list[tuple[str, int]]]]:
    """For each text the samples (S,) int16, their rate, and (phone, milliseconds at its beginning).

    Runs in a process of its own: the events must be asked for when eSpeak NG is initialised, once per process.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    options = PHONEME_EVENTS | PHONEME_EVENTS_IN_IPA | DO_NOT_EXIT
    rate = library.espeak_Initialize(SYNCHRONOUS_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), options)
    samples: list[np.ndarray] = []
    events: list[tuple[str, int]] = []

    def receive(data, n_samples, event) -> int:
        if data and n_samples > 0:
            samples.append(np.ctypeslib.as_array(data, (n_samples,)).copy())
        i = 0
        while event[i].type:  # A list that ends with type 0.
            if event[i].type == PHONEME_EVENT:
                events.append((event[i].name.decode(errors="ignore"), event[i].milliseconds))
            i += 1
        return 0

    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
    callback = signature(receive)
    library.espeak_SetSynthCallback(callback)
    spoken = []
    for text, voice in zip(texts, itertools.cycle(voices)):
        library.espeak_SetVoiceByName(voice.encode())
        samples.clear()
        events.clear()
        content = text.encode()
        size = ctypes.c_size_t(len(content) + 1)
        library.espeak_Synth(content, size, 0, 1, 0, UTF8, None, None)
        spoken.append((np.concatenate(samples), rate, list(events)))
    return spoken


def match(tokenizer: SpeechTokenizer, text: str, events: list[tuple[str, int]]) -> list[int] | None:
    """Milliseconds at the beginning of every phone of a text, None where eSpeak NG said other phones."""
    phones = [symbol for symbol, _, _ in tokenizer.split(text) if symbol not in PAUSES]
    said = [(symbol, start) for name, start in events if (symbol := split_stress(name)[0]) and symbol[0] not in " _:"]
    return [start for _, start in said] if [symbol for symbol, _ in said] == phones else None


def errors(hop_ms: float, tokens: Tensor, durations: Tensor, true: list[int], pauses: list[int]) -> Tensor:
    """Milliseconds between the aligned and the true beginning of each phone."""
    starts = (durations.cumsum(0) - durations) * hop_ms
    is_phone = ~torch.isin(tokens, torch.tensor(pauses))
    return (starts[is_phone] - torch.tensor(true, dtype=torch.float64)).abs()


def describe(name: str, distances: Tensor) -> None:
    """Print a row."""
    beyond = "  ".join(f"beyond {limit} ms {(distances > limit).double().mean():.3%}" for limit in MILLISECONDS_BEYOND)
    print(f"{name:14} mean {distances.mean():5.1f} ms  median {distances.median():5.1f} ms  {beyond}")


def read_texts(args: BenchmarkArguments) -> list[str]:
    """Texts spread over the data set."""
    if args.dataset_name:
        source = open_source(args.dataset_name, args.dataset_split, "audio", suffixes=AUDIO_SUFFIXES)
        texts = [row[args.caption_column] for _, row in source]
    else:
        texts = sorted({scene.caption for scene in list_scenes()})
    return texts[:: max(1, len(texts) // args.limit)][: args.limit]


@torch.inference_mode()
def latents_of(checkpoint: str, mels: list[Tensor], settings: MelSettings) -> list[Tensor]:
    """Latents (F, Z) of log-mels at their frames."""
    vae = load_vae(resolve_checkpoint(checkpoint), media="audio")
    remedy = "give a VAE of the preset 16k"
    check_same_mel(settings, vae.config.mel, first_name="the benchmark", second_name=checkpoint, remedy=remedy)
    means = [latents_to_sequence(standardized_posterior(vae, mel[None])[0])[0] for mel in mels]
    return [latents_at_frames(mean, mel.shape[1], vae.config.compression) for mean, mel in zip(means, mels)]


def main(args: BenchmarkArguments) -> None:
    """Speak, align, compare."""
    texts, settings = read_texts(args), MelSettings()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spoken = pool.apply(speak, (texts, args.voices))
    tokenizer, log_mel = SpeechTokenizer.fit(texts), LogMel(settings)
    # Clips whose phones are the same in both uses of eSpeak NG.
    clips = []
    for text, voice, (samples, rate, events) in zip(texts, itertools.cycle(args.voices), spoken):
        times = match(tokenizer, text, events)
        if times is not None:
            waveform = resample(torch.from_numpy(samples.astype(np.float32) / 32768), rate, settings.sample_rate)
            clips.append((log_mel(waveform[None])[0], tokenizer.encode(text)[:, 0], times, voice))
    mels, tokens, truth, voices = map(list, zip(*clips))
    seconds = sum(mel.shape[1] for mel in mels) * settings.hop_length / settings.sample_rate
    print(f"{len(clips)} of {len(texts)} clips, {seconds / 60:.1f} minutes, {sum(map(len, truth))} phones")

    # Fit and align, with the time of both: all voices together, each voice, latents.
    hop_ms, pauses = 1000 * settings.hop_length / settings.sample_rate, tokenizer.pauses

    def measure(name: str, audio: list[Tensor], speakers: list[str], **kind: Any) -> None:
        start = time.process_time()
        aligners = SpeakerAligners(PhoneHMM(len(tokenizer.symbols), pauses, args.n_states, **kind))
        aligners.fit(audio, tokens, speakers, min_frames=0, n_passes=args.n_passes)
        durations = aligners.align(audio, tokens, speakers).durations
        elapsed = time.process_time() - start
        rows = zip(tokens, durations, truth, strict=True)
        describe(name, torch.cat([errors(hop_ms, *row, pauses) for row in rows]))
        print(f"{'':14} {elapsed:.2f} CPU s, {1200 * elapsed / seconds:.2f} per 20 minutes of audio")

    measure("HMM", mels, [""] * len(mels))
    if len(args.voices) > 1:
        measure("HMM per voice", mels, voices)
    if args.vae_checkpoint:
        measure("HMM of latents", latents_of(args.vae_checkpoint, mels, settings), [""] * len(mels), inputs="latents")
    # Equal shares of a clip for all its phones.
    even = [torch.arange(len(times)) * mel.shape[1] / len(times) * hop_ms for mel, times in zip(mels, truth)]
    describe("equal shares", torch.cat([(row - torch.tensor(times)).abs() for row, times in zip(even, truth)]))

    # The batched search alone.
    scores = torch.randn(32, 200, 90)
    start = time.process_time()
    for _ in range(10):
        monotonic_alignment(scores, torch.full((32,), 90), torch.full((32,), 200))
    print(f"search of 32 x 200 frames x 90 tokens  {100 * (time.process_time() - start):.1f} CPU ms")


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    with explained_errors(logging.getLogger("benchmark")):
        main(arguments)
