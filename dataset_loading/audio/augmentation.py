"""Random changes of waveforms: speed, pitch, gain, noise.  S samples, (S,) float32."""

import dataclasses
import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset_loading.audio.signal import MAX_RATIO, limit_peak, resampler, sliding_energy

WINDOW_SECONDS = 0.05  # Length of the pieces that are overlapped; two periods of the lowest voices.
SEARCH_SECONDS = 0.0125  # Largest distance of a piece from its nominal position, to both sides.
SNR_RANGE_DB = 20.0  # Between the noisiest and the least noisy copies.


def time_stretch(waveform: Tensor, rate: int, speed: float) -> Tensor:
    """Play faster or slower at the same pitch: (S,) -> (round(S / speed),).

    WSOLA (Verhelst and Roelands 1993): overlapping pieces of the waveform, each taken near its nominal position where
    it continues the previous piece best. Waveforms stay natural, which those of a phase vocoder do not.

    Args:
        rate: samples per second.
        speed: above 1 faster.
    """
    # Pieces of `size` samples overlap by half, so that their Hann windows add up to one. Padding gives every piece
    # samples on both sides, also a shifted one.
    half, search = (max(1, round(seconds * rate)) for seconds in (WINDOW_SECONDS / 2, SEARCH_SECONDS))
    size, margin = 2 * half, half + search
    n_samples = max(1, round(len(waveform) / speed))
    n_pieces = math.ceil(n_samples / half) + 1
    source = F.pad(waveform, (margin, margin + size + search + int(half * speed)))
    # Overlap-add. `follower` is where in the source the piece begins that would continue the last one.
    norms = sliding_energy(source, size).add(1e-8).sqrt()
    window, result = torch.hann_window(size), waveform.new_zeros((n_pieces + 1) * half)
    follower = 0
    for piece in range(n_pieces):
        start = search + min(round(piece * half * speed), len(waveform))  # Its nominal position.
        if piece:  # Normalised cross-correlation with the follower, at 2 * search + 1 positions.
            candidates = source[start - search : start + search + size].unfold(0, size, 1)
            similarity = candidates @ source[follower : follower + size]
            start += int((similarity / norms[start - search : start + search + 1]).argmax()) - search
        result[piece * half : piece * half + size] += window * source[start : start + size]
        follower = min(start + half, len(source) - size)
    return result[half : half + n_samples]


def pitch_shift(waveform: Tensor, rate: int, semitones: float) -> Tensor:
    """Raise the pitch, and the formants with it, at the same speed; (S,) -> (S,)."""
    # Stretch by the factor at the same pitch, then resample back to the old length, which raises the pitch.
    factor = Fraction(2 ** (semitones / 12)).limit_denominator(MAX_RATIO // 4)
    if factor == 1:
        return waveform
    slower = time_stretch(waveform, rate, float(1 / factor))
    shifted = resampler(factor.numerator, factor.denominator)(slower)[: len(waveform)]
    return F.pad(shifted, (0, len(waveform) - len(shifted)))


def add_noise(waveform: Tensor, snr_db: float, generator: torch.Generator) -> Tensor:
    """Add white noise whose power is `snr_db` below that of the waveform."""
    noise = torch.randn(waveform.shape, generator=generator)
    power = waveform.square().mean() / noise.square().mean() * 10 ** (-snr_db / 10)
    return waveform + noise * power.sqrt()


@dataclasses.dataclass(frozen=True)
class AudioAugmentation:
    """Random changes of a waveform, each off at its default.

    Attributes:
        time_stretch: the speed is between 1 / (1 + time_stretch) and 1 + time_stretch.
        pitch_shift: largest shift in semitones.
        gain_db: largest gain, and attenuation, in dB; where peaks would exceed full scale, as far as they allow.
        noise_snr_db: smallest signal-to-noise ratio in dB; the largest is 20 dB more. None: no noise.
    """

    time_stretch: float = 0.0
    pitch_shift: float = 0.0
    gain_db: float = 0.0
    noise_snr_db: float | None = None

    def __call__(self, waveform: Tensor, rate: int, generator: torch.Generator) -> Tensor:
        """(S,) -> (S',), changed at random."""
        # Always four numbers in this order, so that one augmentation does not change the others.
        speed, pitch, gain, noise = (2 * torch.rand(4, generator=generator) - 1).tolist()
        if self.time_stretch:
            waveform = time_stretch(waveform, rate, (1 + self.time_stretch) ** speed)
        if self.pitch_shift:
            waveform = pitch_shift(waveform, rate, self.pitch_shift * pitch)
        if self.noise_snr_db is not None:
            waveform = add_noise(waveform, self.noise_snr_db + SNR_RANGE_DB * (noise + 1) / 2, generator)
        return limit_peak(waveform * 10 ** (self.gain_db * gain / 20))
