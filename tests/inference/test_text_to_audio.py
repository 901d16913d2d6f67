"""Captions to sound from a small model: what training records and logs, files, seeds, lengths, guidance, refusals."""

import json

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_loading.audio.latents import AudioLatentDataset
from inference.export_model import main as export
from inference.text_to_audio import generate
from inference.text_to_speech import speak
from model.audio.diffusion import AudioDiffusion
from pretrain_audio_diffusion import AudioDiffusionStage
from tests.helpers.audio_latent_cache import (
    SENTENCES,
    SETTINGS,
    SMALL_SPEECH,
    make_audio_latents,
    save_audio_vae,
    write_spoken_cache,
)
from tests.helpers.processes import newest_results
from tests.helpers.runs import changed, run_stage
from tests.helpers.text_encoder_folder import save_text_encoder
from tests.helpers.vocoder_checkpoint import SMALL_VOCODER, save_stage_checkpoint, small_vocoder
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.generation.arguments.audio_diffusion import TextToAudioArguments, TextToSpeechArguments
from utils.generation.captions import CaptionPipeline

FIELDS = [word for word in SMALL_SPEECH if "=" in word and not word.startswith(("frame_width", "text_dropout"))]
COMMON = [*changed(SMALL_SPEECH, "--override", *FIELDS), "--learning_rate", "1e-2", "--caption_dropout", "0.3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents with captions as bytes (bytes) and as states of an encoder (states), a vocoder and an encoder."""
    folder = tmp_path_factory.mktemp("sounds")
    mels, vae = write_spoken_cache(folder / "mels", 12), save_audio_vae(folder / "vae")
    encoder = str(save_text_encoder(folder / "encoder"))
    flags = ("--conditioning", "caption", "--max_tokens", "32")
    make_audio_latents(mels, vae, folder / "bytes", *flags)
    make_audio_latents(mels, vae, folder / "states", *flags, "--text_encoder", encoder)
    save_stage_checkpoint(small_vocoder(**SETTINGS.as_dict(), **SMALL_VOCODER), "vocoder", folder / "vocoder")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A run on bytes that logs sounds."""
    flags = ["--n_logged_samples", "2", "--prompts", "goodbye", "--eval_steps", "6"]
    flags += ["--vocoder_checkpoint", str(folder / "vocoder")]
    return run_stage(AudioDiffusionStage, COMMON, folder / "bytes", folder / "runs", "run", 6, *flags).folder


@pytest.fixture
def run(checkpoint, folder, tmp_path):
    """run(*words) -> settings, and waveforms by file name."""

    def call(*words, name="out"):
        out = tmp_path / name
        common = ["--checkpoint", checkpoint, "--output_dir", out, "--n_steps", 2]
        common += ["--vocoder_checkpoint", folder / "vocoder"]
        generate(parse_arguments(TextToAudioArguments, changed(list(map(str, common)), *map(str, words)), ""))
        out = newest_results(out)
        sounds = {file.name: soundfile.read(file, dtype="float32")[0] for file in sorted(out.glob("*.wav"))}
        return json.loads((out / "settings.json").read_text()), sounds

    return call


def test_sounds_of_captions_are_logged_at_their_true_lengths(checkpoint, folder):
    assert load_model(AudioDiffusion, checkpoint).config.conditioning == "caption"
    events = EventAccumulator(str(checkpoint.parent)).Reload()
    assert set(events.Tags()["images"]) == {"images/mel"}
    names = {f"sounds/{clip:02}_{kind}" for clip in (0, 1) for kind in ("1_real", "3_generated")}
    assert set(events.Tags()["audio"]) == {*names, "sounds/prompt_00"}
    entries = AudioLatentDataset(folder / "bytes", "validation").entries
    for number, entry in enumerate(entries):
        for kind in ("1_real", "3_generated"):
            (sound,) = events.Audio(f"sounds/{number:02}_{kind}")
            assert sound.length_frames == entry["mel_frames"] * SETTINGS.hop_length
    clips = sorted(entry["seconds"] for entry in AudioLatentDataset(folder / "bytes", "train").entries)
    record = json.loads((checkpoint / "stage.json").read_text())["clip_seconds"]
    assert record == {"shortest": clips[0], "median": pytest.approx(sum(clips[4:6]) / 2), "longest": clips[-1]}


def test_files_are_named_by_prompt_and_seed(run, checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("zwölf Bären\n\n  hold one \n", encoding="utf-8")
    words = ["--prompts", "A key!", "--input", tmp_path / "prompts.txt", "--seed", 7, "--n_sounds", 2]
    settings, sounds = run(*words, "--seconds", 1.5, "--bf16")
    stems = ("000_a_key_", "001_zw_lf_b_ren", "002_hold_one")
    names = [f"{stem}_seed{seed}.wav" for stem in stems for seed in (7, 8)]
    assert [entry["file"] for entry in settings["files"]] == names and sounds.keys() == set(names)
    assert settings["files"][2]["prompt"] == "zwölf Bären" and settings["files"][3]["seed"] == 8
    assert settings["weights"] == "ema" and settings["temperature"] == 1
    assert "git_commit" in settings and names[5] in capsys.readouterr().out
    assert all(abs(len(sound) - 1.5 * SETTINGS.sample_rate) <= SETTINGS.hop_length for sound in sounds.values())


def test_settings_name_the_networks_of_an_exported_folder(checkpoint, folder, tmp_path):
    vocoder, exported = ["--vocoder_checkpoint", str(folder / "vocoder")], tmp_path / "exported"
    export(["--checkpoint", str(checkpoint), "--output", str(exported), "--with_parts", *vocoder])
    words = ["--checkpoint", str(exported), "--prompts", "hold one", "--n_steps", "1", "--output_dir", str(tmp_path)]
    generate(parse_arguments(TextToAudioArguments, words, ""))
    settings = json.loads((tmp_path / "settings.json").read_text())
    sources = [settings[f"{name}checkpoint"] for name in ("", "vae_", "vocoder_")]
    assert sources == [str(exported), str(exported / "vae"), str(exported / "vocoder")]


def test_a_seed_gives_the_same_sound_in_every_batch(run):
    words = ["--prompts", "hold one", "for help press the pound key", "goodbye"]
    alone, together = run(*words, "--batch_size", 1, name="1")[1], run(*words, name="4")[1]
    assert len(alone) == 3 and alone.keys() == together.keys()
    for name in alone:
        assert np.abs(alone[name] - together[name]).max() <= 2e-3
    median = len(alone["002_goodbye_seed0.wav"])
    other = run(*words, "--seed", 1, name="other")[1]["002_goodbye_seed1.wav"]
    assert len(other) == median and np.abs(other - alone["002_goodbye_seed0.wav"]).max() > 1e-3


def test_guidance_moves_away_from_the_dropped_caption(checkpoint):
    """Captions were dropped in training, so that the null condition was trained; guidance extrapolates from it."""
    pipeline = CaptionPipeline.load(checkpoint)
    model, inputs, frames = pipeline.model, pipeline.text_inputs(SENTENCES[:2]), torch.tensor([90, 60])
    n_latents = model.latent_frames(frames)
    x, time = torch.randn(2, int(n_latents.max()), 5), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        condition = model.caption_condition(n_latents, **inputs)
        dropped = model(x, time, n_latents, **inputs, drop=torch.tensor([True, True])).prediction
        null = model.network(x, model.process.network_time(time), model.null_condition(condition))
    # What training calls dropped is what sampling calls the null condition.
    assert torch.allclose(dropped, null, atol=1e-5)
    settings = {scale: TextToAudioArguments(n_steps=1, guidance_scale=scale) for scale in (0.0, 1.0, 3.0)}
    nobody, usual, guided = (pipeline.latents(inputs, frames, [0, 1], each) for each in settings.values())
    # One Euler step is linear in the prediction.
    assert (usual - nobody).abs().max() > 1e-3
    assert torch.allclose(guided, nobody + 3 * (usual - nobody), atol=1e-4)


def test_states_of_a_frozen_encoder(folder, run, tmp_path):
    flags = ["--n_logged_samples", "1", "--prompts", "a red disc", "--eval_steps", "2"]
    made = run_stage(AudioDiffusionStage, COMMON, folder / "states", tmp_path, "states", 2, *flags)
    words = ["--prompts", "a red disc", "--checkpoint", made.folder]
    first, again = run(*words)[1], run(*words, "--text_encoder", folder / "encoder", name="named")[1]
    ((name, sound),) = first.items()
    assert np.abs(again[name] - sound).max() <= 1e-6
    with pytest.raises(ValueError, match=r"fingerprint \w+, but the captions .*--text_encoder"):
        run(*words, "--text_encoder", save_text_encoder(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"'a red a red.* has 52 tokens, .* at most 32; shorten"):
        run("--checkpoint", made.folder, "--prompts", "a red " * 25)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "ok", " "], "' ' is empty; describe"),
        (["--prompts", "caf\udce9"], "'caf.*' is not UTF-8"),
        (["--prompts", "ü" * 16], r"'ü+'\.\.\. has 33 tokens, but the model reads at most 32; shorten"),
        (["--prompts", "ok", "--seconds", 30], r"--seconds=30 is out of the range .* give \d\.\d\d to \d\.\d\d, or 0"),
        (["--prompts", "ok", "--seconds", 0.1], "--seconds=0.1 is out of the range"),
        (["--prompts", "ok", "--text_encoder", "x"], "--text_encoder x has no effect"),
    ],
)
def test_prompts_and_lengths_that_do_not_fit_are_named(run, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert not list(tmp_path.rglob("*.wav"))


def test_other_models_and_flags_without_effect_are_refused(run, checkpoint, folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="captions to sound needs audio_diffusion"):
        run("--prompts", "a", "--checkpoint", folder / "vocoder")
    words = ["--checkpoint", str(checkpoint), "--text", "a", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"conditioning='caption'; text to speech needs .*'speech'"):
        speak(parse_arguments(TextToSpeechArguments, words, ""))
    for flags, message in (
        (["--sentences", "a"], "--sentences has no effect: .*conditioning='caption'"),
        (["--n_steps", "0", "--n_logged_samples", "1"], "--n_steps=0 shows the prior"),
        (["--text_encoder", "x"], "--text_encoder x has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage(AudioDiffusionStage, COMMON, folder / "bytes", tmp_path, "no", 1, *flags)
    for words, message in ((["--checkpoint", "x"], "--prompts or --input"), (["--seconds", "-1"], "must be >= 0")):
        with pytest.raises(SystemExit):
            parse_arguments(TextToAudioArguments, words, "")
        assert message in capsys.readouterr().err
