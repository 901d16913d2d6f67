"""Audio signals: resampling, measuring, conditioning and writing of waveforms.  S samples."""

import functools
import logging
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import bandreject_biquad, highpass_biquad, loudness, treble_biquad
from torchaudio.transforms import Resample

from dataset_loading.audio.aac import AV_SUFFIXES
from dataset_loading.files import replacing
from utils.flags.choices import LoudnessMeasure

logger = logging.getLogger(__name__)

# fmt: off
AUDIO_SUFFIXES = frozenset((
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64",
    ".rf64", ".sph", ".nist", ".voc", ".avr", ".mat", ".sf", ".ircam", *AV_SUFFIXES,
))
# fmt: on
FULL_SCALE = 0.999  # A sample is taken for clipped from here on.
SILENCE_DB = -60.0  # A waveform whose loudest frame has less, in dBFS, is silent.
FRAME_SECONDS = 0.02  # Frames in which levels are measured.
MARGIN_SECONDS = 0.05  # What trimming leaves on both sides.
ACTIVE_DB = 30.0  # Frames that far below the loudest one are pauses.
NOTCH_HZ = 2.0  # Width of the notch at each harmonic of the hum.
NOTCH_LIMIT_HZ = 1000.0  # Hum has hardly any harmonics beyond, speech has many.
HEADROOM = 0.05  # Scale at which torchaudio's filters, which clip at full scale, see a waveform.
BLOCK_SECONDS = 0.4  # The shortest waveform whose loudness BS.1770 defines.
LONG_SAMPLES = 1 << 22  # Longer waveforms are measured and filtered in blocks.
SETTLE_SECONDS = 4.0  # By then the response of a filter has died away.
LUFS_GATE = -70.0  # BS.1770-4 measures nothing below.
MAX_RATIO = 1000  # Largest number in a ratio of sampling rates.


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """(..., S) at `rate` -> (..., ceil(S * target / rate)) at `target` Hz, by a windowed sinc.

    Rates whose ratio has no small terms are resampled by the nearest ratio that has, which is less than a hundredth of
    a semitone off.
    """
    if rate == target:
        return waveform
    ratio = rate_ratio(rate, target)
    return resampler(ratio.denominator, ratio.numerator)(waveform)


def rate_ratio(rate: int, target: int) -> Fraction:
    """target / rate, or the nearest fraction of terms that are small enough."""
    if target < rate:
        return 1 / Fraction(rate, target).limit_denominator(MAX_RATIO)
    return Fraction(target, rate).limit_denominator(MAX_RATIO)


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


class StreamResampler:
    """`resample` of a waveform that comes in blocks; one block alone gives the same numbers."""

    def __init__(self, rate: int, target: int):
        ratio = rate_ratio(rate, target)
        self.n_in, self.n_out, self.is_needed = ratio.denominator, ratio.numerator, rate != target
        self.resampler = resampler(self.n_in, self.n_out)
        # Samples on both sides that an output depends on, rounded up to whole steps.
        self.context = math.ceil((self.resampler.width + self.n_in) / self.n_in) * self.n_in if self.is_needed else 0

    def n_resampled(self, n_samples: int) -> int:
        """Number of samples that `n_samples` become."""
        return math.ceil(n_samples * self.n_out / self.n_in) if self.is_needed else n_samples

    def run(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Blocks (S,) of any lengths -> the resampled waveform in pieces."""
        if not self.is_needed:
            yield from blocks
            return
        # The buffer begins at sample `start`; what lies before sample `done` has been resampled. Both are whole steps.
        buffer, start, done = torch.zeros(0), 0, 0
        for block in blocks:
            # The last block is resampled with what is before it, so that one that is alone is not cut.
            if len(buffer):
                ready = (start + len(buffer) - self.context) // self.n_in * self.n_in
                if ready > done:
                    yield self.piece(buffer, done - start, ready - start)
                    kept = max(0, ready - self.context)
                    buffer, start, done = buffer[kept - start :].clone(), kept, ready
            buffer = torch.cat([buffer, block]) if len(buffer) else block
        yield self.piece(buffer, done - start, None)

    def piece(self, buffer: Tensor, first: int, last: int | None) -> Tensor:
        """What samples [first, last) of the buffer become, both whole steps; None: to its end."""
        stop = None if last is None else last // self.n_in * self.n_out
        return self.resampler(buffer)[first // self.n_in * self.n_out : stop]


# ---- Measuring.


class TooQuietError(ValueError):
    """A waveform is intact, but its loudness is not defined."""


def frame_levels(waveform: Tensor, rate: int) -> Tensor:
    """RMS in dBFS of the frames of FRAME_SECONDS, one after another; the last one may be shorter."""
    size = max(1, round(FRAME_SECONDS * rate))
    # Whole frames block by block, so that memory stays bounded.
    return torch.cat([block_levels(block, size) for block in waveform.split(LONG_SAMPLES // size * size)])


def block_levels(waveform: Tensor, size: int) -> Tensor:
    """`frame_levels` of frames of `size` samples."""
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
    Raises: TooQuietError: the loudness is not defined, since everything lies below the gate of BS.1770.
    """
    if measure == "active":
        return active_level(waveform, rate)
    repeats = math.ceil(BLOCK_SECONDS * rate / len(waveform)) + 1 if len(waveform) < BLOCK_SECONDS * rate else 1
    # The package's filters clip at full scale: the waveform is scaled down and the result shifted back.
    if len(waveform) > LONG_SAMPLES:
        level = gated_loudness(block_energies(waveform, rate)) - 20 * math.log10(HEADROOM)
    else:
        level = float(loudness(HEADROOM * waveform.repeat(repeats)[None], rate)) - 20 * math.log10(HEADROOM)
    if not math.isfinite(level):
        raise TooQuietError(f"too quiet: no part reaches {LUFS_GATE:g} LUFS, below which BS.1770 measures nothing")
    return level


def block_energies(waveform: Tensor, rate: int) -> Tensor:
    """Mean squares of the K-weighted waveform, scaled by HEADROOM, in blocks of BLOCK_SECONDS that overlap by three
    quarters (ITU-R BS.1770-4, annex 1), fp64. As `torchaudio.functional.loudness`, in bounded memory."""
    size = round(BLOCK_SECONDS * rate)
    step, context, energies = round(size / 4), round(SETTLE_SECONDS * rate), []
    n_blocks, n_at_once = (len(waveform) - size) // step + 1, max(1, LONG_SAMPLES // size)
    for start in range(0, n_blocks, n_at_once):
        stop = min(start + n_at_once, n_blocks)
        # The filters settle on what lies before the first block.
        first, last = start * step, (stop - 1) * step + size
        piece = HEADROOM * waveform[max(0, first - context) : last]
        piece = highpass_biquad(treble_biquad(piece, rate, 4.0, 1500.0, 0.5**0.5), rate, 38.0, 0.5)
        energies.append(piece[-(last - first) :].square().unfold(0, size, step).mean(1).double())
    return torch.cat(energies)


def gated_loudness(energies: Tensor) -> float:
    """Loudness in LUFS of block energies: the mean of those above -70 LUFS, then of those at most 10 LU below it."""
    levels = 10 * energies.log10() - 0.691
    audible = energies[levels > LUFS_GATE]
    gate = 10 * audible.mean().log10() - 0.691 - 10
    return float(10 * energies[(levels > LUFS_GATE) & (levels > gate)].mean().log10() - 0.691)


# ---- Conditioning.


def normalize_loudness(waveform: Tensor, rate: int, target_db: float, *, measure: LoudnessMeasure) -> Tensor:
    """Scale to a loudness; where the peaks would exceed full scale, only as far as they allow."""
    gain_db = target_db - measured_loudness(waveform, rate, measure)
    return limit_peak(waveform * 10 ** (gain_db / 20))


def limit_peak(waveform: Tensor) -> Tensor:
    """Scale down to full scale what exceeds it."""
    low, high = waveform.aminmax()
    peak = torch.maximum(-low, high)
    return waveform / peak if peak > 1 else waveform


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
    )
    # Long waveforms in blocks; what is within the reach of the filters at both sides of a block is cut off again.
    context, pieces = round(SETTLE_SECONDS * rate), []
    for start in range(pad, pad + len(waveform), LONG_SAMPLES):
        stop = min(start + LONG_SAMPLES, pad + len(waveform))
        first = max(0, start - context) if start > pad else 0
        last = stop + context if stop < pad + len(waveform) else len(extended)
        pieces.append(notched(extended[first:last], rate, harmonics)[start - first : stop - first])
    return torch.cat(pieces)


def notched(waveform: Tensor, rate: int, frequencies: list[float]) -> Tensor:
    """Notches of NOTCH_HZ at each frequency, without delay."""
    filtered = HEADROOM * waveform.double()  # The package's filters clip at full scale, between them too.
    for _ in range(2):  # Forward, then backward: no phase shift.
        for frequency in frequencies:
            filtered = bandreject_biquad(filtered, rate, frequency, Q=frequency / NOTCH_HZ)
        filtered = filtered.flip(0)
    return filtered.float() / HEADROOM


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


def fit_full_scale(waveform: Tensor) -> tuple[Tensor, float]:
    """A waveform (S,) within [-1, 1], scaled down as a whole where it exceeds that, and the gain, 1 where nothing
    did."""
    # The largest number of 24 bits is a little below 1.
    peak = waveform.abs().max().item() if len(waveform) else 0.0
    gain = 1.0 if peak <= 1 else (1 - 2**-23) / peak
    return waveform * gain, gain


def save_waveform(waveform: Tensor, sample_rate: int, file: Path) -> float:
    """Write (S,) as a 24-bit WAV file atomically; what exceeds [-1, 1] is scaled down as a whole, not clipped.

    Returns: the gain by which it was scaled, 1 where nothing exceeded.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fitting, gain = fit_full_scale(waveform)
    with replacing(file) as temporary:
        soundfile.write(temporary, fitting.numpy(), sample_rate, "PCM_24", format="WAV")
    if gain < 1:
        logger.warning("%s: peaks were %.2f times full scale; saved at a gain of %.3f", file, 1 / gain, gain)
    return gain
