"""Reconstruction of audio files with a small audio VAE and a small vocoder."""

import json

import pytest
import soundfile
import torch
from PIL import Image

from inference.reconstruct_audio import reconstruct
from model.audio.spectral import LogMel, analyse
from model.audio.vae import AudioVAE, AudioVAEConfig
from tests.helpers.processes import newest_results
from tests.helpers.runs import changed
from tests.helpers.vocoder_checkpoint import SMALL_MEL, save_stage_checkpoint, small_vocoder, write_sound
from utils.command_line import parse_arguments
from utils.generation.arguments.audio import ReconstructionArguments, VocodeArguments
from utils.generation.audio import Synthesizer, read_waveform

SMALL_VAE = {"width": 16, "latent_channels": 4, "n_encoder_blocks": 1, "n_decoder_blocks": 1}


def small_vae(**fields) -> AudioVAE:
    torch.manual_seed(1)
    return AudioVAE(AudioVAEConfig(**{**SMALL_MEL.as_dict(), **SMALL_VAE, **fields})).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A vocoder's, an audio VAE's, and one's of an audio VAE that knows two speakers."""
    folder = tmp_path_factory.mktemp("runs")
    with_speakers = small_vae(speakers=["ann", "bob"])
    for parameter in with_speakers.parameters():  # Speakers have no effect at the start.
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    models = {"vocoder": small_vocoder(), "audio_vae": small_vae(), "speakers": with_speakers}
    return {
        name: save_stage_checkpoint(model, "vocoder" if name == "vocoder" else "audio_vae", folder / name)
        for name, model in models.items()
    }


@pytest.fixture
def run(checkpoints, tmp_path):
    """run(*words): reconstruct into `tmp_path / "out"`; returns the settings and the waveforms there by name."""

    def call(*words):
        folder = tmp_path / "out"
        flags = ["--vae_checkpoint", checkpoints["audio_vae"], "--vocoder_checkpoint", checkpoints["vocoder"]]
        words = changed([*map(str, flags), "--output_dir", str(folder)], *map(str, words))
        reconstruct(parse_arguments(ReconstructionArguments, words, ""))
        folder = newest_results(folder)
        waveforms = {file.name: soundfile.read(file)[0] for file in folder.glob("*.wav")}
        return json.loads((folder / "settings.json").read_text()), waveforms

    return call


def test_the_result_is_vae_then_vocoder(run, checkpoints, tmp_path, capsys):
    write_sound(tmp_path / "a.flac", seconds=0.5)
    settings, waveforms = run("--input", tmp_path / "a.flac")
    mel = analyse(read_waveform(tmp_path / "a.flac", 8000), LogMel(SMALL_MEL))
    with torch.no_grad():
        reconstruction = small_vae()(mel[None]).reconstruction.clamp_min(SMALL_MEL.log_floor)
    vocoder = Synthesizer(small_vocoder())
    expected = {"a_reconstruction.wav": vocoder.waveform(reconstruction[0]), "a_vocoder.wav": vocoder.waveform(mel)}
    assert waveforms.keys() == expected.keys()
    for name, waveform in expected.items():
        assert len(waveforms[name]) == 4000
        wanted = waveform[:4000].clamp(-1, 1)
        assert torch.allclose(torch.from_numpy(waveforms[name]).float(), wanted, atol=1 / 32768 + 1e-5)
    distance = (reconstruction[0] - mel).abs().mean().item()
    assert settings["files"][0]["vae_mel_l1"] == pytest.approx(distance, rel=1e-4)
    assert settings["vae_checkpoint"] == str(checkpoints["audio_vae"]) and settings["vae_weights"] == "raw"
    assert settings["vocoder_checkpoint"] == str(checkpoints["vocoder"])
    assert Image.open(tmp_path / "out" / "sheet.png").width > 200
    assert f"log-mel L1 of the VAE {distance:.3f}" in capsys.readouterr().out


def test_lengths_that_the_compression_does_not_divide(run, tmp_path):
    for n_samples in (1, 64, 65 * 64):
        write_sound(tmp_path / f"{n_samples}.wav", seconds=n_samples / 8000)
    _, waveforms = run("--input", *(tmp_path / f"{n_samples}.wav" for n_samples in (1, 64, 65 * 64)))
    assert {len(waveforms[f"{n_samples}_reconstruction.wav"]) for n_samples in (1, 64, 65 * 64)} == {1, 64, 65 * 64}


def test_speakers(run, checkpoints, tmp_path):
    write_sound(tmp_path / "a.wav")
    words = ["--input", tmp_path / "a.wav", "--vae_checkpoint", checkpoints["speakers"]]
    ann, bob = (run(*words, "--speaker", name)[1]["a_reconstruction.wav"] for name in ("ann", "bob"))
    assert abs(ann - bob).max() > 1e-3
    with pytest.raises(ValueError, match=r"needs --speaker \(speakers: ann, bob\)"):
        run(*words)
    with pytest.raises(ValueError, match="knows no speaker 'anne'; did you mean 'ann'"):
        run(*words, "--speaker", "anne")
    with pytest.raises(ValueError, match="--speaker ann has no effect"):
        run("--input", tmp_path / "a.wav", "--speaker", "ann")


def test_models_of_different_log_mels_are_refused(run, checkpoints, tmp_path):
    write_sound(tmp_path / "a.wav")
    other = save_stage_checkpoint(small_vae(f_max=3000.0), "audio_vae", tmp_path / "other")
    with pytest.raises(ValueError, match="differ in f_max") as error:
        run("--input", tmp_path / "a.wav", "--vae_checkpoint", other)
    assert "f_max=3000.0" in str(error.value) and str(checkpoints["vocoder"]) in str(error.value)
    with pytest.raises(ValueError, match="one of stage 'audio_vae' is needed"):
        run("--input", tmp_path / "a.wav", "--vae_checkpoint", checkpoints["vocoder"])


def test_damaged_files_are_left_out(run, tmp_path, caplog):
    write_sound(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"RIFF broken")
    with pytest.raises(ValueError, match=r"1 of 2 files gave no result: .*b\.wav"):
        run("--input", tmp_path)
    names = {"a_reconstruction.wav", "a_vocoder.wav", "sheet.png", "settings.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names and "b.wav is left out" in caplog.text


def test_a_sheet_is_named_where_there_is_one(run, tmp_path, capsys):
    write_sound(tmp_path / "a.wav")
    run("--input", tmp_path / "a.wav")
    assert "sheet.png" in capsys.readouterr().out
    (tmp_path / "b.wav").write_bytes(b"RIFF broken")
    with pytest.raises(ValueError, match="1 of 1 files gave no result"):
        run("--input", tmp_path / "b.wav")
    assert "sheet.png" not in capsys.readouterr().out


def test_inputs_are_never_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("a.wav", "a_vocoder.wav"):
        write_sound(tmp_path / "out" / name)
    with pytest.raises(ValueError, match=r"a_vocoder\.wav is an input and would be overwritten"):
        run("--input", tmp_path / "out")


def test_the_scripts_have_folders_of_their_own():
    assert ReconstructionArguments().output_dir != VocodeArguments().output_dir


def test_flags_that_are_needed(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(ReconstructionArguments, ["--vae_checkpoint", "runs/x", "--input", "a.wav"], "")
    assert "--vae_checkpoint, --vocoder_checkpoint and --input are needed" in capsys.readouterr().err
