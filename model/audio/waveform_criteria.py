"""Distances between waveforms, on their spectrograms.  B batch, S samples, N n_fft, K bins, F frames.

Everything runs in fp32, also under autocast. Every distance is a number per waveform, and a loss its mean over the
batch, so that equal micro-batches or ranks average exactly. Magnitudes at the STFT's resolutions are in units of white
noise of variance 1, whatever N is; those of log-mels are as `LogMel` has them.
"""

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
    has_angle = real.square() + imaginary.square() > 1e-30
    return torch.atan2(torch.where(has_angle, imaginary, 0.0), torch.where(has_angle, real, 1.0))


def phase_distances(fake: Tensor, real: Tensor, *, floor: float, n_frames: Tensor | None = None) -> dict[str, Tensor]:
    """Anti-wrapped errors of group delay and of instantaneous angular frequency (arXiv 2211.15974, eqs. 12 to 15),
    weighted by magnitudes, in radians.

    With P = fake * conj(real), whose angle is the error of the phase, the wrapped error of the phase's difference
    between neighbouring bins (group delay) is the angle of P[k + 1] * conj(P[k]), and between neighbouring frames
    (frequency) that of P[f + 1] * conj(P[f]); no angle has to be unwrapped. Each pair counts by the smallest of its
    four magnitudes, through which no gradient goes, over the mean real magnitude: bins without sound have no phase,
    and the slope with respect to a fake bin is bounded, where that of an angle alone is one over its magnitude.

    Args:
        fake, real: complex spectrograms (B, K, F), F >= 2.
        floor: mean real magnitudes count as at least this.
    Returns: "group_delay" and "frequency", (B,) each, in [0, pi].
    """
    product = fake * real.conj()
    unit = product / product.detach().abs().clamp_min(1e-20)
    loudness = real.abs()
    weight = torch.minimum(fake.detach().abs(), loudness)
    weight = weight / masked_mean(loudness, n_frames).clamp_min(floor)[:, None, None]
    delay = safe_angle(unit[:, 1:] * unit[:, :-1].conj()).abs() * torch.minimum(weight[:, 1:], weight[:, :-1])
    change = safe_angle(unit[..., 1:] * unit[..., :-1].conj()).abs()
    change = change * torch.minimum(weight[..., 1:], weight[..., :-1])
    n_pairs = None if n_frames is None else n_frames - 1
    return {"group_delay": masked_mean(delay, n_frames), "frequency": masked_mean(change, n_pairs)}


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
            n_samples: samples of each waveform that count, (B,); both should be 0 behind. None: all.
        Returns: (B,) fp32 per name; terms with weight 0 are left out.
        """
        with torch.autocast(fake.device.type, enabled=False):
            fake, real = fake.float(), real.float()
            terms = self.terms_at_the_mel(fake, real, n_samples)
            if "convergence" in self.weights:
                terms |= self.terms_at_all_resolutions(fake, real, n_samples, spectra=terms.pop("spectra"))
        return {name: terms[name] for name in self.weights}

    def terms_at_the_mel(self, fake: Tensor, real: Tensor, n_samples: Tensor | None) -> dict:
        """Terms at the log-mel's resolution, and under `spectra` both spectrograms, for whoever needs them again."""
        spectrogram = self.log_mel.spectrogram
        spectra = spectrogram(fake), spectrogram(real)
        n_frames = None if n_samples is None else n_samples // spectrogram.hop_length
        scale = scale_of(spectrogram)
        terms: dict = {"spectra": spectra}
        if "mel" in self.weights:
            mels = [self.log_mel.from_magnitude(spectrum.abs()) for spectrum in spectra]
            terms["mel"] = masked_mean((mels[0] - mels[1]).abs(), n_frames)
        if "group_delay" in self.weights:
            terms |= phase_distances(spectra[0] * scale, spectra[1] * scale, floor=self.silence, n_frames=n_frames)
        if "complex_stft" in self.weights:
            difference = (spectra[0] - spectra[1]).abs() * scale
            norm = masked_mean((spectra[1].abs() * scale).square(), n_frames).sqrt().clamp_min(self.silence)
            terms["complex_stft"] = safe_sqrt(masked_mean(difference.square(), n_frames)) / norm
        return terms

    def terms_at_all_resolutions(
        self, fake: Tensor, real: Tensor, n_samples: Tensor | None, *, spectra: tuple[Tensor, Tensor]
    ) -> dict:
        """Spectral convergence and log-magnitudes; `spectra` are those of the log-mel's resolution."""
        own = self.log_mel.spectrogram
        convergence, logarithm = [], []
        for spectrogram in self.resolutions:
            same = (spectrogram.n_fft, spectrogram.hop_length) == (own.n_fft, own.hop_length)
            pair = spectra if same else (spectrogram(fake), spectrogram(real))
            scale = scale_of(spectrogram)
            magnitudes = [spectrum.abs() * scale for spectrum in pair]
            assert isinstance(spectrogram, Spectrogram)
            n_frames = None if n_samples is None else n_samples // spectrogram.hop_length
            convergence.append(spectral_convergence(*magnitudes, floor=self.silence, n_frames=n_frames))
            logarithm.append(log_distance(*magnitudes, floor=self.floor, n_frames=n_frames))
        return {"convergence": torch.stack(convergence).mean(0), "log_magnitude": torch.stack(logarithm).mean(0)}


def scale_of(spectrogram: Spectrogram) -> Tensor:
    """The factor that gives white noise of variance 1 a mean squared magnitude of 1."""
    return spectrogram.window.square().sum().rsqrt()
