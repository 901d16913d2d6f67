"""A vocoder's ONNX file against the vocoder.  B batch, S samples, F mel frames."""

import dataclasses
import importlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.audio.spectral import LogMel
from model.audio.vocoders import Vocoder

SHAPES = ((1, 20), (3, 50), (2, 131), (1, 400))  # batch and frames of the comparisons


@dataclasses.dataclass
class Comparison:
    """One batch through both.

    Args:
        n_batch, n_frames: its size.
        difference: largest absolute difference of samples.
        peak: largest absolute sample of PyTorch's waveform.
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
        """The difference over full scale, or over the peak where that is beyond: rounding grows with the waveform."""
        return self.difference / max(1.0, self.peak)


def import_runtime() -> Any:
    """The package onnxruntime, once onnx is known to be there too.

    Raises: ValueError: one of them is not installed.
    """
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(
            f"the export needs the packages onnx and onnxruntime ({error}); pip install -r requirements-eval.txt"
        ) from error


def gliding_tones(n_batch: int, n_samples: int, sample_rate: int) -> Tensor:
    """Sounds between speech and birdsong: 20 harmonics of a pitch that glides about 150 Hz, and noise.

    Returns: (B, S) in [-1, 1], the same at every call.
    """
    seconds = torch.arange(n_samples, dtype=torch.float64) / sample_rate
    start = torch.arange(n_batch, dtype=torch.float64)[:, None]
    cycles = 150 * seconds + 12 * torch.sin(2 * seconds + start)
    tones = sum(torch.sin(2 * torch.pi * n * cycles) / n**1.5 for n in range(1, 21))
    loudness = torch.sin(3 * seconds + start).clamp_min(0)
    noise = torch.randn(n_batch, n_samples, generator=torch.Generator().manual_seed(0))
    return (0.2 * loudness * tones).float() + 0.01 * noise


def compare_with_onnx(vocoder: Vocoder, file: Path) -> list[Comparison]:
    """Log-mels of several batches and lengths through the model and through its file."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    log_mel, found = LogMel(vocoder.config.mel), []
    for n_batch, n_frames in SHAPES:
        n_samples = n_frames * vocoder.config.hop_length
        mel = log_mel(gliding_tones(n_batch, n_samples, vocoder.config.sample_rate))
        start = time.process_time()
        with torch.inference_mode():
            expected = vocoder(mel)
        middle = time.process_time()
        (waveform,) = session.run(None, {"mel": mel.numpy()})
        end = time.process_time()
        difference = (torch.from_numpy(waveform) - expected).abs().max().item()
        peak = expected.abs().max().item()
        found.append(Comparison(n_batch, n_frames, difference, peak, middle - start, end - middle))
    return found
