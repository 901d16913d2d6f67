"""Vocoding of audio files and log-mels with a small vocoder."""

import json
import os

import pytest
import soundfile
import torch

from dataset_loading.audio.decoding import decode_audio
from dataset_loading.audio.signal import save_waveform
from inference.vocode import vocode
from model.audio.spectral import LogMel, analyse
from model.audio.vocoders import Vocoder
from tests.helpers.mel_cache import SETTINGS, write_mel_cache
from tests.helpers.processes import newest_results
from tests.helpers.runs import changed
from tests.helpers.vocoder_checkpoint import SMALL_MEL, save_stage_checkpoint, small_vocoder, write_sound
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.generation.arguments.audio import VocodeArguments
from utils.generation.audio import Synthesizer, cache_problem
from utils.generation.files import claim_folder, find_inputs
from utils.generation.vocoder_onnx import gliding_tones


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path_factory.mktemp("runs") / "vocoder" / "small")


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(*words): vocode into `tmp_path / "out"`; returns the settings and the waveforms there by name."""

    def call(*words):
        folder = tmp_path / "out"
        words = changed(["--checkpoint", str(checkpoint.parent), "--output_dir", str(folder)], *map(str, words))
        vocode(parse_arguments(VocodeArguments, words, ""))
        folder = newest_results(folder)
        waveforms = {file.name: soundfile.read(file)[0] for file in folder.glob("*.wav")}
        assert not list(folder.glob("*.tmp"))
        return json.loads((folder / "settings.json").read_text()), waveforms

    return call


def test_the_result_is_the_vocoders_with_its_own_analysis(run, checkpoint, tmp_path, capsys):
    write_sound(tmp_path / "a.wav", seconds=0.5)
    settings, waveforms = run("--input", tmp_path / "a.wav")
    vocoder = load_model(Vocoder, checkpoint)
    waveform = decode_audio({"path": str(tmp_path / "a.wav"), "bytes": None})[0]
    padded = torch.nn.functional.pad(waveform, (0, -waveform.shape[1] % SMALL_MEL.hop_length))
    with torch.no_grad():
        expected = vocoder.synthesize(LogMel(SMALL_MEL)(padded))[0, :4000]
    assert waveforms.keys() == {"a.wav"} and len(waveforms["a.wav"]) == 4000
    assert torch.allclose(torch.from_numpy(waveforms["a.wav"]).float(), expected.clamp(-1, 1), atol=1 / 32768 + 1e-5)
    assert settings["vocoder_checkpoint"] == str(checkpoint) and settings["vocoder_weights"] == "raw"
    assert settings["mel"] == SMALL_MEL.as_dict() and "git_commit" in settings
    assert settings["files"][0]["input"] == str(tmp_path / "a.wav") and settings["files"][0]["seconds"] == 0.5
    assert "a.wav  0.50 s, " in capsys.readouterr().out


@pytest.mark.parametrize("chunk_frames", [1, 7, 50, 201])
def test_long_waveforms_are_analysed_in_chunks(chunk_frames):
    waveform = torch.randn(200 * SMALL_MEL.hop_length + 3, generator=torch.Generator().manual_seed(0))
    whole, found = analyse(waveform, LogMel(SMALL_MEL)), analyse(waveform, LogMel(SMALL_MEL), chunk_frames)
    assert found.shape == whole.shape == (SMALL_MEL.n_mels, 201)
    assert (found - whole).abs().max() < 1e-5


def test_a_log_mel_gives_what_its_waveform_gives(run, tmp_path):
    write_sound(tmp_path / "a.wav", seconds=0.512)
    waveform = decode_audio({"path": str(tmp_path / "a.wav"), "bytes": None})[0][0]
    mel = analyse(waveform, LogMel(SMALL_MEL))
    torch.save({"mel": mel}, tmp_path / "b.pt")
    torch.save(mel, tmp_path / "c.pt")
    _, waveforms = run("--input", *(tmp_path / name for name in ("a.wav", "b.pt", "c.pt")))
    assert (waveforms["a.wav"] == waveforms["b.wav"]).all() and (waveforms["b.wav"] == waveforms["c.wav"]).all()


def test_channels_rates_formats_and_folders(run, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write_sound(folder / "stereo.flac", rate=22050, n_channels=2)
    write_sound(folder / "deep" / "long.ogg", rate=16000, seconds=1.0)
    write_sound(folder / "short.wav", seconds=0.001)
    _, waveforms = run("--input", folder)
    lengths = {name: len(samples) for name, samples in waveforms.items()}
    assert lengths == {"stereo.wav": 4000, "deep__long.wav": 8000, "short.wav": 8}


def test_pieces_give_the_same_waveform():
    vocoder = small_vocoder()
    mel = LogMel(SMALL_MEL)(gliding_tones(1, 300 * SMALL_MEL.hop_length, SMALL_MEL.sample_rate))[0]
    whole = Synthesizer(vocoder).waveform(mel)
    for chunk_frames in (10, 64, 299, 1000):
        assert (Synthesizer(vocoder, chunk_frames).waveform(mel) - whole).abs().max() <= 1e-5


def test_bf16_is_another_rounding_of_the_same_waveform(run, tmp_path):
    write_sound(tmp_path / "a.wav", seconds=0.5)
    _, exact = run("--input", tmp_path / "a.wav")
    settings, rounded = run("--input", tmp_path / "a.wav", "--bf16")
    difference = abs(exact["a.wav"] - rounded["a.wav"]).max()
    assert settings["bf16"] and 0 < difference < 0.1 * abs(exact["a.wav"]).max()


def test_averaged_weights_are_taken_where_they_are(tmp_path):
    vocoder = small_vocoder()
    averaged = {name: value + 0.01 for name, value in vocoder.state_dict().items()}
    folder = save_stage_checkpoint(vocoder, "vocoder", tmp_path / "run", averaged)
    for weights, expected in (("ema", averaged), ("raw", vocoder.state_dict())):
        args = parse_arguments(VocodeArguments, ["--checkpoint", "a", "--input", "b", "--weights", weights], "")
        loaded = Synthesizer.load(str(folder), args).vocoder.state_dict()
        assert all(torch.equal(loaded[name].cpu(), value) for name, value in expected.items())


def test_damaged_files_are_left_out(run, tmp_path, caplog):
    write_sound(tmp_path / "a.wav")
    (tmp_path / "b.flac").write_bytes(b"fLaC broken")
    torch.save(torch.zeros(SMALL_MEL.n_mels + 1, 9), tmp_path / "c.pt")
    torch.save({"mel": torch.full((SMALL_MEL.n_mels, 9), torch.nan)}, tmp_path / "d.pt")
    (tmp_path / "e.pt").write_bytes(b"broken")
    torch.save(torch.zeros(SMALL_MEL.n_mels, 1), tmp_path / "f.pt")
    damaged = [tmp_path / name for name in ("b.flac", "c.pt", "d.pt", "e.pt", "f.pt")]
    with pytest.raises(ValueError, match=r"5 of 6 files gave no result: .*b\.flac"):
        run("--input", tmp_path / "a.wav", *damaged)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.wav", "settings.json"}
    reasons = ["no audio", "a tensor of shape (41, 9)", "not finite", "not a file of tensors, or damaged\n"]
    reasons += ["a log-mel of 1 frames is too short, at least 2 are needed"]
    for name, reason in zip(damaged, reasons, strict=True):
        assert f"{name} is left out: " in caplog.text and reason in caplog.text


def test_wild_samples_and_log_mels_end_no_other_file(run, tmp_path):
    wild = torch.full((4000,), 0.1)
    wild[7] = 1e30
    soundfile.write(tmp_path / "a_bad.wav", wild.numpy(), 8000, "FLOAT")
    torch.save(torch.full((SMALL_MEL.n_mels, 9), 90.0), tmp_path / "b_bad.pt")
    write_sound(tmp_path / "c_good.wav")
    with pytest.raises(
        ValueError, match=r"2 of 3 files .*a_bad\.wav \(damaged: 1 samples.*b_bad\.pt \(values up to 90"
    ):
        run("--input", tmp_path)
    assert {file.name for file in (tmp_path / "out").glob("*.wav")} == {"c_good.wav"}


def test_results_of_an_earlier_run_stay(run, tmp_path, caplog):
    write_sound(tmp_path / "a.wav")
    _, first = run("--input", tmp_path / "a.wav")
    settings, second = run("--input", tmp_path / "a.wav", "--chunk_frames", 9)
    assert settings["chunk_frames"] == 9 and first.keys() == second.keys() and "out_2" in caplog.text
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["chunk_frames"] == 2000
    # A sheet without settings is that of a script that wrote none.
    (tmp_path / "out" / "settings.json").unlink()
    (tmp_path / "out" / "sheet.png").touch()
    assert claim_folder(str(tmp_path / "out"), VocodeArguments()).name == "out_3"
    (tmp_path / "file").touch()
    for name, message in ((tmp_path / "file", "--output_dir .*file is a file"), ("", "--output_dir is empty")):
        with pytest.raises((OSError, ValueError), match=message):
            claim_folder(str(name), VocodeArguments())


def test_a_numbered_folder_may_hold_inputs(run, tmp_path):
    for name in ("out", "out_2"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "settings.json").touch()
    write_sound(tmp_path / "out_2" / "a.wav")
    before = (tmp_path / "out_2" / "a.wav").read_bytes()
    _, waveforms = run("--input", tmp_path / "out_2")
    assert waveforms.keys() == {"a.wav"} and (tmp_path / "out_3" / "a.wav").exists()
    assert [file.read_bytes() for file in (tmp_path / "out_2").iterdir()] == [before]


def test_every_input_has_a_name_of_its_own_and_others_are_said(tmp_path, caplog):
    files = [tmp_path / name for name in ("n1/a.flac", "n1/a.wav", "n1/a_2.wav", "n2/a.wav", "n2/deep/b.wav")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "n2" / "notes.txt").touch()
    found = find_inputs([str(tmp_path / "n1"), str(tmp_path / "n2"), str(files[0])], [".wav", ".flac"])
    assert list(found.values()) == [*files, files[0]]
    assert list(found) == ["a", "a_2", "a_2_2", "a_3", "deep__b", "a_4"]
    assert [record.args[0] for record in caplog.records] == [tmp_path / "n2"] and "notes.txt" in caplog.text


def test_inputs_are_never_written_over(run, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_sound(folder / "a.wav")
    before = (folder / "a.wav").read_bytes()
    for name in (folder, folder / ".." / "out" / "a.wav"):
        with pytest.raises(ValueError, match=r"a\.wav is an input and would be overwritten.* --output_dir"):
            run("--input", name)
    assert (folder / "a.wav").read_bytes() == before and len(list(folder.iterdir())) == 1
    write_sound(tmp_path / "b.wav")
    assert run("--input", tmp_path / "b.wav")[1].keys() == {"a.wav", "b.wav"}


def test_peaks_beyond_full_scale_are_scaled_and_said(tmp_path, caplog):
    synthesizer = Synthesizer(small_vocoder())
    mel = LogMel(SMALL_MEL)(gliding_tones(1, 100 * SMALL_MEL.hop_length, SMALL_MEL.sample_rate))[0]
    peak = synthesizer.waveform(mel).abs().max()
    for factor in (0.9, 1.8):  # Of the loudness.
        caplog.clear()
        waveform = synthesizer.waveform(mel + torch.log(factor / peak))
        gain = synthesizer.write(mel + torch.log(factor / peak), 6400, tmp_path / "a.wav")["gain"]
        assert gain == pytest.approx(min(1, 1 / waveform.abs().max().item()), rel=1e-5)
        assert ("a.wav: peaks were 1.8" in caplog.text) == (factor > 1)
        saved, _ = soundfile.read(tmp_path / "a.wav")
        assert abs(saved - gain * waveform.numpy()).max() < 1e-6
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_24"


def test_a_folder_of_another_log_mel_is_refused(checkpoint, run, tmp_path):
    cache = write_mel_cache(tmp_path / "cache", SETTINGS)
    with pytest.raises(ValueError, match="differ in sample_rate, n_fft") as error:
        run("--input", cache / "validation")
    assert str(checkpoint) in str(error.value) and "python preprocess_audio_vae_dataset.py" in str(error.value)
    # It is opened once for all of its files.
    n_opened = cache_problem.cache_info().misses
    with pytest.raises(ValueError, match="differ in sample_rate, n_fft"):
        run("--input", cache / "train")
    assert len(list((cache / "train").iterdir())) > 1 and cache_problem.cache_info().misses == n_opened + 1


def test_other_stages_and_missing_inputs_are_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run("--input", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no inputs in"):
        run("--input", tmp_path)
    write_sound(tmp_path / "a.wav")
    other = save_stage_checkpoint(small_vocoder(), "image_vae", tmp_path / "other")
    with pytest.raises(ValueError, match="of stage 'image_vae'; one of stage 'vocoder' is needed"):
        run("--input", tmp_path / "a.wav", "--checkpoint", other)


def test_a_broken_vocoder_is_named():
    vocoder = small_vocoder()
    next(vocoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        Synthesizer(vocoder).waveform(torch.zeros(SMALL_MEL.n_mels, 20))


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    save_waveform(torch.tensor([0.5, -2.0, 3.0, 0.0]), 8000, tmp_path / "a.wav")
    before = (tmp_path / "a.wav").read_bytes()
    assert save_waveform(torch.tensor([0.5, -2.0]), 8000, tmp_path / "b.wav") == pytest.approx(0.5)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_waveform(torch.zeros(9), 8000, tmp_path / "a.wav")
    assert (tmp_path / "a.wav").read_bytes() == before


def test_flags_that_are_needed(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(VocodeArguments, ["--checkpoint", "runs/x"], "")
    assert "--checkpoint and --input are needed" in capsys.readouterr().err
