"""What a log-mel says about the spectrum without training, and the transform that vocoders use.  B batch, M mel bins,
F frames, K frequency bins, S samples, N n_fft.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.griffin_lim import inversion_matrices, mel_gain, mel_to_magnitude, starting_magnitude
from model.audio.spectral import istft, stft
from model.layers import widen

EPSILON = 1e-8  # added to the power whose phase is taken: silent bins have none


class FourierTransform(nn.Module):
    """The transform with frames first, without complex values in what goes in and out.

    Args:
        n_fft: samples of a frame N.
        hop_length: samples between frames.
    """

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.hop_length = hop_length
        self.register_buffer("window", torch.hann_window(n_fft))

    def inverse(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """Two of (B, F, K) -> (B, F * hop_length)."""
        return istft(torch.complex(real, imaginary).transpose(1, 2), self.window, self.hop_length)

    def project(self, waveform: Tensor, magnitude: Tensor) -> Tensor:
        """One Griffin-Lim projection: the waveform's phases with other magnitudes.

        Args:
            waveform: (B, F * hop_length).
            magnitude: (B, F, K).
        Returns: (B, F * hop_length).
        """
        return self.rescale(waveform, lambda current: magnitude / current)

    def rescale(self, waveform: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """The waveform with its magnitudes multiplied by a function of them.

        Args:
            waveform: (B, F * hop_length).
            gain: magnitudes -> factors, (B, F, K) both.
        Returns: (B, F * hop_length).
        """
        spectrum = stft(waveform, self.window, self.hop_length)
        power = (spectrum * spectrum.conj()).real  # One contiguous product; strided real parts would take longer.
        magnitude = torch.sqrt(power + EPSILON)
        return istft(spectrum * gain(magnitude.transpose(1, 2)).transpose(1, 2), self.window, self.hop_length)

    def autocorrelation(self, magnitude: Tensor) -> Tensor:
        """Even spectra (B, F, up to K), the bins left out 0 -> lags 0 to N / 2 of their inverse, (B, F, K)."""
        n_fft = len(self.window)
        return torch.fft.irfft(magnitude, n=n_fft)[..., : n_fft // 2 + 1]


class HarmonicPrior(nn.Module):
    """What a log-mel says about the spectrum without training: magnitude, fundamental frequency, voicing, phase.

    Args:
        config: see `VocoderConfig`.
    """

    frequency: Tensor

    def __init__(self, config):
        super().__init__()
        self.config = config
        filters, inverse, spread = inversion_matrices(config.mel)
        frequency = torch.arange(config.n_fft // 2 + 1) / config.n_fft
        self.register_buffer("filters", filters)
        self.register_buffer("inverse", inverse)
        self.register_buffer("spread", spread)
        self.register_buffer("frequency", frequency)  # Of the bins, in cycles per sample.
        # Below 4 kHz harmonics tell the pitch; fricatives above only disturb.
        self.n_low = min(math.ceil(4000 / config.sample_rate * config.n_fft), len(frequency))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}is_low", None)  # Older checkpoints kept what the configuration says.
        super()._load_from_state_dict(state_dict, prefix, *args)

    def magnitude(self, mel: Tensor) -> Tensor:
        """(B, M, F) -> (B, F, K)."""
        amplitude = mel.exp().transpose(1, 2)
        start = starting_magnitude(amplitude, self.inverse, self.spread)
        return mel_to_magnitude(
            amplitude, self.filters, self.spread, n_iterations=self.config.n_magnitude_updates, start=start
        )

    def mel_gain(self, mel: Tensor, magnitude: Tensor) -> Tensor:
        """Log-mel (B, M, F), magnitudes (B, F, K) -> factors that bring them nearer to it, (B, F, K)."""
        return mel_gain(magnitude, mel.exp().transpose(1, 2), filters=self.filters, spread=self.spread)

    def pitch(self, magnitude: Tensor, transform: FourierTransform) -> tuple[Tensor, Tensor]:
        """Fundamental frequency in cycles per sample, and the autocorrelation there (about 0 unvoiced, 1 voiced).

        The highest value of the autocorrelation between the shortest and the longest period, placed by the parabola
        through it and its neighbours.
        Args: magnitude: (B, F, K).
        Returns: two of (B, F).
        """
        # Autocorrelation of the low bins, (B, F, K), and its peak between the shortest and the longest period.
        # In fp64: rounding adds up over the frames of `cycles`, and would differ between kernels, pieces and runtimes.
        correlation = transform.autocorrelation(widen(magnitude[..., : self.n_low]))
        shortest = int(self.config.sample_rate / self.config.f0_max)
        longest = int(self.config.sample_rate / self.config.f0_min)
        peak, lag = correlation[..., shortest : longest + 1].max(-1)
        lag = (lag + shortest).clamp(1, correlation.shape[-1] - 2)
        # Parabola through the peak and its neighbours: a lag between two samples.
        left, middle, right = (correlation.gather(-1, lag[..., None] + i)[..., 0] for i in (-1, 0, 1))
        curvature = (left - 2 * middle + right).clamp_max(-1e-8)
        offset = (0.5 * (left - right) / curvature).clamp(-0.5, 0.5)
        return 1 / (lag + offset), (peak / correlation[..., 0].clamp_min(1e-8)).float()

    def cycles(self, f0: Tensor) -> Tensor:
        """Cycles of the fundamental since the first frame, modulo 1, by the trapezoidal rule: (B, F) -> (B, F)."""
        steps = 0.5 * widen(f0[:, 1:] + f0[:, :-1]) * self.config.hop_length
        return F.pad(steps, (1, 0)).cumsum(-1).remainder(1).float()

    def harmonics(self, f0: Tensor, cycles: Tensor) -> tuple[Tensor, Tensor]:
        """Each bin's place between harmonics, and its phase: that of the nearest harmonic.

        Args:
            f0: cycles per sample, (B, F).
            cycles: of the fundamental, modulo 1, (B, F).
        Returns:
            comb: 1 on a harmonic, -1 half-way between two, (B, F, K).
            phase: at the frame's centre, in [0, 2 pi), (B, F, K).
        """
        position = self.frequency / f0[..., None].float()
        phase = 2 * torch.pi * (position.round() * cycles[..., None]).remainder(1)
        return torch.cos(2 * torch.pi * position), phase
