"""Comparison of an exported ONNX vocoder with the PyTorch model.  B batch, S samples, F mel frames."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.audio.spectral import LogMel
from model.audio.vocoders import Vocoder
from utils.options import import_extra

SHAPES = ((1, 20), (3, 50), (2, 131), (1, 400))  # batch size and frames of each comparison


@dataclasses.dataclass
class Comparison:
    """The outputs of both models for one batch.

    Args:
        n_batch, n_frames: size of the batch.
        difference: maximum absolute difference of samples.
        peak: maximum absolute sample of PyTorch's waveform.
        model_seconds, runtime_seconds: CPU seconds of PyTorch and of onnxruntime.
    """

    n_batch: int
    n_frames: int
    difference: float
    peak: float
    model_seconds: float
    runtime_seconds: float

    @property
    def share(self) -> float:
        """The difference relative to full scale or, if larger, to the peak, since rounding grows with the level."""
        return self.difference / max(1.0, self.peak)


def import_runtime() -> Any:
    """The package onnxruntime, after checking that onnx is installed too.

    Raises: ValueError: one of them is not installed.
    """
    import_extra("onnx", "eval", "the export")
    return import_extra("onnxruntime", "eval", "the export")


def gliding_tones(n_batch: int, n_samples: int, sample_rate: int) -> Tensor:
    """Test signals: 20 harmonics of a pitch that glides around 150 Hz with changing loudness, and noise.

    Returns: (B, S) in [-1, 1], the same in every call.
    """
    seconds = torch.arange(n_samples, dtype=torch.float64) / sample_rate
    start = torch.arange(n_batch, dtype=torch.float64)[:, None]
    cycles = 150 * seconds + 12 * torch.sin(2 * seconds + start)
    # Amplitudes fall as n^-1.5; silent halves of the loudness are part of the test.
    tones = sum(torch.sin(2 * torch.pi * n * cycles) / n**1.5 for n in range(1, 21))
    loudness = torch.sin(3 * seconds + start).clamp_min(0)
    noise = torch.randn(n_batch, n_samples, generator=torch.Generator().manual_seed(0))
    return (0.2 * loudness * tones).float() + 0.01 * noise


def compare_with_onnx(vocoder: Vocoder, file: Path) -> list[Comparison]:
    """Outputs of the model and of its ONNX file for log-mels of several batch sizes and lengths."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    # Both use the same number of threads.
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    log_mel, comparisons = LogMel(vocoder.config.mel), []
    for n_batch, n_frames in SHAPES:
        n_samples = n_frames * vocoder.config.hop_length  # F = n_frames of the log-mel
        mel = log_mel(gliding_tones(n_batch, n_samples, vocoder.config.sample_rate))
        # The same log-mel through both, each timed.
        start = time.process_time()
        with torch.inference_mode():
            expected = vocoder(mel)
        middle = time.process_time()
        (waveform,) = session.run(None, {"mel": mel.numpy()})
        end = time.process_time()
        # Errors relative to the PyTorch model.
        difference = (torch.from_numpy(waveform) - expected).abs().max().item()
        peak = expected.abs().max().item()
        comparisons.append(
            Comparison(
                n_batch=n_batch,
                n_frames=n_frames,
                difference=difference,
                peak=peak,
                model_seconds=middle - start,
                runtime_seconds=end - middle,
            )
        )
    return comparisons
