"""Functions of preprocessing and metrics compared with those of librosa and torchaudio: quality, and CPU seconds.

    python benchmarks/libraries/audio.py                            # signals whose truth is known
    python benchmarks/libraries/audio.py --dataset_name my_speech   # also recordings

Tones, glides, clicks and pauses have a known truth. The log-mel of a stretched recording should be that of the
recording with its time axis stretched; what is stretched or shifted there and back should be the recording (PESQ,
STOI); and the pitch of a shifted one is the recording's, shifted. S samples, F frames.
"""

import dataclasses
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
import torchaudio
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.timing import cpu_seconds
from dataset_loading.audio.augmentation import pitch_shift, time_stretch
from dataset_loading.audio.recording import read_recording
from dataset_loading.audio.signal import AUDIO_SUFFIXES, cut_at_pauses, frame_levels, trim_silence
from dataset_loading.cached import evenly_spaced
from dataset_loading.sources import open_source
from model.audio.spectral import LogMel, MelSettings
from utils.command_line import explained_errors, parse_arguments
from utils.metrics.audio import mel_l1, pesq_wb, stoi
from utils.metrics.pitch import F_MAX, F_MIN, track_pitch
from utils.options import option

RATE, HOP = 16000, 160  # Hz; samples between the frames of pitch, 10 ms
SPEEDS = (0.8, 0.9, 1.1, 1.25)
SEMITONES = (-4.0, -2.0, 2.0, 4.0)
TOP_DB = 40.0


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    dataset_name: str = option("", "data set of recordings; default: signals whose truth is known alone")
    dataset_split: str = option("test", "its split")
    limit: int = option(16, "number of recordings, spread over all", gt=0)


def numpy_function(function: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """A function of arrays as one of tensors."""
    return lambda waveform, *values: torch.from_numpy(np.asarray(function(waveform.numpy(), *values))).float()


# ---- Both sides of every function.


def ours_f0(waveform: Tensor) -> Tensor:
    return track_pitch(waveform, RATE).f0


@numpy_function
def pyin_f0(waveform: np.ndarray) -> np.ndarray:
    return librosa.pyin(waveform, fmin=F_MIN, fmax=F_MAX, sr=RATE, frame_length=1024, hop_length=HOP, fill_na=0.0)[0]


@numpy_function
def yin_f0(waveform: np.ndarray) -> np.ndarray:
    return librosa.yin(waveform, fmin=F_MIN, fmax=F_MAX, sr=RATE, frame_length=1024, hop_length=HOP)


def torchaudio_f0(waveform: Tensor) -> Tensor:
    return torchaudio.functional.detect_pitch_frequency(waveform[None], RATE, 0.01, freq_low=F_MIN, freq_high=F_MAX)[0]


F0 = {"ours": ours_f0, "librosa.pyin": pyin_f0, "librosa.yin": yin_f0, "torchaudio": torchaudio_f0}


def vocoder_stretch(waveform: Tensor, speed: float) -> Tensor:
    """torchaudio's phase vocoder at librosa's frames."""
    window = torch.hann_window(2048)
    spectrum = torch.stft(waveform, 2048, 512, window=window, return_complex=True)
    advance = torch.linspace(0, math.pi * 512, 1025)[:, None]
    stretched = torchaudio.functional.phase_vocoder(spectrum, speed, advance)
    return torch.istft(stretched, 2048, 512, window=window, length=round(len(waveform) / speed))


STRETCH = {
    "ours": lambda waveform, speed: time_stretch(waveform, RATE, speed),
    "librosa": numpy_function(lambda waveform, speed: librosa.effects.time_stretch(waveform, rate=speed)),
    "torchaudio": vocoder_stretch,
}
SHIFT = {
    "ours": lambda waveform, semitones: pitch_shift(waveform, RATE, semitones),
    "librosa": numpy_function(lambda waveform, n: librosa.effects.pitch_shift(waveform, sr=RATE, n_steps=n)),
}  # torchaudio's builds a resampling kernel of coprime rates at every call: 5 to 12 s for half a second of audio
TRIM = {
    "ours": lambda waveform: trim_silence(waveform, RATE, TOP_DB),
    "librosa": numpy_function(
        lambda waveform: librosa.effects.trim(waveform, top_db=TOP_DB, frame_length=640, hop_length=160)[0]
    ),
    "librosa, defaults": numpy_function(lambda waveform: librosa.effects.trim(waveform, top_db=TOP_DB)[0]),
}


def cut_between_intervals(waveform: Tensor, max_samples: int) -> list[Tensor]:
    """Pieces of at most `max_samples` where librosa's intervals allow it: cut in the middle of its pauses."""
    intervals = librosa.effects.split(waveform.numpy(), top_db=TOP_DB, frame_length=640, hop_length=160)
    places = [(int(left[1]) + int(right[0])) // 2 for left, right in zip(intervals, intervals[1:])]
    cuts = [0]
    for place, following in zip(places, [*places[1:], len(waveform)]):
        if following - cuts[-1] > max_samples:  # The last pause before the piece is too long.
            cuts.append(place)
    return list(waveform.tensor_split(cuts[1:]))


SPLIT = {"ours": lambda waveform, limit: cut_at_pauses(waveform, RATE, limit), "librosa": cut_between_intervals}


# ---- Signals whose truth is known.


def glide(
    seconds: float, low: float = 80.0, high: float = 400.0, snr_db: float | None = None
) -> tuple[Tensor, Tensor]:
    """Five harmonics of a pitch that rises exponentially, and the pitch of each frame in Hz."""
    time = torch.arange(round(seconds * RATE), dtype=torch.float64) / RATE
    f0 = low * (high / low) ** (time / seconds)
    phase = 2 * math.pi * torch.cumsum(f0, 0) / RATE
    waveform = 0.3 * sum((torch.sin(k * phase) / k for k in range(1, 6)), torch.zeros_like(phase)).float()
    if snr_db is not None:
        noise = torch.randn(waveform.shape, generator=torch.Generator().manual_seed(0))
        waveform = waveform + noise * waveform.std() * 10 ** (-snr_db / 20)
    return waveform, f0[::HOP].float()


def phrases(n: int, floor_db: float) -> tuple[Tensor, list[tuple[int, int]]]:
    """`n` tones of 1 to 2 s with pauses of 0.3 s over a noise floor, and the samples at which each pause lies."""
    generator, pieces, pauses, place = torch.Generator().manual_seed(0), [], [], 0
    for _ in range(n):
        seconds = 1 + torch.rand((), generator=generator).item()
        pieces += [glide(seconds, 120, 180)[0], torch.zeros(round(0.3 * RATE))]
        place += len(pieces[-2])
        pauses.append((place, place := place + len(pieces[-1])))
    waveform = torch.cat(pieces)
    noise = torch.randn(waveform.shape, generator=generator)
    return waveform + noise * waveform.std() * 10 ** (floor_db / 20), pauses


def f0_of_glides(track: Callable[[Tensor], Tensor], snr_db: float | None) -> str:
    """Median error in cents and share of frames that are more than a semitone off, without the ends."""
    waveform, truth = glide(4.0, snr_db=snr_db)
    f0 = track(waveform)[: len(truth)]
    cents = 1200 * (f0.clamp_min(1.0) / truth[: len(f0)]).log2().abs()[10:-10]
    return f"{cents.median():6.1f} cents, {(cents > 100).float().mean():6.1%} gross"


def voicing(track: Callable[[Tensor], Tensor]) -> str:
    """F1 score of the voiced frames of tones between noise and silence."""
    tone, noise = glide(1.0)[0], 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(1))
    f0 = track(torch.cat([tone, noise, tone, torch.zeros(RATE)]))
    voiced, truth = f0[:400] > 0, torch.tensor([True, False, True, False]).repeat_interleave(100)[: len(f0)]
    return f"F1 {2 * (voiced & truth).sum() / (voiced.sum() + truth.sum()):.3f}"


def tone_error(change: Callable[[Tensor, float], Tensor], values: tuple[float, ...], is_shift: bool) -> str:
    """Largest error of the pitch of a changed 330 Hz tone in cents, by a zero-padded spectrum."""
    tone, worst = torch.sin(2 * math.pi * 330 * torch.arange(2 * RATE) / RATE), 0.0
    for value in values:
        inner = change(tone, value)[4000:-4000]
        peak = torch.fft.rfft(inner * torch.hann_window(len(inner)), 1 << 19).abs().argmax().item() * RATE / (1 << 19)
        worst = max(worst, abs(1200 * math.log2(peak / 330) - (100 * value if is_shift else 0)))
    return f"{worst:5.2f} cents"


def click_sharpness(stretch: Callable[[Tensor, float], Tensor]) -> str:
    """Of the energy around each stretched click: share in its loudest 2 ms, and distance of these from their place."""
    clicks, n, shares, distances = torch.zeros(2 * RATE), RATE // 4, [], []
    clicks[n // 2 :: n] = 1.0
    for speed in SPEEDS:
        energy = stretch(clicks, speed).square()
        for place in (torch.arange(n // 2, 2 * RATE, n) / speed).long().tolist():
            around = energy[max(0, place - 1000) : place + 1000]
            loudest = around.unfold(0, 32, 1).sum(1).argmax().item()
            shares.append((around[loudest : loudest + 32].sum() / around.sum()).item())
            distances.append(abs(max(0, place - 1000) + loudest + 16 - place) * 1000 / RATE)
    return f"{statistics.fmean(shares):.0%} in 2 ms, {statistics.fmean(distances):.1f} ms off"


def trim_errors(trim: Callable[[Tensor], Tensor], floor_db: float) -> str:
    """Samples of a tone between noise that are missing, and kept milliseconds of noise."""
    tone, generator = glide(1.0, 120, 180)[0], torch.Generator().manual_seed(0)
    before, after = torch.zeros(7777), torch.zeros(9999)
    waveform = torch.cat([before, tone, after])
    waveform = waveform + torch.randn(waveform.shape, generator=generator) * tone.std() * 10 ** (floor_db / 20)
    return f"{1000 * (len(trim(waveform)) - len(tone)) / RATE:7.1f} ms too long"


def split_quality(split: Callable[[Tensor, int], list[Tensor]], floor_db: float) -> str:
    """Share of the cuts that lie in a pause, and of the pieces that are longer than the limit."""
    waveform, pauses = phrases(20, floor_db)
    pieces = split(waveform, 5 * RATE)
    cuts = torch.tensor([len(piece) for piece in pieces]).cumsum(0)[:-1].tolist()
    inside = [any(low <= cut <= high for low, high in pauses) for cut in cuts]
    too_long = sum(len(piece) > 5 * RATE for piece in pieces) / len(pieces)
    return f"{sum(inside) / max(len(inside), 1):.0%} of {len(cuts)} cuts in pauses, {too_long:.0%} of pieces too long"


# ---- Recordings.


def mean(values: list[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def f0_of_recordings(track: Callable[[Tensor], Tensor], clips: list[Tensor]) -> str:
    """Median distance from pYIN in cents, and share of frames voiced in both that are more than a semitone off."""
    cents = []
    for clip in clips:
        f0, other = track(clip), pyin_f0(clip)
        n = min(len(f0), len(other))
        both = (f0[:n] > 0) & (other[:n] > 0)
        cents.append(1200 * (f0[:n][both] / other[:n][both]).log2().abs())
    distances = torch.cat(cents)
    return f"{distances.median():.1f} cents from pyin, {(distances > 100).float().mean():.1%} gross"


def stretched_quality(stretch: Callable[[Tensor, float], Tensor], clips: list[Tensor]) -> str:
    """Distance of log-mels from the recording's own, interpolated in time; PESQ and STOI after there and back."""
    log_mel, distances, scores = LogMel(MelSettings()), [], []
    for clip in clips:
        mel = log_mel(clip[None])
        for speed in SPEEDS:
            stretched = stretch(clip, speed)
            result = log_mel(stretched[None])
            expected = torch.nn.functional.interpolate(mel, result.shape[-1], mode="linear")
            distances.append(mel_l1(result[0], expected[0]))
        back = stretch(stretch(clip, 1.1), 1 / 1.1)
        scores.append((pesq_wb(back, clip, RATE), stoi(back, clip, RATE)))
    pesq, intelligibility = zip(*scores)
    return f"mel-L1 {mean(distances):.3f}, PESQ {mean([*pesq]):.2f}, STOI {mean([*intelligibility]):.3f}"


def shifted_quality(shift: Callable[[Tensor, float], Tensor], clips: list[Tensor]) -> str:
    """Error of the pitch of shifted recordings, by pYIN; PESQ after there and back."""
    errors, scores = [], []
    for clip in clips:
        truth = pyin_f0(clip)
        for semitones in (-2.0, 2.0):
            f0 = pyin_f0(shift(clip, semitones))
            n = min(len(f0), len(truth))
            both = (f0[:n] > 0) & (truth[:n] > 0)
            cents = 1200 * (f0[:n][both] / truth[:n][both]).log2() - 100 * semitones
            errors.append(cents.abs().median().item())
        scores.append(pesq_wb(shift(shift(clip, 2.0), -2.0), clip, RATE))
    return f"{mean([*errors]):.1f} cents, PESQ {mean(scores):.2f}"


def cut_levels(split: Callable[[Tensor, int], list[Tensor]], clips: list[Tensor]) -> str:
    """Level of the 20 ms around each cut of the joined recordings below their loudest frame; pieces beyond 4 s."""
    waveform = torch.cat(clips)
    pieces, top = split(waveform, 4 * RATE), frame_levels(waveform, RATE).max().item()
    cuts = torch.tensor([len(piece) for piece in pieces]).cumsum(0)[:-1].tolist()
    levels = [top - frame_levels(waveform[cut - 160 : cut + 160], RATE).max().item() for cut in cuts]
    too_long = sum(len(piece) > 4 * RATE for piece in pieces)
    return f"{min(levels):.0f} dB or more below ({len(cuts)} cuts), {too_long} pieces too long"


def compare(title: str, sides: dict[str, Any], quality: Callable[[Any], str], run: Callable[[Any], object]) -> None:
    """Print quality and CPU seconds of each side; the fastest of five calls after the first."""
    for name, function in sides.items():
        run(function)  # librosa compiles
        seconds = min(cpu_seconds(lambda function=function: run(function)) for _ in range(5))
        print(f"{title:34} {name:18} {quality(function):62} {1000 * seconds:9.2f} CPU ms", flush=True)


def read_clips(args: BenchmarkArguments) -> list[Tensor]:
    """Recordings at RATE."""
    source = open_source(args.dataset_name, args.dataset_split, "audio", suffixes=AUDIO_SUFFIXES)
    rows = [row["audio"] for _, row in source]
    return [read_recording(rows[i], RATE)[0] for i in evenly_spaced(len(rows), args.limit)]


def main(args: BenchmarkArguments) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    four = glide(4.0)[0]
    for snr_db in (None, 10.0):
        title = "F0 of a glide" + ("" if snr_db is None else f", {snr_db:g} dB SNR")
        compare(title, F0, lambda track, snr_db=snr_db: f0_of_glides(track, snr_db), lambda track: track(four))
    compare("voicing", F0, voicing, lambda track: track(four))
    for floor_db in (-60.0, -45.0):
        compare(
            f"trimming, floor {floor_db:g} dB",
            TRIM,
            lambda trim, floor=floor_db: trim_errors(trim, floor),
            lambda trim: trim(four),
        )
    for floor_db in (-60.0, -30.0):
        minute = phrases(20, floor_db)[0]
        compare(
            f"splitting, floor {floor_db:g} dB",
            SPLIT,
            lambda split, floor=floor_db: split_quality(split, floor),
            lambda split, minute=minute: split(minute, 5 * RATE),
        )
    compare("stretching a tone", STRETCH, lambda f: tone_error(f, SPEEDS, False), lambda f: f(four, 1.1))
    compare("stretching clicks", STRETCH, click_sharpness, lambda f: f(four, 1.1))
    compare("shifting a tone", SHIFT, lambda f: tone_error(f, SEMITONES, True), lambda f: f(four, 2.0))
    if args.dataset_name:
        clips = read_clips(args)
        compare("F0 of recordings", F0, lambda track: f0_of_recordings(track, clips), lambda track: track(four))
        joined = torch.cat(clips)[: 4 * RATE]
        compare("stretching recordings", STRETCH, lambda f: stretched_quality(f, clips), lambda f: f(joined, 1.1))
        compare("shifting recordings", SHIFT, lambda f: shifted_quality(f, clips), lambda f: f(joined, 2.0))
        compare("splitting recordings", SPLIT, lambda f: cut_levels(f, clips), lambda f: f(joined, RATE))


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    with explained_errors(logging.getLogger("benchmark")):
        main(arguments)
