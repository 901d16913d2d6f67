"""A vocoder without complex numbers and Fourier transforms, for ONNX.

B batch, M mel bins, F frames, K frequency bins, S samples, N n_fft.

The transforms become matrix products and (transposed) convolutions with the cosines and sines of the discrete Fourier
transform, so that runtimes need no operator beyond those of other convolutional networks.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio.harmonic_prior import EPSILON, FourierTransform
from model.audio.vocoders import Vocoder

OPSET = 17
EXAMPLE_FRAMES = 40  # of the mel that is traced


class MatrixFourierTransform(nn.Module):
    """Does what `FourierTransform` does, by matrices.

    Args:
        n_fft: samples of a frame N.
        hop_length: samples between frames.
    """

    lags: Tensor

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.hop_length, self.cut = hop_length, (n_fft - hop_length) // 2
        bins, samples = torch.arange(n_fft // 2 + 1), torch.arange(n_fft)
        angle = 2 * torch.pi / n_fft * (bins[:, None] * samples % n_fft).double()
        window = torch.hann_window(n_fft, dtype=torch.float64)
        # All bins but the first and the last stand for two of the N.
        weight = torch.full((len(bins), 1), 2.0 / n_fft, dtype=torch.float64)
        weight[0] = weight[-1] = 1.0 / n_fft
        cosine, sine = angle.cos(), -angle.sin()
        analysis = torch.cat([cosine, sine])[:, None] * window
        synthesis = torch.cat([weight * cosine, weight * sine])[:, None] * window
        self.register_buffer("analysis", analysis.float())  # (2 K, 1, N)
        self.register_buffer("synthesis", synthesis.float())  # (2 K, 1, N)
        self.register_buffer("lags", (weight * cosine)[:, : len(bins)])  # (K, K) fp64
        self.register_buffer("envelope", window.square()[None, None].float())  # (1, 1, N)

    def inverse(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """Two of (B, F, K) -> (B, F * hop_length)."""
        frames = torch.cat([real, imaginary], dim=-1).transpose(1, 2)
        total = F.conv_transpose1d(frames, self.synthesis, stride=self.hop_length)
        weight = F.conv_transpose1d(torch.ones_like(frames[:1, :1]), self.envelope, stride=self.hop_length)
        return (total / weight)[:, 0, self.cut : -self.cut]

    def project(self, waveform: Tensor, magnitude: Tensor) -> Tensor:
        """Waveform (B, F * hop_length), magnitude (B, F, K) -> (B, F * hop_length)."""
        return self.rescale(waveform, lambda current: magnitude / current)

    def rescale(self, waveform: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """See `FourierTransform.rescale`."""
        padded = F.pad(waveform[:, None], (self.cut, self.cut), mode="reflect")
        real, imaginary = F.conv1d(padded, self.analysis, stride=self.hop_length).transpose(1, 2).chunk(2, dim=-1)
        factor = gain(torch.sqrt(torch.addcmul(real.square() + EPSILON, imaginary, imaginary)))
        return self.inverse(factor * real, factor * imaginary)

    def autocorrelation(self, magnitude: Tensor) -> Tensor:
        """Even spectra (B, F, up to K), the bins left out 0 -> lags 0 to N / 2 of their inverse, (B, F, K)."""
        return magnitude @ self.lags[: magnitude.shape[-1]].to(magnitude.dtype)


def exportable(vocoder: Vocoder) -> Vocoder:
    """A copy of a vocoder on the CPU with the same weights and, within rounding, the same waveforms, whose forward
    consists of what ONNX exporters know."""
    copied = copy.deepcopy(vocoder).cpu().eval().requires_grad_(False)
    for module in copied.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, FourierTransform):
                setattr(module, name, MatrixFourierTransform(len(child.window), child.hop_length))
    return copied


def export_onnx(vocoder: Vocoder, file: Path) -> None:
    """Write the network as ONNX: input "mel" (B, M, F), output "waveform" (B, F * hop_length), any B, and any
    F from `min_frames` on, below which reflection has too little to reflect. Metadata: the log-mel, and `min_frames`.

    Raises: ModuleNotFoundError: the package onnx is missing.
    """
    import onnx

    settings = vocoder.config.mel
    mel = torch.full((1, settings.n_mels, EXAMPLE_FRAMES), settings.log_floor)
    axes = {"mel": {0: "batch", 2: "frames"}, "waveform": {0: "batch", 1: "samples"}}
    with warnings.catch_warnings():  # The newer exporter needs one more package; checks of shapes are no branches.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            exportable(vocoder),
            (mel,),
            str(file),
            input_names=["mel"],
            output_names=["waveform"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    written = onnx.load(file)
    facts = {**settings.as_dict(), "min_frames": -(-settings.min_samples // settings.hop_length)}
    onnx.helper.set_model_props(written, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(written)
    onnx.save(written, file)
