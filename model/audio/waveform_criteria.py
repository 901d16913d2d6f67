"""Distances between waveforms, on their spectrograms.  B batch, S samples, N n_fft, K bins, F frames.

Everything runs in fp32, also under autocast. Every distance is a number per waveform, and a loss its mean over the
batch, so that equal micro-batches or ranks average exactly. Magnitudes at the STFT's resolutions are in units of white
noise of variance 1, whatever N is; those of log-mels are as `LogMel` has them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.audio.lengths import masked_mean
from model.audio.spectral import LogMel, MelSettings, Spectrogram


def spectral_convergence(fake: Tensor, real: Tensor, *, floor: float, n_frames: Tensor | None = None) -> Tensor:
    """Frobenius norm of a difference of magnitudes over that of the real ones (arXiv 1910.11480, eq. 4).

    Args:
        fake, real: magnitudes (B, K, F), or differences |fake - real| and |real|.
        floor: real norms count as at least those of magnitudes that are all equal to it, so that silence divides
            nothing by zero.
    Returns: (B,).
    """
    difference, squares = (fake - real).square(), real.square()
    mean = masked_mean(difference, n_frames)
    # The root's slope at 0 is infinite: perfect reconstructions get none.
    return safe_sqrt(mean) / masked_mean(squares, n_frames).sqrt().clamp_min(floor)


def safe_sqrt(values: Tensor) -> Tensor:
    """The square root of numbers >= 0, with slope 0 where they are 0."""
    positive = values > 0
    # The inner `where` keeps the infinite slope out: 0 times infinity would be nan.
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


def log_distance(fake: Tensor, real: Tensor, *, floor: float, n_frames: Tensor | None = None) -> Tensor:
    """Mean absolute difference of natural logarithms of magnitudes, clamped at `floor` (arXiv 1910.11480, eq. 5).

    Args: fake, real: (B, K, F).
    Returns: (B,).
    """
    return masked_mean((fake.clamp_min(floor).log() - real.clamp_min(floor).log()).abs(), n_frames)


def safe_angle(values: Tensor) -> Tensor:
    """Angles of complex numbers in [-pi, pi], 0 with slope 0 where they are too small to have one."""
    real, imaginary = values.real, values.imag
    has_angle = real.square() + imaginary.square() > 1e-30  # elsewhere atan2(0, 1) stands in
    return torch.atan2(torch.where(has_angle, imaginary, 0.0), torch.where(has_angle, real, 1.0))


def phase_distances(fake: Tensor, real: Tensor, *, floor: float, n_frames: Tensor | None = None) -> dict[str, Tensor]:
    """Anti-wrapped errors of group delay and of instantaneous angular frequency (arXiv 2211.15974, eqs. 12 to 15),
    weighted by magnitudes, in radians.

    With P = fake * conj(real), whose angle is the error of the phase, the wrapped error of the phase's difference
    between neighbouring bins (group delay) is the angle of P[k + 1] * conj(P[k]), and between neighbouring frames
    (frequency) that of P[f + 1] * conj(P[f]); no angle has to be unwrapped. Each pair counts by the smallest of its
    four magnitudes, through which no gradient goes, over the mean real magnitude: silent bins have no phase,
    and the slope with respect to a fake bin is bounded, where that of an angle alone is one over its magnitude.

    Args:
        fake, real: complex spectrograms (B, K, F), F >= 2.
        floor: mean real magnitudes count as at least this.
    Returns: "group_delay" and "frequency", (B,) each, in [0, pi].
    """
    # Unit vectors whose angle is the phase error; the weight of a bin is its smaller magnitude over the mean real one.
    product = fake * real.conj()
    unit = product / product.detach().abs().clamp_min(1e-20)
    loudness = real.abs()
    weight = torch.minimum(fake.detach().abs(), loudness)
    weight = weight / masked_mean(loudness, n_frames).clamp_min(floor)[:, None, None]
    # Errors of neighbouring bins and frames, each pair weighted by the smaller of its weights.
    delay = safe_angle(unit[:, 1:] * unit[:, :-1].conj()).abs() * torch.minimum(weight[:, 1:], weight[:, :-1])
    change = safe_angle(unit[..., 1:] * unit[..., :-1].conj()).abs()
    change = change * torch.minimum(weight[..., 1:], weight[..., :-1])
    n_pairs = None if n_frames is None else n_frames - 1  # neighbouring frames
    return {"group_delay": masked_mean(delay, n_frames), "frequency": masked_mean(change, n_pairs)}


@dataclass
class Pair:
    """A generated and a real waveform, with what several distances read.

    Args:
        fake, real: (B, S) fp32.
        n_samples: samples of each waveform that count, (B,); None: all.
        fake_spectrum, real_spectrum: complex spectrograms at the log-mel's resolution, (B, K, F).
    """

    fake: Tensor
    real: Tensor
    n_samples: Tensor | None
    fake_spectrum: Tensor
    real_spectrum: Tensor

    def n_frames(self, spectrogram: Spectrogram) -> Tensor | None:
        """Frames of each waveform that count at this resolution, (B,); None: all."""
        return None if self.n_samples is None else self.n_samples // spectrogram.hop_length


class VocoderLoss(nn.Module):
    """Weighted distances between a generated and a real waveform, by name.

    mel            mean absolute difference of log-mels
    convergence    spectral convergence, mean over the resolutions
    log_magnitude  mean absolute difference of log-magnitudes, mean over the resolutions
    group_delay    \\  phases without their offset, weighted by magnitude, at the log-mel's resolution
    frequency      /
    complex_stft   norm of the difference of complex spectrograms over the real one's, at the log-mel's resolution

    Args:
        mel: the log-mel.
        mel_weight, complex_stft_weight: of the terms with these names.
        stft_weight: of `convergence` and `log_magnitude` each.
        phase_weight: of `group_delay` and `frequency` each.
        resolutions: samples of a frame, multiples of 8; frames are a quarter of that apart.
    Raises:
        ValueError: a negative weight, all weights zero, or resolutions and a weight that do not go together.
    """

    floor = 1e-5  # Magnitude of 16-bit rounding noise.
    silence = 1e-3  # Real magnitudes count as at least this where something is divided by them: -60 dB.

    def __init__(
        self,
        mel: MelSettings,
        *,
        mel_weight: float = 45.0,
        stft_weight: float = 1.0,
        phase_weight: float = 0.0,
        complex_stft_weight: float = 0.0,
        resolutions: tuple[int, ...] | list[int] = (512, 1024, 2048),
    ):
        super().__init__()
        weights = {
            "mel": mel_weight,
            "convergence": stft_weight,
            "log_magnitude": stft_weight,
            "group_delay": phase_weight,
            "frequency": phase_weight,
            "complex_stft": complex_stft_weight,
        }
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"the weight of {name} is {weight}; it must be >= 0")
        if not any(weights.values()):
            raise ValueError(
                "mel_weight, stft_weight, phase_weight and complex_stft_weight are all 0: nothing would be learned"
            )
        if stft_weight > 0 and not resolutions:
            raise ValueError(f"stft_weight={stft_weight} needs resolutions")
        if any(n_fft < 16 or n_fft % 8 for n_fft in resolutions):
            raise ValueError(f"STFT resolutions {list(resolutions)} must be multiples of 8, at least 16")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.log_mel = LogMel(mel)
        self.resolutions = nn.ModuleList(Spectrogram(n_fft, n_fft // 4) for n_fft in resolutions)
        # Reflection needs more samples than it adds, and the frequency's errors need two frames.
        longest = max([mel.n_fft, *(n_fft for n_fft in resolutions if stft_weight > 0)])
        self.min_samples = max(mel.min_samples, 2 * mel.hop_length, 3 * longest // 8 + 1)

    def forward(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Args: fake, real: waveforms (B, S), at least `min_samples` long.
        Returns: weighted fp32 scalars; terms with weight 0 are left out."""
        return {name: self.weights[name] * values.mean() for name, values in self.distances(fake, real).items()}

    def distances(self, fake: Tensor, real: Tensor, n_samples: Tensor | None = None) -> dict[str, Tensor]:
        """The terms before they are weighted.

        Args:
            fake, real: waveforms (B, S).
            n_samples: samples of each waveform that count, (B,); both should be 0 after them. None: all.
        Returns: (B,) fp32 per name; terms with weight 0 are left out.
        """
        with torch.autocast(fake.device.type, enabled=False):
            spectrogram = self.log_mel.spectrogram
            fake, real = fake.float(), real.float()
            pair = Pair(fake, real, n_samples, fake_spectrum=spectrogram(fake), real_spectrum=spectrogram(real))
            # A row computes one distance or two that share their work and their weight.
            terms: dict[str, Tensor] = {}
            for names, distances in self.rows():
                if names[0] in self.weights:
                    terms |= zip(names, distances(pair))
        return {name: terms[name] for name in self.weights}

    def rows(self) -> list[tuple[tuple[str, ...], Callable[[Pair], tuple[Tensor, ...]]]]:
        """Names of distances and the method that computes them, in the order of computation. A new term is a row here,
        and a weight in the constructor."""
        return [
            (("mel",), self.mel_distance),
            (("group_delay", "frequency"), self.phase_distances),
            (("complex_stft",), self.complex_distance),
            (("convergence", "log_magnitude"), self.magnitude_distances),
        ]

    def mel_distance(self, pair: Pair) -> tuple[Tensor]:
        """Mean absolute difference of log-mels, (B,), in nats."""
        fake, real = (
            self.log_mel.from_magnitude(spectrum.abs()) for spectrum in (pair.fake_spectrum, pair.real_spectrum)
        )
        return (masked_mean((fake - real).abs(), pair.n_frames(self.log_mel.spectrogram)),)

    def phase_distances(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Group delay and frequency, (B,) each: `phase_distances` at the log-mel's resolution."""
        spectrogram = self.log_mel.spectrogram
        scale, n_frames = scale_of(spectrogram), pair.n_frames(spectrogram)
        fake, real = pair.fake_spectrum * scale, pair.real_spectrum * scale
        distances = phase_distances(fake, real, floor=self.silence, n_frames=n_frames)
        return distances["group_delay"], distances["frequency"]

    def complex_distance(self, pair: Pair) -> tuple[Tensor]:
        """Norm of the difference of complex spectrograms over the real one's, (B,), at the log-mel's resolution."""
        spectrogram = self.log_mel.spectrogram
        scale, n_frames = scale_of(spectrogram), pair.n_frames(spectrogram)
        difference = (pair.fake_spectrum - pair.real_spectrum).abs() * scale
        norm = masked_mean((pair.real_spectrum.abs() * scale).square(), n_frames).sqrt().clamp_min(self.silence)
        return (safe_sqrt(masked_mean(difference.square(), n_frames)) / norm,)

    def magnitude_distances(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Spectral convergence and distance of log-magnitudes, (B,) each, means over all resolutions."""
        mel_resolution = self.log_mel.spectrogram
        convergence, logarithm = [], []
        for spectrogram in self.resolutions:
            assert isinstance(spectrogram, Spectrogram)
            # The resolution of the log-mel has been computed already.
            spectra = pair.fake_spectrum, pair.real_spectrum
            if (spectrogram.n_fft, spectrogram.hop_length) != (mel_resolution.n_fft, mel_resolution.hop_length):
                spectra = spectrogram(pair.fake), spectrogram(pair.real)
            scale, n_frames = scale_of(spectrogram), pair.n_frames(spectrogram)
            fake, real = (spectrum.abs() * scale for spectrum in spectra)  # (B, K, F) each
            convergence.append(spectral_convergence(fake, real, floor=self.silence, n_frames=n_frames))
            logarithm.append(log_distance(fake, real, floor=self.floor, n_frames=n_frames))
        return torch.stack(convergence).mean(0), torch.stack(logarithm).mean(0)


def scale_of(spectrogram: Spectrogram) -> Tensor:
    """The factor that gives white noise of variance 1 a mean squared magnitude of 1."""
    # White noise of variance 1 has a mean squared magnitude of sum window^2.
    return spectrogram.window.square().sum().rsqrt()
