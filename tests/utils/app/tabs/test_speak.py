"""Tab Speak: the speech and the sounds of the scripts, durations of tokens, what is offered for a model."""

import dataclasses
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from dataset_loading.audio.latents import AudioLatentDataset
from inference.text_to_audio import generate
from inference.text_to_speech import speak
from model.audio.diffusion import AudioDiffusion
from tests.helpers.app.page import flags_of, visitor, wait_until
from tests.helpers.audio_latent_cache import SETTINGS, make_audio_latents, save_audio_vae, write_spoken_cache
from tests.helpers.vocoder_checkpoint import SMALL_VOCODER, save_stage_checkpoint, small_vocoder
from utils.app.arguments import AppArguments
from utils.app.audio import GRIFFIN_LIM, for_player
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs
from utils.app.tabs.speak import fitting, sound_settings, speech_settings, token_rows
from utils.checkpoints import STAGE, mark_complete, read_stage, write_json
from utils.generation.arguments.audio_diffusion import TextToAudioArguments, TextToSpeechArguments
from utils.generation.audio_diffusion import fit_to_audio_latents
from utils.generation.captions import seconds_of_clips
from utils.generation.speech import SpeechPipeline

SPEECH, BOTH, SOUNDS, VOCODER = (
    f"{run}/checkpoint-4"
    for run in ("audio_diffusion/speech", "audio_diffusion/both", "audio_diffusion/sounds", "vocoder/small")
)
TEXT = "Please hold the line. Press one!"
BASE = (0, 2, 0.5)  # seed, steps, temperature


def save_diffusion(run_dir, latents):
    """A checkpoint on the latents without training, with the VAE as recorded."""
    dataset = AudioLatentDataset(latents, "train")
    settings, speakers = dataset.manifest["settings"], ["ann", "bob"]
    torch.manual_seed(0)
    sizes = {"widths": [16, 24], "n_blocks": [1, 1], "n_attentions": [0, 1], "head_width": 8}
    small = AudioDiffusion.from_preset("tiny", **sizes, conditioning_width=16, text_width=16)
    config = fit_to_audio_latents(
        small.config, settings, speakers=speakers, vae_speakers=[], overrides=[], folder=latents
    )
    model = AudioDiffusion(config)
    for parameter in model.parameters():  # Away from the zeros that it starts with.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder = save_stage_checkpoint(model, "audio_diffusion", run_dir)
    data = {"folder": str(latents), "fingerprint": dataset.fingerprint}
    own = {"data": data, "latents": settings, "clip_seconds": seconds_of_clips(dataset.entries)}
    write_json(folder / STAGE, {**read_stage(folder), **own})
    mark_complete(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Models of speech and of sounds, a vocoder of their log-mel, and one of another."""
    folder = tmp_path_factory.mktemp("speak")
    runs, mels = folder / "runs", write_spoken_cache(folder / "mels", 12)
    vae = save_audio_vae(runs / "audio_vae" / "small")
    for name, flags in (("speech", ()), ("sounds", ("--conditioning", "caption", "--max_tokens", "32"))):
        make_audio_latents(mels, vae, folder / name, *flags)
        save_diffusion(runs / "audio_diffusion" / name, folder / name)
    # A model that was trained on two languages differs in its tokenizer alone.
    shutil.copytree(runs / SPEECH, runs / BOTH)
    record = read_stage(runs / BOTH)
    record["latents"]["tokenizer"]["languages"] = ["de", "en-us"]
    write_json(runs / BOTH / STAGE, record)
    mark_complete(runs / BOTH)
    other = dataclasses.replace(SETTINGS, hop_length=128)
    for name, mel in (("small", SETTINGS), ("other", other)):
        vocoder = small_vocoder(**mel.as_dict(), **SMALL_VOCODER)
        save_stage_checkpoint(vocoder, "vocoder", runs / "vocoder" / name)
    return runs


@pytest.fixture(scope="module")
def client(runs):
    with visitor(runs) as client:
        yield client


def played(file):
    return soundfile.read(file, dtype="float32")


@pytest.mark.parametrize(("vocoder", "speaker", "n_steps"), [(VOCODER, "bob", 2), (GRIFFIN_LIM, "ann", 0)])
def test_speech_is_that_of_the_command_line_that_is_shown(client, tmp_path, vocoder, speaker, n_steps):
    values = (SPEECH, vocoder, TEXT, 7, n_steps, 0.5, speaker, "", 1.5, 0, 1)
    file, image, table, status, line = client.predict(*values, api_name="/speak")
    args = flags_of(line, "inference/text_to_speech.py", TextToSpeechArguments, "--output_dir", tmp_path)
    assert (args.text, args.speaker, args.speed, args.seed) == ([TEXT], speaker, 1.5, 7)
    speak(args)
    (waveform, rate), (expected, _) = played(file), played(tmp_path / "000.wav")
    assert rate == SETTINGS.sample_rate and len(waveform) == len(expected) and expected.std() > 1e-4
    assert np.abs(waveform - expected).max() <= 2**-15
    assert f"{len(expected) / rate:.2f} s of audio" in status and Image.open(image).width > 100
    assert table["headers"] == ["token", "start in ms", "ms"] and len(table["data"]) > 10


def test_the_language_is_that_of_the_command_line_that_is_shown(client, tmp_path):
    clips = []
    for language in ("en-us", "de"):
        values = (BOTH, GRIFFIN_LIM, "a den", *BASE, "ann", language, 1, 0, 1)
        file, *_, line = client.predict(*values, api_name="/speak")
        assert f"--language {language}" in line
        clips.append(played(file)[0])
    speak(flags_of(line, "inference/text_to_speech.py", TextToSpeechArguments, "--output_dir", tmp_path))
    expected = played(tmp_path / "000.wav")[0]
    assert np.abs(clips[1] - expected).max() <= 2**-15
    assert len(clips[0]) != len(expected) or np.abs(clips[0] - expected).max() > 0.01


def test_durations_are_those_of_the_model_in_the_whole_audio(client, runs):
    _, _, table, _, _ = client.predict(SPEECH, GRIFFIN_LIM, TEXT, *BASE, "ann", "", 1, 0, 1, api_name="/speak")
    pipeline = SpeechPipeline.load(runs / SPEECH)
    hop, expected, start = 1000 * SETTINGS.hop_length / SETTINGS.sample_rate, [], 0.0
    for sentence in ("Please hold the line.", "Press one!"):
        inputs = pipeline.text_inputs([sentence], speaker="ann")
        (frames,) = pipeline.latents(inputs, [0], TextToSpeechArguments(n_steps=0))[1]
        for token, n_frames in zip(inputs["tokens"][0, :, 0].tolist(), frames.tolist()):
            if n_frames:
                expected.append([pipeline.tokenizer.symbols[token], round(start), round(n_frames * hop)])
            start += n_frames * hop
        start += 200  # ms between sentences
    assert [row[:1] + [int(number) for number in row[1:]] for row in table["data"]] == expected


def test_rows_leave_out_tokens_without_a_duration():
    rows = token_rows(["", "#", "a"], torch.tensor([1, 2, 1]), torch.tensor([2, 0, 3]), start=100.0, hop=16.0)
    assert rows == [("#", 100, 32), ("#", 132, 48)]


@pytest.mark.parametrize("vocoder", [VOCODER, GRIFFIN_LIM])
def test_a_sound_is_that_of_the_command_line_that_is_shown(client, tmp_path, vocoder):
    values = (SOUNDS, vocoder, "a dog, $(x)", 3, 4, 0.9, "", "", 1, 1.5, 2.5)
    file, _, table, status, line = client.predict(*values, api_name="/speak")
    args = flags_of(line, "inference/text_to_audio.py", TextToAudioArguments, "--output_dir", tmp_path)
    assert (args.prompts, args.seconds, args.guidance_scale, args.seed) == (["a dog, $(x)"], 1.5, 2.5, 3)
    generate(args)
    (expected_file,) = tmp_path.glob("*.wav")
    (waveform, _), (expected, _) = played(file), played(expected_file)
    assert np.abs(waveform - expected).max() <= 2**-15 and expected.std() > 1e-4
    assert "s of audio" in status and not table["data"]


def test_what_exceeds_full_scale_is_scaled_down_as_files_are():
    rate, samples = for_player(torch.tensor([0.5, -2.0, 2.0]), 8000)
    assert rate == 8000 and samples.dtype == np.int16 and samples.tolist() == [8192, -32768, 32767]
    assert for_player(torch.tensor([1.0, -1.0, 1e-4]), 8000)[1].tolist() == [32767, -32768, 3]


def test_a_cancel_ends_the_job_between_steps(client):
    job = client.submit(SOUNDS, GRIFFIN_LIM, "rain", 0, 100, 1, "", "", 1, 1.5, 3, api_name="/speak")
    wait_until(lambda: any("step" in outputs[3] for outputs in job.outputs()) or job.done())
    start = time.process_time()
    assert not job.done() and job.cancel()
    status = client.predict(SOUNDS, GRIFFIN_LIM, "rain", 0, 1, 1, "", "", 1, 1.5, 1, api_name="/speak")[3]
    assert "s of audio" in status and time.process_time() - start < 5


def test_errors_are_in_our_words(client):
    for values, message in (
        (
            ("audio_diffusion", VOCODER, "a", *BASE, "ann", "", 1, 0, 1),
            "is no complete checkpoint of audio_diffusion or",
        ),
        (
            (SPEECH, "vocoder/none", "a", *BASE, "ann", "", 1, 0, 1),
            "'vocoder/none' is no complete checkpoint of vocoder",
        ),
        ((SPEECH, "vocoder/other/checkpoint-4", "a", *BASE, "ann", "", 1, 0, 1), "use different log-mels"),
        ((SPEECH, VOCODER, "?!", *BASE, "ann", "", 1, 0, 1), "nothing to say in the text"),
        ((SPEECH, VOCODER, "a", *BASE, "ana", "", 1, 0, 1), "--speaker 'ana' is unknown"),
        ((SPEECH, VOCODER, "a", *BASE, "", "", 1, 0, 1), "--speaker is needed; the model knows ann, bob"),
        ((BOTH, VOCODER, "a", *BASE, "ann", "dee", 1, 0, 1), "--language: language 'dee' is unknown; did you mean"),
        ((SPEECH, VOCODER, "a" * 2001, *BASE, "ann", "", 1, 0, 1), "more than 2000"),
        ((SOUNDS, VOCODER, "a", *BASE, "", "", 1, 30, 1), "--seconds=30 is out of the range"),
        ((SOUNDS, VOCODER, " ", *BASE, "", "", 1, 0, 1), "is empty; describe the sound"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            client.predict(*values, api_name="/speak")
        assert "Traceback" not in str(caught.value)


def test_components_offer_what_fits_the_checkpoint(runs):
    context = Context(gr=None, args=AppArguments(), runs=Runs(runs), models=Models(), jobs=Jobs(None))
    speech, sounds, none = (fitting(context, name) for name in (SPEECH, SOUNDS, None))
    assert speech["vocoder"] == sounds["vocoder"] == {"choices": [VOCODER, GRIFFIN_LIM], "value": VOCODER}
    assert none["vocoder"] == {"choices": [GRIFFIN_LIM], "value": GRIFFIN_LIM}
    assert speech["speaker"] == {"choices": ["ann", "bob"], "value": "ann", "visible": True}
    assert sounds["speaker"] == {"choices": [], "value": None, "visible": False}
    for offers in (speech, sounds, none):
        assert offers["language"] == {"choices": [], "value": None, "visible": False}
    both = fitting(context, BOTH)["language"]
    assert both == {"choices": ["de", "en-us"], "value": "en-us", "visible": True}
    for offers, is_speech in ((speech, True), (none, True), (sounds, False)):
        assert offers["speed"]["visible"] is offers["durations"]["visible"] is is_speech
        assert offers["seconds"]["visible"] is offers["guidance_scale"]["visible"] is not is_speech
    assert [offers["temperature"]["value"] for offers in (speech, sounds)] == [0.4, 1.0]
    assert [offers["n_steps"]["value"] for offers in (speech, sounds)] == [4, 20]


def test_settings_are_checked_as_flags():
    shared = {"seed": 0, "n_steps": 1, "temperature": 1.0}
    for settings, own, wrong, message in (
        (speech_settings, {"speaker": "", "language": "", "speed": 1}, {"speed": 9}, "--speed=9.0 must be <= 4"),
        (
            speech_settings,
            {"speaker": "", "language": "", "speed": 1},
            {"n_steps": 101},
            "n_steps=101 must be at most 100",
        ),
        (speech_settings, {"speaker": "", "language": "", "speed": 1}, {"seed": None}, "seed is no number; give one"),
        (
            speech_settings,
            {"speaker": "", "language": "", "speed": 1},
            {"speed": None},
            "speed is no number; give one",
        ),
        (sound_settings, {"seconds": 0, "guidance_scale": 1}, {"seconds": -1}, "--seconds=-1.0 must be >= 0"),
        (sound_settings, {"seconds": 0, "guidance_scale": 1}, {"seconds": None}, "seconds is no number; give one"),
        (sound_settings, {"seconds": 0, "guidance_scale": 1}, {"temperature": 0}, "--temperature=0.0 must be > 0"),
    ):
        settings("runs/x", None, "a", **shared, **own)
        with pytest.raises(ValueError, match=message):
            settings("runs/x", None, "a", **{**shared, **own, **wrong})
