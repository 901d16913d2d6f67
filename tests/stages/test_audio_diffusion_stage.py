"""The stage of text to speech in one process, and speaking from its checkpoint: what is recorded, logged, refused."""

import io
import json
import shlex
import shutil

import numpy as np
import pytest
import soundfile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.audio.latents import AudioLatentDataset
from inference.text_to_speech import speak
from model.audio.diffusion import AudioDiffusion
from pretrain_audio_diffusion import AudioDiffusionStage
from tests.helpers.audio_latent_cache import (
    SETTINGS,
    SMALL_SPEECH,
    make_audio_latents,
    make_speech,
    save_audio_vae,
    write_manifest,
)
from tests.helpers.processes import newest_results
from tests.helpers.runs import changed, edit_record, move_alone, run_stage
from tests.helpers.vocoder_checkpoint import SMALL_VOCODER, save_stage_checkpoint, small_vocoder
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.evaluation.recordings import folder_of_recordings
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments, TextToSpeechArguments
from utils.generation.latents import vae_fingerprint
from utils.generation.speech import SpeechPipeline
from utils.metrics.audio import PACKAGES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Spoken sentences (mels), their VAE (vae), latents of speech (latents)."""
    folder = tmp_path_factory.mktemp("speech")
    make_speech(folder)
    save_stage_checkpoint(small_vocoder(**SETTINGS.as_dict(), **SMALL_VOCODER), "vocoder", folder / "vocoder")
    return folder


@pytest.fixture
def train(folder, tmp_path, fresh_logging):
    """train(name, steps, *flags) -> Run."""

    def call(name, steps, *flags, latents="latents"):
        return run_stage(AudioDiffusionStage, SMALL_SPEECH, folder / latents, tmp_path, name, steps, *flags)

    return call


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A run with a decent learning rate for a few steps, so that weights are no zeros."""
    words = [*SMALL_SPEECH, "--learning_rate", "1e-2"]
    return run_stage(AudioDiffusionStage, words, folder / "latents", tmp_path_factory.mktemp("runs"), "run", 6).folder


@pytest.fixture
def say(checkpoint, tmp_path):
    """say(*words) -> settings, and waveforms by file name."""

    def call(*words, name="out"):
        folder = tmp_path / name
        common = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--n_steps", "2"]
        speak(parse_arguments(TextToSpeechArguments, changed(common, *map(str, words)), ""))
        folder = newest_results(folder)
        sounds = {file.name: soundfile.read(file, dtype="float32")[0] for file in sorted(folder.glob("*.wav"))}
        return json.loads((folder / "settings.json").read_text()), sounds

    return call


def test_the_model_fits_its_latents_and_the_record_names_their_vae(checkpoint, folder):
    latents = AudioLatentDataset(folder / "latents", "train")
    model = load_model(AudioDiffusion, checkpoint)
    config, settings = model.config, latents.manifest["settings"]
    assert config.latent_channels == settings["latent_channels"] == 5 and config.compression == 2
    assert config.symbols == list(latents.tokenizer.symbols) and config.pause_symbols == [1, 2, 3]
    assert config.speakers == ["ann", "bob"] and config.conditioning == "speech"
    record = json.loads((checkpoint / "stage.json").read_text())
    assert record["latents"]["vae_fingerprint"] == settings["vae_fingerprint"]
    assert model.duration_factor != 1


def test_speech_is_logged(train, folder):
    flags = ["--n_logged_samples", "2", "--sentences", "Hold the line. Goodbye.", "--eval_steps", "2"]
    run = train("logged", 2, *flags, "--vocoder_checkpoint", str(folder / "vocoder"))
    events = EventAccumulator(str(run.folder.parent)).Reload()
    assert set(events.Tags()["images"]) == {"images/mel", "images/durations"}
    sounds = {f"sounds/{clip:02}_{kind}" for clip in (0, 1) for kind in ("1_real", "3_generated")}
    assert set(events.Tags()["audio"]) == {*sounds, "sounds/sentence_00", "sounds/sentence_01"}
    scalars = events.Tags()["scalars"]
    assert {"eval/loss", "eval/prior", "eval/length_ratio", "eval/loss_t0.50-1.00"} <= set(scalars)


def test_the_command_at_the_end_carries_vocoder_and_recordings(train, folder, tmp_path, capsys):
    def flags(latents: str = "latents") -> list[str]:
        vocoder = ["--n_logged_samples", "1", "--sentences", "--vocoder_checkpoint", str(folder / "vocoder")]
        train(latents, 1, *vocoder, latents=latents)
        return shlex.split(capsys.readouterr().out.splitlines()[-1])[3:]

    given = [
        *("--checkpoint", str(tmp_path / "audio_diffusion/latents")),
        *("--vocoder_checkpoint", f"{folder}/vocoder"),
    ]
    assert flags() == given  # The latents were made of log-mels alone.
    # The same from the cache of a vocoder, which holds the recordings.
    cache = shutil.copytree(folder / "mels", tmp_path / "vocoder_cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "stage": "audio_vocoder"}))
    settings = {"conditioning": "speech", "made_from": {"folder": str(cache)}}
    assert folder_of_recordings(settings) == str(cache)
    assert folder_of_recordings({**settings, "conditioning": "caption"}) == ""


def test_error_rates_are_measured_at_evaluations_where_the_packages_are(train, monkeypatch, caplog):
    flags = ["--wer_samples", "1", "--eval_steps", "1"]
    monkeypatch.setitem(PACKAGES, "wer", ["no_such_package"])
    lines = json.loads((train("without", 2, *flags).folder / "trainer_state.json").read_text())["log_history"]
    assert not any("eval_wer" in line for line in lines)
    assert caplog.text.count("no_such_package") == 1
    monkeypatch.undo()
    lines = json.loads((train("with", 1, *flags).folder / "trainer_state.json").read_text())["log_history"]
    assert any(line.get("eval_wer", -1) >= 0 and line["eval_cer"] >= 0 for line in lines)


def test_what_does_not_fit_the_latents_is_refused(train, folder, tmp_path):
    with pytest.raises(ValueError, match=r"latent_channels=8 does not fit .* latent_channels=5"):
        train("channels", 1, "--override", "latent_channels=8")
    with pytest.raises(ValueError, match=r"come from the VAE \w+; .*--vae_checkpoint"):
        train("vae", 1, "--vae_checkpoint", str(save_audio_vae(tmp_path / "other", latent_mean=0.3)))
    with pytest.raises(ValueError, match="preset 'tiny', not 'small'"):
        train("preset", 1, "--vae_config", "small")
    other = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "vocoder")
    with pytest.raises(ValueError, match=r"the vocoder .*n_mels"):
        train("mel", 1, "--n_logged_samples", "1", "--vocoder_checkpoint", str(other))
    with pytest.raises(ValueError, match="raise the budget"):
        train("budget", 1, "--batch_frames", "8")


def test_a_run_speaks_without_the_folders_of_its_vae_and_data(checkpoint, tmp_path, monkeypatch):
    latents = move_alone(shutil.copytree(checkpoint.parent, tmp_path / "run"), tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    pipeline = SpeechPipeline.load("moved")
    assert vae_fingerprint("moved/vae") == latents["vae_fingerprint"]
    ((_, waveform),) = pipeline.speak(["goodbye"], AudioSamplingArguments(n_steps=1), speaker="ann")
    assert len(waveform) > 0 and waveform.isfinite().all()
    shutil.rmtree("moved/vae")
    with pytest.raises(FileNotFoundError, match=rf"VAE {latents['vae_fingerprint']}.*--vae_checkpoint"):
        SpeechPipeline.load("moved")


def test_starting_from_a_model_of_another_vae_is_refused(train, checkpoint, folder, tmp_path):
    first = shutil.copytree(checkpoint, tmp_path / "first" / checkpoint.name)
    edit_record(first / "stage.json", lambda record: record["latents"].update(vae_fingerprint="another"))
    with pytest.raises(ValueError, match=r"vae_fingerprint='another'.*preprocess_audio_diffusion.* --vae_checkpoint "):
        train("second", 1, "--init_from", str(first))
    with pytest.raises(ValueError, match="is of stage 'vocoder'; one of stage 'audio_diffusion' is needed"):
        train("second", 1, "--init_from", str(folder / "vocoder"))


def test_a_dry_run_counts_steps_of_frames(folder, tmp_path, capsys):
    words = ["--cached_dataset", folder / "latents", "--output_dir", tmp_path, "--dry_run", "--num_train_epochs", 3]
    AudioDiffusionStage.main([str(word) for word in words])
    assert "of at most 800 latent frames on 1 process(es)" in capsys.readouterr().out


# ---- Speaking.


def test_texts_files_and_settings(say, tmp_path, folder, capsys):
    (tmp_path / "texts.txt").write_text("Goodbye.\n\n  Hold one.  \n", encoding="utf-8")
    words = ["--text", "Press one for sales. Or wait!", "--input", tmp_path / "texts.txt", "--speaker", "bob"]
    settings, sounds = say(*words, "--stream", "--vocoder_checkpoint", folder / "vocoder", "--pause", 0.5)
    names = ["000.wav", "001.wav", "002.wav"]
    assert [entry["file"] for entry in settings["files"]] == names and settings["files"][2]["text"] == "Hold one."
    assert sounds.keys() == {*names, "000_000.wav", "000_001.wav", "001_000.wav", "002_000.wav"}
    silence = np.zeros(SETTINGS.sample_rate // 2, np.float32)
    assert np.array_equal(np.concatenate([sounds["000_000.wav"], silence, sounds["000_001.wav"]]), sounds["000.wav"])
    assert settings["weights"] == "ema" and settings["temperature"] == 0.4
    assert "git_commit" in settings and "000_001.wav" in capsys.readouterr().out


def test_a_seed_gives_the_same_sound_in_every_batch(say, folder):
    text = ["--text", "Hold one. Please press the pound key for help, or wait. Goodbye.", "--speaker", "ann"]
    text += ["--vocoder_checkpoint", folder / "vocoder"]  # Griffin-Lim scales rounding errors up.
    alone = say(*text, "--stream", name="alone")[1]
    together = say(*text, "--stream", "--batch_size", 3, name="together")[1]
    assert len(alone) == 4 and alone.keys() == together.keys()
    for name in alone:
        assert np.abs(alone[name] - together[name]).max() <= 2e-3
    other = say(*text, "--seed", 1, name="other")[1]
    assert np.abs(other["000.wav"] - alone["000.wav"]).max() > 1e-2


def test_speed_speaker_and_the_prior_alone(say):
    text = ["--text", "please press the pound key for help or hold the line and wait"]
    usual = say(*text, "--speaker", "ann")[1]["000.wav"]
    slow = say(*text, "--speaker", "ann", "--speed", 0.5)[1]["000.wav"]
    assert len(slow) > 1.5 * len(usual)
    for change in (["--speaker", "bob"], ["--speaker", "ann", "--n_steps", 0], ["--speaker", "ann", "--bf16"]):
        changed = say(*text, *change)[1]["000.wav"]
        assert len(changed) != len(usual) or np.abs(changed - usual).max() > 1e-4


def test_what_cannot_be_said_is_named(say, tmp_path, caplog):
    sounds = say("--text", "Hold one. ?!", "...", "--speaker", "ann")[1]
    assert list(sounds) == ["000.wav"] and "'?!'" in caplog.text
    # eSpeak NG reads emoji by their names, with phones that six sentences do not have.
    assert len(say("--text", "🙂", "--speaker", "ann", name="emoji")[1]["000.wav"]) > 0
    assert "nearest known ones" in caplog.text
    for text, message in (("...", "nothing to say"), ("caf\udce9", "the text 'caf.*' is not UTF-8")):
        with pytest.raises(ValueError, match=message):
            say("--text", text, "--speaker", "ann")
    with pytest.raises(ValueError, match="--speaker is needed; the model knows ann, bob"):
        say("--text", "Goodbye.")
    with pytest.raises(ValueError, match=r"--speaker 'anna' is unknown; did you mean 'ann'"):
        say("--text", "Goodbye.", "--speaker", "anna", name="wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match="--language: language 'de' is unknown; known: en-us"):
        say("--text", "Goodbye.", "--speaker", "ann", "--language", "de")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"--input .*empty.txt has no line with text"):
        say("--input", tmp_path / "empty.txt", "--speaker", "ann")


def test_other_checkpoints_are_refused(say, folder, tmp_path):
    for flag, message in (("--checkpoint", "text to speech needs audio_diffusion"), ("--vae_checkpoint", "vae|VAE")):
        with pytest.raises(ValueError, match=message):
            say("--text", "Goodbye.", "--speaker", "ann", flag, folder / "vocoder")
    other = save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path / "vocoder")
    with pytest.raises(ValueError, match="n_mels"):
        say("--text", "Goodbye.", "--speaker", "ann", "--vocoder_checkpoint", other)


def test_flags_that_are_needed_or_have_no_effect(capsys):
    for words, message in (
        (["--checkpoint", "runs/x"], "--text or --input are needed"),
        (["--checkpoint", "runs/x", "--text", "a", "--speed", "0.1"], "--speed=0.1 must be >= 0.25"),
        (["--checkpoint", "runs/x", "--text", "a", "--speed", "5"], "--speed=5.0 must be <= 4"),
        (["--checkpoint", "runs/x", "--text", "a", "--pause", "inf"], "--pause=inf must be finite"),
        (["--checkpoint", "runs/x", "--text", "a", "--sampler", "ddpm"], "--sampler='ddpm'"),
        (["--checkpoint", "runs/x", "--text", "a", "--guidance_interval", "0", "0.5"], "has no effect"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(TextToSpeechArguments, words, "")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "On 3/4/2026 Dr. Smith paid $3.50, e.g. at 10:30.",
        "hold\0one",
        "Guten Tag. 你好世界。 Привет!",
        "x" * 500,
        "hold the line " * 25,
        "🙂🙂",
        "\u200b\u202e hold",
    ],
    ids=["numbers", "nul", "languages", "no space", "long", "emoji", "marks"],
)
def test_odd_texts_are_spoken_at_a_sane_length(say, folder, text):
    words = ["--text", text, "--speaker", "ann", "--vocoder_checkpoint", folder / "vocoder"]
    settings, sounds = say(*words, "--n_steps", 0, "--batch_size", 8, "--pause", 0)
    (sound,) = sounds.values()
    assert settings["files"][0]["text"] == text and np.isfinite(sound).all()
    assert 0.1 < len(sound) / SETTINGS.sample_rate < 0.5 * len(text) + 2


def test_texts_without_anything_to_say_get_no_file_and_are_named(say, caplog):
    settings, sounds = say("--text", "hold one", "", "hold one", "?!", "--speaker", "ann")
    assert list(sounds) == ["000.wav", "002.wav"] and np.array_equal(sounds["000.wav"], sounds["002.wav"])
    assert [entry["file"] for entry in settings["files"]] == ["000.wav", "002.wav"]
    assert "nothing to say in the text ''" in caplog.text and "nothing to say in '?!'" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "--input - has no line"),
        ("  \n\n", "--input - has no line"),
        ("caf\udce9", "--input -: line 1 is not UTF"),
    ],
)
def test_standard_input_without_text_is_refused(say, monkeypatch, content, message):
    stream = io.BytesIO(content.encode(errors="surrogateescape"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream, encoding="utf-8"))
    with pytest.raises(ValueError, match=message):
        say("--input", "-", "--speaker", "ann")


def test_a_model_of_two_languages_speaks_both_and_names_them(folder, say, tmp_path):
    mels = shutil.copytree(folder / "mels", tmp_path / "mels")
    entries = AudioVAEDataset(mels, "train").manifest["entries"]
    for entry in [*entries["train"], *entries["validation"]]:
        entry["language"] = "de" if entry["speaker"] == "bob" else "en-us"
    write_manifest(mels, entries)
    make_audio_latents(mels, folder / "vae", tmp_path / "latents")
    shown = ["--n_logged_samples", "1", "--sentences", "Hold one.", "--eval_steps", "1"]
    plain = run_stage(AudioDiffusionStage, SMALL_SPEECH, tmp_path / "latents", tmp_path, "plain", 1, *shown)
    told = ["--override", 'languages=["de","en-us"]', *(word for word in SMALL_SPEECH if "=" in word)]
    told = run_stage(AudioDiffusionStage, changed(SMALL_SPEECH, *told), tmp_path / "latents", tmp_path, "told", 1)
    for run, languages in ((plain, []), (told, ["de", "en-us"])):
        assert load_model(AudioDiffusion, run.folder).config.languages == languages
        words = ["--checkpoint", run.folder, "--text", "hold one", "--speaker", "bob", "--n_steps", 0]
        english, german = say(*words)[1]["000.wav"], say(*words, "--language", "de", name="de")[1]["000.wav"]
        assert len(english) != len(german) or np.abs(english - german).max() > 1e-4
        with pytest.raises(ValueError, match="--language: language 'dee' is unknown; did you mean 'de'"):
            say(*words, "--language", "dee")
    with pytest.raises(ValueError, match=r"languages=\['de', 'en-us'\]"):
        other = [*(word for word in SMALL_SPEECH if "=" in word), 'languages=["de","fr"]']
        run_stage(
            AudioDiffusionStage, changed(SMALL_SPEECH, "--override", *other), tmp_path / "latents", tmp_path, "no", 1
        )
