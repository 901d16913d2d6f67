"""Tab Voice: what the scripts write of a recording, Griffin-Lim beside it, distances, files that are refused."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from inference.reconstruct_audio import reconstruct
from inference.vocode import vocode
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, analyse
from tests.helpers.app.page import flags_of, upload, visitor
from tests.helpers.audio_latent_cache import save_audio_vae
from tests.helpers.spoken import needs_pesq
from tests.helpers.vocoder_checkpoint import (
    SMALL_MEL,
    SMALL_VOCODER,
    save_stage_checkpoint,
    small_vocoder,
    write_sound,
)
from utils.app.arguments import AppArguments
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs
from utils.app.tabs.voice import NO_VAE, fitting_speakers, fitting_vaes, installed_metrics
from utils.generation.arguments.audio import ReconstructionArguments, VocodeArguments
from utils.generation.audio import Synthesizer, load_vocoder, read_waveform
from utils.metrics.audio import missing_packages, pesq_wb, stoi

VOCODER, VAE, SPEAKERS, OTHER = (
    f"{run}/checkpoint-4" for run in ("vocoder/small", "audio_vae/small", "audio_vae/speakers", "audio_vae/other")
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A vocoder, VAEs of its log-mel without and with speakers, and a VAE of another."""
    runs = tmp_path_factory.mktemp("voice") / "runs"
    save_stage_checkpoint(small_vocoder(**SMALL_VOCODER), "vocoder", runs / "vocoder" / "small")
    save_audio_vae(runs / "audio_vae" / "other", settings=dataclasses.replace(SMALL_MEL, n_mels=32))
    save_audio_vae(runs / "audio_vae" / "speakers", settings=SMALL_MEL, speakers=["ann", "bob"])
    save_audio_vae(runs / "audio_vae" / "small", settings=SMALL_MEL)
    return runs


@pytest.fixture(scope="module")
def client(runs):
    with visitor(runs, max_seconds=2.0) as client:
        yield client


@pytest.fixture
def recording(tmp_path):
    """A file of 0.7 s, which is no whole number of frames, in two channels at another rate than the models'."""
    write_sound(tmp_path / "my recording.flac", seconds=0.7013, rate=11025, n_channels=2)
    return tmp_path / "my recording.flac"


@pytest.fixture(scope="module")
def without_vae(client, tmp_path_factory):
    """The recording, and what the tab shows of it without a VAE."""
    file = tmp_path_factory.mktemp("recording") / "a.wav"
    write_sound(file, seconds=0.7013, rate=11025, n_channels=2)
    return file, client.predict(VOCODER, NO_VAE, None, upload(file), api_name="/voice")


def played(file):
    return soundfile.read(file, dtype="float32")[0]


def error(waveform, expected):
    """The largest difference of two waveforms (S,) of one length."""
    assert len(waveform) == len(expected)
    return float(np.abs(waveform - expected).max())


@pytest.mark.parametrize(("vae", "speaker"), [(VAE, ""), (SPEAKERS, "bob")])
def test_players_have_what_the_shown_command_lines_write(client, recording, tmp_path, vae, speaker):
    *files, sheet, table, status, lines = client.predict(VOCODER, vae, speaker, upload(recording), api_name="/voice")
    first, second = lines.splitlines()
    others = ["--input", recording, "--output_dir"]
    vocode(flags_of(first, "inference/vocode.py", VocodeArguments, *others, tmp_path / "a"))
    reconstruct(flags_of(second, "inference/reconstruct_audio.py", ReconstructionArguments, *others, tmp_path / "b"))
    source, vocoder, with_vae, baseline = map(played, files)
    for waveform, name in (
        (vocoder, "a/my recording.wav"),
        (vocoder, "b/my recording_vocoder.wav"),
        (with_vae, "b/my recording_reconstruction.wav"),
    ):
        assert error(waveform, played(tmp_path / name)) <= 2**-15
    assert len(source) == len(baseline) == len(vocoder) and error(with_vae, vocoder) > 1e-3
    record = json.loads((tmp_path / "a" / "settings.json").read_text())["files"][0]
    assert [row[0] for row in table["data"]] == ["vocoder", "VAE and vocoder", "Griffin-Lim"]
    assert float(table["data"][0][1]) == pytest.approx(record["mel_l1"], abs=6e-4)
    assert f"{record['seconds']:.2f} s at 8000 Hz" in status and Image.open(sheet).height > 4 * 80


def test_griffin_lim_is_that_of_the_recordings_log_mel(without_vae):
    _, (source, _, with_vae, baseline, *_) = without_vae
    assert with_vae is None
    waveform = torch.from_numpy(played(source))
    expected = griffin_lim(analyse(waveform, LogMel(SMALL_MEL))[None], SMALL_MEL)[0, : len(waveform)]
    # The player's recording is rounded to 16 bits.
    assert error(played(baseline), expected.numpy()) < 5e-3


@needs_pesq
def test_scores_compare_with_the_recording(runs, without_vae):
    recording, (*_, table, _, _) = without_vae
    synthesizer = Synthesizer(load_vocoder(runs / VOCODER))
    mel, n_samples = synthesizer.read(recording)
    pair = synthesizer.waveform(mel)[:n_samples], read_waveform(recording, 8000)
    assert table["headers"] == ["", "log-mel L1", "PESQ", "STOI"]
    for text, metric in zip(table["data"][0][2:], (pesq_wb, stoi), strict=True):
        assert float(text) == pytest.approx(metric(*pair, 8000), abs=1e-3)


def test_metrics_are_those_whose_packages_are_installed():
    assert list(installed_metrics()) == [key.upper() for key in ("pesq", "stoi") if not missing_packages(key)]


def test_errors_are_in_our_words(client, recording, tmp_path):
    write_sound(tmp_path / "long.wav", seconds=2.5)
    (tmp_path / "text.wav").write_text("no sound")
    good = upload(recording)
    for values, message in (
        ((VOCODER, NO_VAE, "", None), "no file is given; drop a recording"),
        ((VOCODER, NO_VAE, "", upload(tmp_path / "text.wav")), "text.wav is no audio of a known format"),
        ((VOCODER, NO_VAE, "", upload(tmp_path / "long.wav")), "more than --max_seconds=2"),
        (("vocoder", NO_VAE, "", good), "'vocoder' is no complete checkpoint of vocoder"),
        ((VOCODER, VOCODER, "", good), "is no complete checkpoint of audio_vae"),
        ((VOCODER, OTHER, "", good), "use different log-mels"),
        ((VOCODER, SPEAKERS, "", good), r"needs --speaker \(speakers: ann, bob\)"),
        ((VOCODER, VAE, "ann", good), "--speaker ann has no effect"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            client.predict(*values, api_name="/voice")
        assert "Traceback" not in str(caught.value)


def test_components_offer_what_fits(runs):
    context = Context(gr=None, args=AppArguments(), runs=Runs(runs), models=Models(), jobs=Jobs(None))
    assert fitting_vaes(context, VOCODER) == {"vae": {"choices": [VAE, SPEAKERS, NO_VAE], "value": VAE}}
    assert fitting_vaes(context, "x") == {"vae": {"choices": [NO_VAE], "value": NO_VAE}}
    speakers = {"choices": ["ann", "bob"], "value": "ann", "visible": True}
    assert fitting_speakers(context, SPEAKERS) == {"speaker": speakers}
    for name in (VAE, NO_VAE):
        assert fitting_speakers(context, name) == {"speaker": {"choices": [], "value": None, "visible": False}}
