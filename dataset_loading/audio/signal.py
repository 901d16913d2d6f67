"""Audio signals: decoding, resampling, conditioning and writing of waveforms.  S samples."""

import functools
import io
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import bandreject_biquad, loudness
from torchaudio.transforms import Resample

from dataset_loading.audio.aac import AV_SUFFIXES, decode_av, is_av
from dataset_loading.files import replacing
from dataset_loading.sources import read_media

# fmt: off
AUDIO_SUFFIXES = frozenset((
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64",
    ".rf64", ".sph", ".nist", ".voc", ".avr", ".mat", ".sf", ".ircam", *AV_SUFFIXES,
))
# fmt: on
LoudnessMeasure = Literal["active", "bs1770"]
FULL_SCALE = 0.999  # A sample is taken for clipped from here on.
SILENCE_DB = -60.0  # A waveform whose loudest frame has less, in dBFS, is silent.
FRAME_SECONDS = 0.02  # Frames in which levels are measured.
MARGIN_SECONDS = 0.05  # What trimming leaves on both sides.
ACTIVE_DB = 30.0  # Frames that far below the loudest one are pauses.
NOTCH_HZ = 2.0  # Width of the notch at each harmonic of the hum.
NOTCH_LIMIT_HZ = 1000.0  # Hum has hardly any harmonics beyond, speech has many.
HEADROOM = 0.05  # Scale at which torchaudio's filters, which clip at full scale, see a waveform.
BLOCK_SECONDS = 0.4  # The shortest waveform whose loudness BS.1770 defines.
MAX_RATIO = 1000  # Largest number in a ratio of sampling rates.
STREAMED_BYTES = 0x7FFF0000  # A length from here on is the placeholder of a program that did not know it.


# ---- Decoding.


class DecodedAudio(NamedTuple):
    """All channels of a file, (channels, S) float32, and the sampling rate in Hz."""

    samples: Tensor
    sample_rate: int


def decode_audio(media: dict[str, Any] | None) -> DecodedAudio:
    """Decode a whole file of any format that libsndfile reads.

    Args: media: `{"path": ..., "bytes": ...}`, see `read_media`.
    Raises: OSError, ValueError: the file is missing, damaged, cut off, or no audio; the message says which.
    """
    buffer = read_media(media)
    n_bytes = buffer.getbuffer().nbytes
    if is_av(bytes(buffer.getbuffer()[:8])):
        return DecodedAudio(*decode_av(buffer))
    try:
        with soundfile.SoundFile(ClampedSeekFile(buffer.getbuffer())) as file:
            n_frames, rate, log, kind = file.frames, file.samplerate, file.extra_info, file.format
            samples = torch.from_numpy(file.read(dtype="float32", always_2d=True)).T
    except soundfile.LibsndfileError as error:
        raise ValueError(f"no audio of a known format, or damaged ({n_bytes} bytes): {error.error_string}") from error
    if samples.shape[1] == 0:
        raise ValueError(f"no samples in a file of {n_bytes} bytes")
    if samples.shape[1] != n_frames and not (kind == "MP3" and is_length_guessed(buffer.getvalue())):
        raise ValueError(f"damaged: {samples.shape[1]} of {n_frames} samples can be read")
    # libsndfile reads what is there of a file that was cut off, and mentions both sizes in its log alone.
    sizes = re.search(r"(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", log)
    n_promised, n_present = map(int, sizes.groups()) if sizes else (0, 0)
    if n_present < n_promised < STREAMED_BYTES:
        raise ValueError(f"cut off: {n_present} of {n_promised} bytes of samples are there")
    if not samples.isfinite().all():
        raise ValueError("damaged: samples that are no finite numbers")
    return DecodedAudio(samples, rate)


def is_length_guessed(content: bytes) -> bool:
    """Whether an MP3 file lacks the header that tells its length, which libsndfile then guesses from its size."""
    # The header follows the tag, whose size has 7 bits a byte and leaves out its own 10 bytes.
    size = sum(byte << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0)))
    start = 10 + size if content.startswith(b"ID3") else 0
    return not any(name in content[start : start + 256] for name in (b"Xing", b"Info", b"VBRI"))


class ClampedSeekFile(io.BytesIO):
    """A file in memory that answers a seek before its beginning with the beginning, since some decoders try it."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.getbuffer().nbytes}[whence]
        return super().seek(max(0, base + offset))


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """(..., S) at `rate` -> (..., ceil(S * target / rate)) at `target` Hz, by a windowed sinc.

    Rates whose ratio has no small terms are resampled by the nearest ratio that has, which is less than a hundredth of
    a semitone off.
    """
    if rate == target:
        return waveform
    if target < rate:
        ratio = 1 / Fraction(rate, target).limit_denominator(MAX_RATIO)
    else:
        ratio = Fraction(target, rate).limit_denominator(MAX_RATIO)
    return resampler(ratio.denominator, ratio.numerator)(waveform)


@functools.lru_cache(maxsize=16)
def resampler(rate: int, target: int) -> Resample:
    """A Kaiser-windowed sinc of 64 zero crossings a side, flat to 0.95 of the band."""
    return Resample(
        rate,
        target,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
    )


# ---- Measuring.


def frame_levels(waveform: Tensor, rate: int) -> Tensor:
    """RMS in dBFS of the frames of FRAME_SECONDS, one after another; the last one may be shorter."""
    size = max(1, round(FRAME_SECONDS * rate))
    n_frames = math.ceil(len(waveform) / size)
    power = F.pad(waveform.square(), (0, n_frames * size - len(waveform))).view(n_frames, size).sum(1)
    # The last frame is averaged over its own samples, not over the padding.
    counts = torch.full((n_frames,), float(size))
    counts[-1] = len(waveform) - (n_frames - 1) * size
    return 10 * (power / counts).clamp_min(1e-20).log10()


def sliding_energy(waveform: Tensor, size: int) -> Tensor:
    """Sums of squares of all windows of `size` samples, (S - size + 1,)."""
    # Differences of cumulative sums, in double precision, since they cancel.
    sums = F.pad(waveform.double().square().cumsum(0), (1, 0))
    return (sums[size:] - sums[:-size]).clamp_min(0).float()


def is_silent(waveform: Tensor, rate: int) -> bool:
    """Whether no frame reaches SILENCE_DB."""
    return bool(frame_levels(waveform, rate).max() < SILENCE_DB)


def clipped_share(samples: Tensor) -> float:
    """Share of samples at full scale, of the channel with the largest one; (channels, S)."""
    return float((samples.abs() >= FULL_SCALE).float().mean(-1).max())


def active_level(waveform: Tensor, rate: int) -> float:
    """RMS in dBFS of the frames that are at most ACTIVE_DB below the loudest one, so that pauses do not count."""
    levels = frame_levels(waveform, rate)
    active = levels[levels >= levels.max() - ACTIVE_DB]
    return float(10 * (10 ** (active / 10)).mean().log10())


def measured_loudness(waveform: Tensor, rate: int, measure: LoudnessMeasure) -> float:
    """Loudness in dB.

    Args:
        measure: "active" is `active_level` in dBFS, "bs1770" the gated loudness of ITU-R BS.1770-4 in LUFS; a
            waveform shorter than its blocks is measured as if it were repeated.
    """
    if measure == "active":
        return active_level(waveform, rate)
    repeats = math.ceil(BLOCK_SECONDS * rate / len(waveform)) + 1 if len(waveform) < BLOCK_SECONDS * rate else 1
    # The package's filters clip at full scale: the waveform is scaled down and the result shifted back.
    return float(loudness(HEADROOM * waveform.repeat(repeats)[None], rate)) - 20 * math.log10(HEADROOM)


# ---- Conditioning.


def normalize_loudness(waveform: Tensor, rate: int, target_db: float, *, measure: LoudnessMeasure) -> Tensor:
    """Scale to a loudness; where the peaks would exceed full scale, only as far as they allow."""
    gain_db = target_db - measured_loudness(waveform, rate, measure)
    return limit_peak(waveform * 10 ** (gain_db / 20))


def limit_peak(waveform: Tensor) -> Tensor:
    """Scale down to full scale what exceeds it."""
    return waveform / waveform.abs().max().clamp_min(1.0)


def trim_silence(waveform: Tensor, rate: int, trim_db: float) -> Tensor:
    """Cut off both ends where frames are more than `trim_db` below the loudest one, but for MARGIN_SECONDS."""
    levels = frame_levels(waveform, rate)
    # From MARGIN_SECONDS before the first loud frame to MARGIN_SECONDS after the last.
    loud = (levels >= levels.max() - trim_db).nonzero()[:, 0]
    size, margin = max(1, round(FRAME_SECONDS * rate)), round(MARGIN_SECONDS * rate)
    start, stop = int(loud[0]) * size - margin, (int(loud[-1]) + 1) * size + margin
    return waveform[max(0, start) : stop]


def remove_hum(waveform: Tensor, rate: int, mains_hz: float) -> Tensor:
    """Notches of NOTCH_HZ at the frequency of the mains and its harmonics up to NOTCH_LIMIT_HZ, without delay."""
    harmonics = [mains_hz * n for n in range(1, 1 + int(min(NOTCH_LIMIT_HZ, 0.49 * rate) / mains_hz))]
    pad = min(len(waveform) - 1, rate // 2)
    # Point reflection at both ends gives the filters half a second to settle.
    extended = torch.cat(
        [2 * waveform[0] - waveform[1 : pad + 1].flip(0), waveform, 2 * waveform[-1] - waveform[-pad - 1 : -1].flip(0)]
    ).double()
    extended = HEADROOM * extended  # The package's filters clip at full scale, between them too.
    for _ in range(2):  # Forward, then backward: no phase shift.
        for frequency in harmonics:
            extended = bandreject_biquad(extended, rate, frequency, Q=frequency / NOTCH_HZ)
        extended = extended.flip(0)
    return extended[pad : pad + len(waveform)].float() / HEADROOM


def cut_at_pauses(waveform: Tensor, rate: int, max_samples: int) -> list[Tensor]:
    """Cut a long waveform into pieces of at most `max_samples`, and at least a third of that, at its quietest places.

    The pieces joined are the waveform.
    """
    size = max(1, round(FRAME_SECONDS * rate))
    pieces = []
    while len(waveform) > max_samples:
        left = len(waveform)
        # The range of the cut: a piece is at least half the maximum; of the last two, each a third of the rest.
        first, last = (max_samples // 2, max_samples) if left > 1.5 * max_samples else (left // 3, left - left // 3)
        window = min(size, last - first)
        place = first + int(sliding_energy(waveform[first:last], window).argmin()) + window // 2
        pieces.append(waveform[:place])
        waveform = waveform[place:]
    return [*pieces, waveform]


def save_waveform(waveform: Tensor, sample_rate: int, file: Path) -> float:
    """Write (S,) in [-1, 1] as a 16-bit WAV file atomically.

    Returns: the share of samples beyond [-1, 1], which are cut off there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        soundfile.write(temporary, waveform.clamp(-1, 1).numpy(), sample_rate, "PCM_16", format="WAV")
    return (waveform.abs() > 1).float().mean().item()
