"""A small vocoder as ONNX: the same waveforms, for any batch and length, without operators that runtimes lack."""

import os

import pytest
import torch

from inference.export_vocoder import export
from model.audio.harmonic_prior import FourierTransform
from model.audio.spectral import LogMel, MelSettings, Spectrogram
from model.audio.vocoder_export import MatrixFourierTransform, exportable
from tests.helpers.vocoder_checkpoint import SMALL_HIFIGAN, SMALL_VOCODER, save_stage_checkpoint, small_vocoder
from utils.command_line import parse_arguments
from utils.generation.arguments.audio import ExportArguments
from utils.generation.vocoder_onnx import Comparison, gliding_tones

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

UNWANTED = {"DFT", "STFT", "Loop", "Scan", "If"}
COMPLEX = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)


def run(*words) -> None:
    export(parse_arguments(ExportArguments, [str(word) for word in words], ""))


def test_matrices_do_what_the_transform_does():
    torch.manual_seed(0)
    by_matrix, by_fft = MatrixFourierTransform(256, 64), FourierTransform(256, 64)
    waveform = torch.randn(2, 20 * 64)
    spectrum = Spectrogram(256, 64)(waveform).transpose(1, 2)
    for transform in (by_matrix, by_fft):
        assert torch.allclose(transform.inverse(spectrum.real, spectrum.imag), waveform, atol=1e-5)
        assert torch.allclose(transform.project(waveform, spectrum.abs()), waveform, atol=1e-4)
    # Also where the first and the last bin have imaginary parts, which mean nothing.
    real, imaginary = torch.randn(2, 5, 129), torch.randn(2, 5, 129)
    assert torch.allclose(by_matrix.inverse(real, imaginary), by_fft.inverse(real, imaginary), atol=1e-5)
    magnitude = torch.rand(2, 20, 129)
    assert torch.allclose(by_matrix.project(waveform, magnitude), by_fft.project(waveform, magnitude), atol=1e-5)
    rescaled = [each.rescale(waveform, lambda found: magnitude / (1 + found)) for each in (by_matrix, by_fft)]
    expected = Spectrogram(256, 64).inverse((spectrum * magnitude / (1 + spectrum.abs())).transpose(1, 2))
    assert all(torch.allclose(each, expected, atol=1e-5) for each in rescaled)
    expected = Spectrogram(256, 64).inverse(torch.polar(magnitude, spectrum.angle()).transpose(1, 2))
    assert torch.allclose(by_fft.project(waveform, magnitude), expected, atol=1e-4)
    for n_bins in (129, 40):
        part = magnitude[..., :n_bins]
        assert torch.allclose(by_matrix.autocorrelation(part), by_fft.autocorrelation(part), atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        SMALL_VOCODER,
        {**SMALL_VOCODER, "n_projections": 0, "n_mel_projections": 0},
        {**SMALL_VOCODER, "n_half_rate_layers": 1},
        SMALL_HIFIGAN,
        {**SMALL_VOCODER, **MelSettings().as_dict()},
    ],
)
def test_the_file_gives_the_models_waveforms(tmp_path, capsys, fields):
    vocoder = small_vocoder(**fields)
    checkpoint = save_stage_checkpoint(vocoder, "vocoder", tmp_path / "run")
    file = tmp_path / "out" / "vocoder.onnx"
    run("--checkpoint", checkpoint.parent, "--output", file)  # Compares four batches to 1e-4.
    assert "3, 50 frames: maximum difference of samples" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["vocoder.onnx"]
    written = onnx.load(file)
    assert not UNWANTED & {node.op_type for node in written.graph.node}
    assert not [value for value in written.graph.initializer if value.data_type in COMPLEX]
    metadata = {each.key: each.value for each in written.metadata_props}
    settings = vocoder.config.mel
    assert metadata == {**{name: str(value) for name, value in settings.as_dict().items()}, "min_frames": "2"}
    batch, bins, frames = written.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, bins.dim_value, frames.dim_param) == ("batch", settings.n_mels, "frames")
    mel = LogMel(settings)(gliding_tones(1, 2 * settings.hop_length, settings.sample_rate))
    (waveform,) = onnxruntime.InferenceSession(str(file)).run(None, {"mel": mel.numpy()})
    assert (torch.from_numpy(waveform) - vocoder(mel).detach()).abs().max() < 1e-4
    with pytest.raises(ValueError, match="too short"):
        vocoder(mel[..., :1])


def test_the_model_is_left_as_it_was():
    vocoder = small_vocoder()
    before = [type(module) for module in vocoder.modules()]
    exportable(vocoder)
    assert [type(module) for module in vocoder.modules()] == before
    assert all(parameter.requires_grad for parameter in vocoder.parameters())


def test_a_file_that_differs_is_not_kept(tmp_path):
    checkpoint = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "run")
    with pytest.raises(ValueError, match="more than --tolerance 1e-15"):
        run("--checkpoint", checkpoint, "--output", tmp_path / "out" / "a.onnx", "--tolerance", "1e-15")
    assert not list((tmp_path / "out").iterdir())


def test_beyond_full_scale_the_difference_counts_by_the_peak():
    loud, quiet = (Comparison(1, 20, 3e-4, peak, 0.0, 0.0) for peak in (4.0, 0.5))
    assert loud.share == pytest.approx(7.5e-5) and quiet.share == 3e-4


def test_nothing_is_left_behind_by_an_error(tmp_path, monkeypatch):
    checkpoint = save_stage_checkpoint(small_vocoder(**SMALL_HIFIGAN), "vocoder", tmp_path / "run")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        run("--checkpoint", checkpoint, "--output", tmp_path / "out" / "a.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_the_signals_of_the_comparison_are_fixed_and_in_range():
    first, second = (gliding_tones(3, 4000, 8000) for _ in range(2))
    assert torch.equal(first, second) and 0.2 < first.abs().max() <= 1
    assert (first[0] - first[1]).abs().max() > 0.1


def test_flags_that_are_needed(capsys, tmp_path):
    for words, message in ([], "--checkpoint is needed"), (["--output", tmp_path], "must be a file, such as"):
        with pytest.raises(SystemExit):
            run("--checkpoint", "x", *words) if words else run()
        assert message in capsys.readouterr().err
