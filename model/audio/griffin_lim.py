"""Log-mel to waveform without training: the baseline that every table of the audio line shows.  B batch, M mel bins,
F frames, K frequency bins, S samples."""

import torch
from torch import Tensor

from model.audio.spectral import MelSettings, Spectrogram, mel_filters
from model.layers import to_device


def mel_to_magnitude(
    amplitude: Tensor, filters: Tensor, spread: Tensor, *, n_iterations: int, start: Tensor
) -> Tensor:
    """Magnitudes whose mel is near a given one, by multiplicative updates of the Kullback-Leibler divergence, which
    keep them positive (Lee and Seung, 2000, eq. 5): a bin is multiplied by the mean of what its filters lack.

    Args:
        amplitude: the exponential of a log-mel, (B, F, M).
        filters: (M, K).
        spread: see `inversion_matrices`, (K, M).
        n_iterations: updates.
        start: positive magnitudes, (B, F, K).
    Returns: (B, F, K).
    """
    # The factor filters.sum(1) undoes the division by it in `spread`.
    target = amplitude * filters.sum(1)
    magnitude = start
    for _ in range(n_iterations):
        current = (magnitude @ filters.T).clamp_min_(1e-10)  # mel of the magnitudes, (B, F, M)
        # magnitude_k *= sum_m filter_mk (amplitude_m / current_m) / sum_m filter_mk.
        magnitude = (current.reciprocal_().mul_(target) @ spread.T).mul_(magnitude)
    return magnitude


def mel_gain(magnitude: Tensor, amplitude: Tensor, *, filters: Tensor, spread: Tensor) -> Tensor:
    """What to multiply magnitudes by so that their mel comes nearer to a given one: the factors of one update of
    `mel_to_magnitude`, at most tenfold where hardly anything is there.

    Args:
        magnitude: (B, F, K).
        amplitude, filters, spread: as of `mel_to_magnitude`.
    Returns: (B, F, K).
    """
    current = torch.maximum(magnitude @ filters.T, 0.1 * amplitude)  # 0.1: at most tenfold
    return (amplitude / current * filters.sum(1)) @ spread.T


def starting_magnitude(amplitude: Tensor, inverse: Tensor, spread: Tensor) -> Tensor:
    """Positive magnitudes to start from: the least-squares inverse, nowhere under a fifth of the smooth envelope.

    Args:
        amplitude: the exponential of a log-mel, (B, F, M).
        inverse: pseudo-inverse of the filters, (K, M).
        spread: bins as weighted means of the filters over them, (K, M).
    Returns: (B, F, K).
    """
    # The least-squares inverse can be negative, the envelope cannot.
    return torch.maximum(amplitude @ inverse.T, 0.2 * (amplitude @ spread.T)).clamp_min(1e-6)


def inversion_matrices(settings: MelSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Filters (M, K), their pseudo-inverse (K, M), and the smooth envelope's weights (K, M)."""
    filters = mel_filters(settings)
    # Shares of the filters over each bin, (M, K); then amplitudes become mean magnitudes of a filter.
    weights = filters / filters.sum(0, keepdim=True).clamp_min(1e-8)
    return filters, torch.linalg.pinv(filters), (weights / filters.sum(1, keepdim=True).clamp_min(1e-8)).T.contiguous()


@torch.no_grad()
def griffin_lim(
    mel: Tensor,
    settings: MelSettings,
    n_iterations: int = 60,
    *,
    momentum: float = 0.99,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fast Griffin-Lim (Perraudin et al. 2013) from random phases, on magnitudes by 50 multiplicative updates.

    Args:
        mel: log-mel, (B, M, F).
        generator: of the random phases, on the CPU; None seeds one with 0.
    Returns: (B, F * hop_length) fp32.
    """
    filters, inverse, spread = (to_device(matrix, mel.device) for matrix in inversion_matrices(settings))
    # Magnitudes whose mel is the given one, (B, K, F).
    amplitude = mel.exp().transpose(1, 2)
    start = starting_magnitude(amplitude, inverse, spread)
    magnitude = mel_to_magnitude(amplitude, filters, spread, n_iterations=50, start=start).transpose(1, 2)
    transform = Spectrogram(settings.n_fft, settings.hop_length)  # frames of the log-mel
    transform.window = to_device(transform.window, mel.device)
    # Random phases, then: project on consistent spectra, extrapolate with momentum, restore the magnitudes.
    generator = generator or torch.Generator().manual_seed(0)
    phase = 2 * torch.pi * torch.rand(magnitude.shape, generator=generator)
    spectrum = torch.polar(magnitude, to_device(phase, mel.device))
    previous = torch.zeros_like(spectrum)
    for _ in range(n_iterations):
        consistent = transform(transform.inverse(spectrum))  # nearest spectrum of a waveform
        # Momentum in the form of torchaudio's `griffinlim`.
        direction = consistent - momentum / (1 + momentum) * previous
        spectrum = magnitude * direction / direction.abs().clamp_min(1e-16)  # new phases, given magnitudes
        previous = consistent
    return transform.inverse(spectrum)
