"""Pitch of speech: normalised cross-correlation and the path of minimum cost through its peaks.

    Talkin, "A robust algorithm for pitch tracking (RAPT)", in Speech Coding and Synthesis, 1995

S samples, F frames of 10 ms, N samples of a window, G lags, K candidates per frame.
"""

import dataclasses
import math

import torch
from torch import Tensor

from dataset_loading.audio.signal import resample

RATE = 16000  # Hz, at which pitch is measured
HOP = 160  # samples between frames: 10 ms
WINDOW = 400  # samples of the correlation window: 25 ms
F_MIN, F_MAX = 60.0, 550.0  # Hz
N_CANDIDATES = 8
NOISE_FLOOR = 1e-5  # energy added to every window, relative to the loudest one: noise at -50 dB has no pitch
LAG_WEIGHT = 0.3  # prefers the shorter of two lags with equal correlation
PEAK_SHARE = 0.3  # peaks lower than this share of the frame's highest one are no candidates
JUMP_COST = 2.0  # per unit of |ln(lag / previous lag)|
OCTAVE_COST = 0.35  # an octave costs as much as a jump with this |ln(lag / previous lag)|
SWITCH_COST = 0.15  # between voiced and unvoiced


@dataclasses.dataclass
class Pitch:
    """Output of `track_pitch`, one value per 10 ms.

    Attributes:
        f0: Hz, 0 where unvoiced, (F,) fp32.
        voiced: (F,) bool.
        periodicity: correlation of adjacent periods, (F,) fp32 in [0, 1].
    """

    f0: Tensor
    voiced: Tensor
    periodicity: Tensor


def normalized_cross_correlation(waveform: Tensor, n_lags: int) -> Tensor:
    """The correlation of each window with the window that starts some samples later (RAPT, eq. 2).

    Args: waveform: (S,) at `RATE`.
    Returns: (F, n_lags), F = ceil(S / HOP); column g belongs to a lag of g samples.
    """
    length = WINDOW + n_lags
    n_frames = -(-len(waveform) // HOP)
    lead = WINDOW // 2  # A frame's window is centred on its first sample.
    padded = torch.nn.functional.pad(waveform, (lead, n_frames * HOP + length - len(waveform)))
    frames = padded.unfold(0, length, HOP)[:n_frames].double()
    frames = frames - frames[:, :WINDOW].mean(1, keepdim=True)
    # Correlation by FFT, long enough that nothing wraps around: (F, n_lags).
    n_fft = 1 << (length + WINDOW - 1).bit_length()
    head = torch.fft.rfft(frames[:, :WINDOW], n_fft)
    products = torch.fft.irfft(head.conj() * torch.fft.rfft(frames, n_fft), n_fft)[:, :n_lags]
    # Energy of the window at every lag, as differences of cumulative sums.
    squares = torch.nn.functional.pad(frames.square().cumsum(1), (1, 0))
    energy = (squares[:, WINDOW:] - squares[:, :-WINDOW])[:, :n_lags].clamp_min(0)
    floor = NOISE_FLOOR * energy[:, 0].max() + torch.finfo(torch.float64).tiny
    return products / ((energy[:, :1] + floor) * (energy + floor)).sqrt()


def candidates(correlation: Tensor, first_lag: int) -> tuple[Tensor, Tensor]:
    """The highest peaks of each frame.

    Args: correlation: (F, G) for lags of 0 to G - 1 samples; lags below `first_lag` are left out.
    Returns: lags in samples (fractional, by parabolic interpolation) and heights, each (F, K); the height is 0 where
        there are fewer peaks.
    """
    left, middle, right = (
        correlation[:, first_lag - 1 : -2],
        correlation[:, first_lag:-1],
        correlation[:, first_lag + 1 :],
    )
    is_peak = (middle > left) & (middle >= right) & (middle > 0)
    highest = middle.clamp_min(0).amax(1, keepdim=True)
    heights, indices = torch.where(is_peak & (middle > PEAK_SHARE * highest), middle, 0.0).topk(N_CANDIDATES, dim=1)
    # The vertex of the parabola through each peak and its two neighbours.
    a, b, c = (values.gather(1, indices) for values in (left, middle, right))
    curvature = (2 * b - a - c).clamp_min(1e-12)
    shift = torch.where(heights > 0, 0.5 * (c - a) / curvature, 0.0).clamp(-0.5, 0.5)
    heights = torch.where(heights > 0, b + 0.25 * (c - a) * shift, 0.0).clamp(0, 1)
    return indices + first_lag + shift, heights


def cheapest_path(lags: Tensor, heights: Tensor) -> Tensor:
    """Dynamic programming (Viterbi) over the candidates and the unvoiced state.

    Args: lags, heights: (F, K), see `candidates`.
    Returns: (F,) int64, the candidate's index, or K where unvoiced.
    """
    # Local costs: a high peak at a short lag is a cheap candidate, a frame without high peaks is cheap as unvoiced.
    longest_lag = RATE / F_MIN
    voiced_cost = 1 - heights * (1 - LAG_WEIGHT * lags / longest_lag)
    voiced_cost = torch.where(heights > 0, voiced_cost, math.inf)
    local = torch.cat([voiced_cost, heights.amax(1, keepdim=True)], 1)  # (F, K + 1)
    # Transition costs: distance in log pitch, reduced for octave jumps; a constant between voiced and unvoiced.
    K = lags.shape[1]
    jumps = (lags[1:, :, None] / lags[:-1, None, :]).log().abs()  # (F - 1, to, from)
    jumps = torch.minimum(jumps, OCTAVE_COST + (jumps - math.log(2)).abs())
    steps = torch.full((max(len(lags) - 1, 0), K + 1, K + 1), SWITCH_COST, dtype=lags.dtype)
    steps[:, :K, :K] = JUMP_COST * jumps
    steps[:, K, K] = 0
    # Forward pass: the minimum cost of each state, and the state that it came from.
    total, back = local[0], []
    for cost, step in zip(local[1:], steps):
        best, origin = (total + step).min(1)
        total = best + cost
        back.append(origin)
    # Backward pass: follow the origins from the cheapest final state.
    path = [int(total.argmin())]
    for origin in reversed(back):
        path.append(int(origin[path[-1]]))
    return torch.tensor(path[::-1])


def track_pitch(waveform: Tensor, rate: int) -> Pitch:
    """The pitch of a clip, 60 to 550 Hz, every 10 ms. It does not depend on the level of the waveform.

    Args:
        waveform: (S,), S > 0.
        rate: Hz.
    Returns: F = ceil(seconds x 100) frames.
    """
    waveform = torch.as_tensor(waveform).float().cpu()
    waveform = resample(waveform, rate, RATE)
    # Correlation (F, G) -> candidates (F, K) -> one of them, or the unvoiced state, per frame.
    correlation = normalized_cross_correlation(waveform, int(RATE / F_MIN) + 2)
    lags, heights = candidates(correlation, int(RATE / F_MAX))
    path = cheapest_path(lags, heights)
    voiced = path < N_CANDIDATES
    chosen = path.clamp_max(N_CANDIDATES - 1)[:, None]
    f0 = torch.where(voiced, RATE / lags.gather(1, chosen)[:, 0], 0.0)
    # Unvoiced frames report their highest peak.
    periodicity = torch.where(voiced, heights.gather(1, chosen)[:, 0], heights.amax(1))
    return Pitch(f0.float(), voiced, periodicity.float())


def pitch_scores(generated: Pitch, target: Pitch) -> dict[str, float | None]:
    """Differences in pitch of a generated clip and its target (as in arXiv 2110.10139, with this tracker).

    Returns:
        voicing_f1: F1 score of the voiced frames, 1 is best; None where neither clip has any.
        periodicity_rmse: root mean square difference of the periodicity.
        f0_rmse_cents: over frames that are voiced in both clips, None where there are none.
    """
    F = min(len(generated.f0), len(target.f0))
    voiced, target_voiced = generated.voiced[:F], target.voiced[:F]
    n_voiced, both = int(voiced.sum() + target_voiced.sum()), voiced & target_voiced
    cents = 1200 * (generated.f0[:F][both] / target.f0[:F][both]).log2()  # 100 cents: a semitone
    return {
        "voicing_f1": 2 * int(both.sum()) / n_voiced if n_voiced else None,
        "periodicity_rmse": (generated.periodicity[:F] - target.periodicity[:F]).square().mean().sqrt().item(),
        "f0_rmse_cents": cents.square().mean().sqrt().item() if both.any() else None,
    }


def pitch_statistics(pitch: Pitch) -> dict[str, float | None]:
    """How high and how lively a clip is spoken.

    Returns:
        f0_mean_hz: mean over voiced frames in Hz.
        f0_std_semitones: std over voiced frames of the pitch in semitones, 12 log2(f0).
        Both are None with fewer than two voiced frames.
    """
    f0 = pitch.f0[pitch.voiced].double()
    if len(f0) < 2:
        return {"f0_mean_hz": None, "f0_std_semitones": None}
    return {"f0_mean_hz": f0.mean().item(), "f0_std_semitones": (12 * f0.log2()).std(correction=0).item()}
