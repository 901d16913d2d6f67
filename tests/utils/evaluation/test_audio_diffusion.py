"""evaluate.py on a small text-to-speech model: rows, scores, recordings, permuted texts, seeds, what is refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.cache_writer import save_tensors
from dataset_loading.embedded.sentences import SENTENCES
from pretrain_audio_diffusion import AudioDiffusionStage
from tests.helpers.audio_latent_cache import SETTINGS, SMALL_SPEECH, make_speech
from tests.helpers.runs import run_stage
from tests.helpers.vocoder_checkpoint import SMALL_VOCODER, save_stage_checkpoint, small_vocoder
from utils.evaluation.audio_diffusion import ROW_NAMES
from utils.evaluation.speech_scores import next_texts, recognition_scores
from utils.metrics import audio
from utils.metrics.pitch import Pitch, pitch_statistics


def write_recordings(mels, folder):
    """The cache of log-mels as one of vocoders, with tones as waveforms."""
    shutil.copytree(mels, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stage"] = "audio_vocoder"
    for split, entries in manifest["entries"].items():
        for entry in entries:
            n_samples = entry["length"] * SETTINGS.hop_length
            path = folder / split / f"{entry['key']}.pt"
            wave = 0.1 * torch.sin(torch.arange(n_samples) * 2 * torch.pi * 120 / SETTINGS.sample_rate)
            save_tensors(path, {**torch.load(path), "waveform": wave})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Spoken sentences with VAE, latents, recordings, a vocoder, and a run of a few steps."""
    folder = tmp_path_factory.mktemp("speech")
    make_speech(folder)
    write_recordings(folder / "mels", folder / "recordings")
    save_stage_checkpoint(small_vocoder(**SETTINGS.as_dict(), **SMALL_VOCODER), "vocoder", folder / "vocoder")
    words = [*SMALL_SPEECH, "--learning_rate", "1e-2"]
    run_stage(AudioDiffusionStage, words, folder / "latents", folder / "runs", "run", 4)
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """run(*words, name="out") -> the report, without recognition."""

    def call(*words, name="out"):
        words = ["--checkpoint", folder / "runs/audio_diffusion/run", "--output_dir", tmp_path / name, *words]
        vocoder = ["--vocoder_checkpoint", folder / "vocoder"]
        return evaluate.main([str(word) for word in [*words, *vocoder]])

    return call


@pytest.fixture
def refused(run, caplog, capsys):
    """refused(*words): the message of an evaluation that ends with status 2."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2
        return caplog.text + capsys.readouterr().err

    return call


def test_rows_scores_and_files(run, folder, tmp_path, capsys):
    words = ["--metrics", "pitch", "--sentences", "2", "--contact_sheet", "1", "--waveforms", folder / "recordings"]
    report = run(*words, "--max_samples", 3, "--curve", "--curve_steps", 1, 2, "--curve_scales", 1)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    scores = report["scores"]
    assert set(scores) == set(ROW_NAMES) and report["reference"] == "recording"
    # The recordings are tones of 120 Hz without any glide.
    assert scores["recording"]["f0_mean_hz"] == pytest.approx(120, abs=1)
    assert scores["recording"]["f0_std_semitones"] < 0.1
    # Rows of the true durations are as long as the recordings.
    for name in ("recording", "vocoder", "vae", "teacher"):
        assert scores[name]["length_ratio"] == pytest.approx(1) and scores[name]["real_time_factor"] is None
    assert scores["model"]["length_ratio"] == scores["prior"]["length_ratio"]
    assert scores["sentences"]["length_ratio"] is None
    assert all(scores[name]["real_time_factor"] > 0 for name in ("model", "prior", "sentences"))
    assert report["sampling"] == {
        "sampler": "euler",
        "n_steps": 4,
        "guidance_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "temperature": 0.4,
        "seed": 0,
    }
    assert [point["n_steps"] for point in report["curve"]["points"]] == [1, 2]
    # One clip in all rows, one sentence, the sheet.
    files = {path.name for path in (tmp_path / "out" / "sounds").iterdir()}
    key = AudioLatentDataset(folder / "latents", "validation").entries[0]["key"]
    assert files == {f"{key}_{name}.wav" for name in ROW_NAMES if name != "sentences"} | {"sentence_00_sentences.wav"}
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 200
    text = capsys.readouterr().out
    assert all(phrase in text for phrase in ("recordings", "prior alone", "new sentences", "F0 std", "Curve"))
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    assert "evaluation_latents_validation_ema/f0_std_semitones" in events.Tags()["scalars"]


def test_rows_that_are_not_asked_for_are_left_out(run, folder, tmp_path):
    words = ["--metrics", "pitch", "--sentences", "0", "--max_samples", "2", "--contact_sheet", "1"]
    some, none = run(*words, "--rows", "shuffled"), run(*words, "--waveforms", folder / "recordings", "--rows")
    assert list(some["scores"]) == ["vae", "model", "shuffled"]
    assert list(none["scores"]) == ["recording", "vae", "model"]
    assert some["scores"]["model"]["f0_mean_hz"] == none["scores"]["model"]["f0_mean_hz"]
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 100


def test_without_recordings_their_rows_are_missing_and_seeds_decide(run, caplog, monkeypatch):
    monkeypatch.setattr(audio, "LEFT_OUT", {"mos": ("DistillMOS", "pip install distillmos")})
    words = ["--metrics", "pitch", "mos", "--sentences", "0", "--max_samples", "2"]
    first, again, other = (run(*words, "--seed", seed, name=str(number)) for number, seed in enumerate((0, 0, 1)))
    assert "--waveforms" in caplog.text and first["reference"] == "vae"
    assert list(first["scores"]) == ["vae", "teacher", "model", "prior", "shuffled"]
    if audio.missing_packages("mos"):
        assert "pip install distillmos" in first["not_measured"]["mos"]

    def pitch(report):
        return {name: row["f0_mean_hz"] for name, row in report["scores"].items()}

    assert pitch(first) == pitch(again)
    assert pitch(first)["vae"] == pitch(other)["vae"] and pitch(first)["prior"] == pitch(other)["prior"]
    assert pitch(first)["model"] != pitch(other)["model"]


def test_what_does_not_fit_is_refused(run, refused, folder, tmp_path):
    assert "--metrics=['pesq']" in refused("--metrics", "pesq")
    assert "--curve_samplers" in refused("--curve", "--curve_samplers", "ddim")
    # The defaults of this stage decide which flags have an effect.
    assert "--guidance_interval has no effect" in refused("--guidance_interval", "0", "0.5")
    assert "--sentences=51" in refused("--sentences", "51")
    for flag in ("--curve_steps", "--curve_scales", "--curve_samples"):
        assert f"{flag} has no effect with curve=False" in refused(flag, "5")
    assert "--curve_steps is empty" in refused("--curve", "--curve_steps")
    assert "mels" in refused("--metrics", "pitch", "--waveforms", folder / "mels")
    lacking = shutil.copytree(folder / "recordings", tmp_path / "lacking")
    manifest = json.loads((lacking / "manifest.json").read_text())
    gone = manifest["entries"]["validation"].pop(0)
    (lacking / "manifest.json").write_text(json.dumps(manifest))
    message = refused("--metrics", "pitch", "--waveforms", lacking)
    assert f"--waveforms {lacking} has no clip {gone['key']}" in message


@pytest.mark.slow
def test_all_rows_are_recognised_and_compared_with_their_own_texts(run):
    report = run("--metrics", "wer", "speaker", "--max_samples", "2", "--sentences", "1")
    held_out, sentence = report["transcripts"][:2], report["transcripts"][2]
    assert all({"vae", "teacher", "model", "prior", "shuffled"} <= set(clip) for clip in held_out)
    assert sentence["text"] == SENTENCES[0] and set(sentence) == {"key", "text", "speaker", "sentences"}
    for name, row in report["scores"].items():
        clips = [clip for clip in report["transcripts"] if name in clip]
        expected = recognition_scores([clip[name] for clip in clips], [clip["text"] for clip in clips], 0)
        assert {key: row[key] for key in expected} == expected
    assert report["scores"]["vae"]["speaker_similarity"] == pytest.approx(1, abs=1e-4)


# ---- Scores.


def test_texts_are_moved_by_one_place_and_never_stay_the_same():
    assert next_texts(["a b", "c", "d"]) == [1, 2, 0]
    assert next_texts(["Go.", "go", "stop"]) == [2, 2, 0]
    assert next_texts(["Go.", "go"]) == [None, None]


def test_error_rates_are_of_long_texts_and_of_all():
    texts = ["press one for sales", "goodbye", "please hold the line now"]
    scores = recognition_scores(["press one for sale", "good by", "please hold the line now"], texts, 0)
    assert scores["wer"] == pytest.approx(1 / 9) and scores["wer_all"] == pytest.approx(3 / 10)
    assert (scores["n_words"], scores["n_clips"]) == (9, 2)
    assert (scores["n_words_all"], scores["n_clips_all"]) == (10, 3)
    low, high = scores["wer_interval"]
    assert low == 0 and high == pytest.approx(1 / 4) and scores["cer"] == pytest.approx(1 / 43)
    assert recognition_scores(["a"], ["..."], 0) == {}
    assert "wer" not in recognition_scores(["goodbye"], ["goodbye"], 0)


def test_pitch_statistics_by_hand():
    pitch = Pitch(torch.tensor([100.0, 0, 200]), torch.tensor([True, False, True]), torch.ones(3))
    statistics = pitch_statistics(pitch)
    assert statistics["f0_mean_hz"] == 150 and statistics["f0_std_semitones"] == pytest.approx(6)
    silent = Pitch(torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.ones(3))
    assert set(pitch_statistics(silent).values()) == {None}


def test_there_are_as_many_sentences_as_the_flag_allows():
    assert len(SENTENCES) == evaluate.EvaluateArguments().sentences == 50
