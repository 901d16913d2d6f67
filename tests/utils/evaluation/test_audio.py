"""evaluate.py on small untrained vocoders and audio VAEs: what it writes, what it measures, what it refuses."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from dataset_loading.audio.cached import VocoderDataset
from dataset_loading.audio.signal import resample
from dataset_loading.embedded.speech import load_speaker
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, MelSettings
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from preprocess_audio_vae_dataset import AudioVAEPreprocess
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.spoken import needs_pesq, run_first
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint, small_vocoder
from utils.checkpoints import COMPLETE, STAGE, load_model, mark_complete
from utils.command_line import parse_arguments
from utils.metrics.audio import mcd, mel_l1, pesq_wb
from utils.metrics.words import word_error_rate

SENTENCES = [
    "Please say the name of the person that you are calling.",
    "Goodbye.",
    "Thank you.",
    "Please try again.",
]
QUICK = ["--metrics", "mel", "stft", "--max_samples", "2"]


def write_speech(folder: Path, speaker: str) -> Path:
    """The sentences as wav files with transcripts."""
    folder.mkdir(parents=True)
    voice = load_speaker()
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "transcription", "speaker"])
        for number, text in enumerate(SENTENCES):
            waveform = resample(voice.speak(text, "en-us+f2", rate=160, pitch=50), voice.sample_rate, 16000)
            soundfile.write(folder / f"{number}.wav", waveform.numpy(), 16000)
            rows.writerow([f"{number}.wav", text, speaker])
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """The same clips as a vocoder's cache and as a VAE's, by stage."""
    folder = tmp_path_factory.mktemp("speech")
    words = ["--dataset_name", str(run_first(write_speech, folder / "train", "ann")), "--num_workers", "0"]
    words += ["--keep_duplicates"]
    words += ["--validation_dataset", str(run_first(write_speech, folder / "test", "ann"))]
    AudioVocoderPreprocess.main([*words, "--output_dir", str(folder / "vocoder")])
    AudioVAEPreprocess.main([*words, "--output_dir", str(folder / "audio_vae")])
    return {"vocoder": folder / "vocoder", "audio_vae": folder / "audio_vae"}


def save(model, stage: str, run_dir: Path, cache: Path) -> Path:
    """A checkpoint as a run on the cache writes it."""
    folder = save_stage_checkpoint(model, stage, run_dir)
    record = json.loads((folder / STAGE).read_text())
    record["data"] = {"folder": str(cache), "fingerprint": VocoderDataset(cache, "train").fingerprint}
    (folder / STAGE).write_text(json.dumps(record))
    (folder / COMPLETE).unlink()
    mark_complete(folder)
    return folder


@pytest.fixture(scope="module")
def vocoder(caches, tmp_path_factory):
    model = small_vocoder(**MelSettings().as_dict())
    return save(model, "vocoder", tmp_path_factory.mktemp("runs") / "vocoder" / "small", caches["vocoder"])


def small_vae(cache: Path, **fields) -> AudioVAE:
    torch.manual_seed(0)
    vae = AudioVAE.from_preset("tiny", width=16, n_encoder_blocks=1, n_decoder_blocks=1, **fields)
    dataset = VocoderDataset(cache, "train")
    vae.fit_to_data([dataset[i]["mel"] for i in range(len(dataset))])
    return vae


@pytest.fixture(scope="module")
def vae(caches, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "audio_vae" / "small"
    return save(small_vae(caches["vocoder"]), "audio_vae", run_dir, caches["vocoder"])


@pytest.fixture(scope="module")
def report(vocoder):
    """All metrics of a vocoder."""
    return evaluate.main(["--checkpoint", str(vocoder.parent), "--contact_sheet", "2"])


@pytest.fixture
def run(tmp_path):
    """run(checkpoint, *words): evaluate quickly into `tmp_path`; returns the report."""
    return lambda checkpoint, *words: evaluate.main(
        ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), *map(str, words)]
    )


@pytest.fixture
def refused(run, caplog, capsys):
    """refused(checkpoint, *words): the message of an evaluation that ends with status 2."""

    def call(checkpoint, *words):
        with pytest.raises(SystemExit) as stop:
            run(checkpoint, *words)
        assert stop.value.code == 2
        return caplog.text + capsys.readouterr().err

    return call


# ---- Vocoders.


def test_progress_is_told(run, vocoder, caplog):
    caplog.set_level("INFO")
    run(vocoder, "--metrics", "mel", "--max_samples", "2")
    assert "all rows and their metrics: 0 of 2 clips in" in caplog.text
    assert "all rows and their metrics: 2 of 2 clips in" in caplog.text


@needs_pesq
def test_the_report_is_complete(report, vocoder):
    assert json.loads((vocoder.parent / "metrics.json").read_text()) == report
    assert report["stage"] == "vocoder" and report["data"]["n_samples"] == 4 and report["data"]["is_the_runs_own"]
    assert list(report["scores"]) == ["ground_truth", "griffin_lim", "model"] and report["reference"] == "ground_truth"
    for name, row in report["scores"].items():
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        assert (row["real_time_factor"] is None) == (name == "ground_truth")
        assert row.keys() - {"wer"} <= report["definitions"].keys()
    truth = report["scores"]["ground_truth"]
    assert truth["pesq_wb"] > 4.6 and truth["stoi"] > 0.999 and truth["speaker_similarity"] > 0.999
    assert truth["mel_l1"] == pytest.approx(0, abs=1e-5) and truth["voicing_f1"] == 1
    assert report["model"]["mel"] == MelSettings().as_dict()


@needs_pesq
def test_rows_are_means_over_the_clips(report, vocoder, caches):
    dataset, log_mel = VocoderDataset(caches["vocoder"], "validation"), LogMel(MelSettings())
    model, scores = load_model(Vocoder, vocoder), {"model": [], "griffin_lim": []}
    for i in range(len(dataset)):
        sample = dataset[i]
        with torch.no_grad():
            made = {
                "model": model(sample["mel"][None])[0],
                "griffin_lim": griffin_lim(sample["mel"][None], model.config.mel)[0],
            }
        for name, waveform in made.items():
            mel = log_mel(waveform[None])[0]
            both = (mel, sample["mel"])
            scores[name].append([pesq_wb(waveform, sample["waveform"], 16000), mel_l1(*both), mcd(*both)])
    for name, values in scores.items():
        found = [report["scores"][name][key] for key in ("pesq_wb", "mel_l1", "mcd_db")]
        assert found == pytest.approx(torch.tensor(values).mean(0).tolist(), rel=1e-3)


def test_words_are_counted_where_there_are_four_or_more(report):
    transcripts = report["transcripts"]
    assert {each["text"] for each in transcripts} == {SENTENCES[0]}
    assert report["n_clips_defined"]["model"]["wer"] == 1
    for name in report["scores"]:
        expected = word_error_rate([each[name] for each in transcripts], [each["text"] for each in transcripts])
        assert report["scores"][name]["wer"] == expected
    assert report["scores"]["ground_truth"]["wer"] < 0.3


def test_audio_sheet_and_tensorboard(report, vocoder, caches):
    run_dir, dataset = vocoder.parent, VocoderDataset(caches["vocoder"], "validation")
    assert Image.open(run_dir / "contact_sheet.png").width > 600
    files = sorted(path.name for path in (run_dir / "sounds").iterdir())
    keys = [dataset.entries[i]["key"] for i in (0, 2)]
    assert files == sorted(f"{key}_{row}.wav" for key in keys for row in report["scores"])
    samples, rate = soundfile.read(run_dir / "sounds" / f"{keys[0]}_ground_truth.wav", dtype="float32")
    assert rate == 16000 and (torch.from_numpy(samples) - dataset[0]["waveform"]).abs().max() < 1e-3
    events = EventAccumulator(str(run_dir), size_guidance={"audio": 0}).Reload()
    group = "evaluation_vocoder_validation_raw"
    (event,) = events.Scalars(f"{group}/stoi")
    assert event.step == 4 and event.value == pytest.approx(report["scores"]["model"]["stoi"], rel=1e-5)
    assert f"{group}/{keys[0]}_model" in events.Tags()["audio"]


def test_a_subset_of_metrics(run, vocoder, capsys, tmp_path):
    report = run(vocoder, *QUICK)
    assert report["scores"]["model"].keys() == {"mel_l1", "mcd_db", "stft_distance", "real_time_factor"}
    assert {file.name.partition(".out")[0] for file in tmp_path.iterdir()} == {"metrics.json", "events"}
    text = capsys.readouterr().out
    for phrase in ("ground truth", "Griffin-Lim, 60", "this model", "mel-L1", "(low)", "RTF"):
        assert phrase in text
    assert "PESQ" not in text


def test_an_absent_package_is_named_in_the_table_and_the_report(run, vocoder, capsys, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)  # As where the package is not installed.
    report = run(vocoder, "--metrics", "pesq", "mel", "--max_samples", "1")
    assert report["scores"]["model"].keys() == {"mel_l1", "mcd_db", "real_time_factor"}
    sentence = report["not_measured"]["pesq"]
    assert sentence in caplog.text and sentence in " ".join(capsys.readouterr().out.split())


def test_bf16_changes_little(run, vocoder):
    report, reference = run(vocoder, *QUICK, "--bf16"), run(vocoder, *QUICK)
    difference = report["scores"]["model"]["mel_l1"] - reference["scores"]["model"]["mel_l1"]
    assert report["precision"] == "bf16 autocast" and 0 < abs(difference) < 0.05


def test_flags_of_images_are_refused_for_audio_and_the_reverse(refused, vocoder, vae, image_cache, tmp_path):
    for words in (["--dataset", "x"], ["--batch_size", "3"], ["--vocoder_checkpoint", "x"], ["--references", "jpeg"]):
        assert f"{words[0]}: no effect on {vocoder}, which is of stage 'vocoder'" in refused(vocoder, *words)
    image_vae = save_checkpoint(tmp_path / "image_vae", image_cache)
    assert "--metrics: no effect" in refused(image_vae, "--metrics", "mel")
    wrong = refused(vocoder, "--metrics", "mel", "pesk")
    assert "'pesk' must be one of 'pesq', 'stoi', 'mel'" in wrong and "did you mean 'pesq'?" in wrong
    assert "--metrics is empty" in refused(vae, "--metrics")


def test_broken_weights_name_the_clip(refused, caches, tmp_path):
    model = small_vocoder(**MelSettings().as_dict())
    next(model.parameters()).data.fill_(math.nan)
    folder = save(model, "vocoder", tmp_path / "run", caches["vocoder"])
    message = refused(folder, *QUICK)
    assert "values that are not finite" in message and "0-" in message


def test_another_mel_is_refused_with_both(refused, caches, tmp_path):
    folder = save(small_vocoder(), "vocoder", tmp_path / "run", caches["vocoder"])
    message = refused(folder, *QUICK)
    assert "sample_rate=16000" in message and "sample_rate=8000" in message


# ---- Audio VAEs.


def test_a_vae_with_a_vocoder(run, vae, vocoder, capsys, tmp_path):
    report = run(vae, *QUICK, "--vocoder_checkpoint", vocoder.parent, "--contact_sheet", 1)
    scores = report["scores"]
    assert list(scores) == ["ground_truth", "resynthesis", "griffin_lim", "model"]
    assert report["reference"] == "ground_truth"
    assert scores["ground_truth"]["mel_l1"] == pytest.approx(0, abs=1e-5)
    assert scores["resynthesis"]["mel_l1"] < scores["model"]["mel_l1"]
    assert 0 < scores["model"]["reconstruction_l1"] < scores["model"]["mel_l1"]
    assert report["model"]["vocoder"] == str(vocoder) and report["model"]["vocoder_weights"] == "raw"
    assert report["model"]["vocoding_real_time_factor"] > 0
    assert report["model"]["compression"] == pytest.approx(8, rel=0.1)
    latents = report["latents"]
    assert len(latents["mean"]) == 20 and all(0.3 < std < 3 for std in latents["std"]) and not any(latents["dead"])
    text = capsys.readouterr().out
    assert "this VAE + vocoder" in text and "Latent channels: 20, dead: 0" in text and "31.2 frames/s" in text
    assert "Griffin-Lim, 60" in text and "vocoding" in text
    assert len(list((tmp_path / "sounds").iterdir())) == 4


def test_a_broken_vocoder_is_named(refused, vae, caches, tmp_path):
    model = small_vocoder(**MelSettings().as_dict())
    next(model.parameters()).data.fill_(math.nan)
    broken = save(model, "vocoder", tmp_path / "broken", caches["vocoder"])
    assert f"{broken} generates values that are not finite for 0-" in refused(
        vae, *QUICK, "--vocoder_checkpoint", broken
    )


def test_a_vae_without_waveforms_is_compared_with_the_resynthesis(run, vae, vocoder, caches, capsys, caplog):
    report = run(vae, *QUICK, "--cached_dataset", caches["audio_vae"])
    assert list(report["scores"]) == ["resynthesis", "model"] and report["reference"] == "resynthesis"
    assert report["scores"]["resynthesis"]["stft_distance"] == 0 and not report["data"]["is_the_runs_own"]
    assert "this VAE + Griffin-Lim" in capsys.readouterr().out and report["model"]["vocoder_weights"] is None
    message = f"{caches['audio_vae']} holds no recorded waveforms"
    assert message in caplog.text and "--cached_dataset a folder" in caplog.text
    report = run(vae, *QUICK, "--cached_dataset", caches["audio_vae"], "--vocoder_checkpoint", vocoder)
    assert list(report["scores"]) == ["resynthesis", "griffin_lim", "model"] and report["reference"] == "resynthesis"


def test_numbers_of_the_vae_alone(run, vae, caches):
    report = run(vae, *QUICK)
    dataset, model = VocoderDataset(caches["vocoder"], "validation"), load_model(AudioVAE, vae)
    distances = []
    for i in (0, 2):
        mel = dataset[i]["mel"]
        with torch.no_grad():
            made = model(mel[None]).reconstruction[0].clamp_min(MelSettings().log_floor)
        distances.append(mel_l1(made, mel))
    assert report["scores"]["model"]["reconstruction_l1"] == pytest.approx(sum(distances) / 2, rel=1e-4)


def test_conv2d_with_speakers(run, refused, caches, tmp_path):
    fields = {"architecture": "conv2d", "latent_channels": 6}
    known = small_vae(caches["vocoder"], speakers=["ann", "bob"], **fields)
    report = run(save(known, "audio_vae", tmp_path / "known", caches["vocoder"]), *QUICK)
    assert len(report["latents"]["dead"]) == 6
    stranger = small_vae(caches["vocoder"], speakers=["bob"], **fields)
    folder = save(stranger, "audio_vae", tmp_path / "stranger", caches["vocoder"])
    assert "does not know the speaker 'ann', only ['bob']" in refused(folder, *QUICK)


def test_a_vocoder_of_another_mel_or_stage_is_refused(refused, vae, tmp_path):
    other = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "other")
    message = refused(vae, *QUICK, "--vocoder_checkpoint", other)
    assert "different log-mels" in message and "use a vocoder that was trained on the same log-mels" in message
    assert "one of stage 'vocoder' is needed" in refused(vae, *QUICK, "--vocoder_checkpoint", vae)


def test_clips_that_are_not_english_have_no_word_error_rate(run, vocoder, caplog, capsys):
    report = run(vocoder, "--metrics", "wer", "--transcript_language", "es-mx")
    assert not report["transcripts"] and "wer" not in report["scores"]["model"]
    assert report["recognizer"]["n_other_languages"] == 1 and "no WER for 1 clips" in caplog.text
    table = " ".join(capsys.readouterr().out.split())
    assert "Whisper tiny.en (English). 1 clips are not English" in table
    # Transcripts that the recogniser does not find in the recordings are doubtful.
    args = parse_arguments(evaluate.EvaluateArguments, ["--checkpoint", str(vocoder), "--metrics", "wer"], "")
    evaluator = evaluate.build_evaluator(args)
    assert "0.90 on the reference: are the transcripts English" in evaluator.words_note(3, 0.9)
    assert "reference" not in evaluator.words_note(3, 0.1)
