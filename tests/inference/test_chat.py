"""Prompts of text, images and audio from the command line: files, seeds, placeholders, refusals."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from inference.chat import ChatArguments, chat
from pretrain_multimodal import MultimodalStage
from tests.helpers.stream_caches import SMALL_STREAMS, make_stream_caches
from utils.command_line import parse_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, an image and a sound."""
    path = tmp_path_factory.mktemp("chat")
    words = ["--output_dir", str(path), "--run_name", "run", "--max_steps", "1", "--batch_size", "4"]
    overrides = SMALL_STREAMS[SMALL_STREAMS.index("--override") + 1 :][:5]
    common = [*SMALL_STREAMS, *words, *make_stream_caches(path / "caches")]
    at = common.index("--override") + 1
    few = ["audio_n_sampling_steps=2", "image_n_sampling_steps=2", "audio_max_tokens=8"]
    MultimodalStage.main([*common[:at], *few, *overrides, *common[at + 5 :]])
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(path / "gray.png")
    soundfile.write(path / "tone.wav", 0.1 * np.sin(np.arange(8000) / 9), 16000)
    soundfile.write(path / "long.wav", 0.1 * np.sin(np.arange(80000) / 9), 16000)
    return path


def call(folder, *words):
    words = ["--checkpoint", str(folder / "multimodal" / "run"), "--output_dir", str(folder / "out"), *words]
    chat(parse_arguments(ChatArguments, list(words), ""))
    return json.loads((folder / "out" / "settings.json").read_text())["answers"]


def test_every_direction_has_its_command(folder, capsys):
    image, sound = str(folder / "gray.png"), str(folder / "tone.wav")
    words = ["--draw", "a red bear", "--speak", "a fish", "--describe", image, "--transcribe", sound]
    answers = call(folder, *words, "--max_new_tokens", "3")
    assert [answer["modality"] for answer in answers][:2] == ["image", "audio"]
    assert Image.open(answers[0]["answer"]).size == (32, 32)
    waveform, rate = soundfile.read(answers[1]["answer"])
    assert rate == 16000 and len(waveform) % 256 == 0 and np.isfinite(waveform).all()
    assert {answer["prompt"] for answer in answers[2:]} <= {image, sound}
    assert "a red bear  ->  " in capsys.readouterr().out
    again = call(folder, "--draw", "a red bear")
    assert again[0]["answer"] == answers[0]["answer"]


def test_prompts_hold_files_as_placeholders(folder):
    prompt = f"<image:{folder / 'gray.png'}> and <audio:{folder / 'tone.wav'}>"
    answers = call(folder, "--prompts", prompt, "--max_new_tokens", "2", "--temperature", "1")
    assert all(answer["prompt"] == prompt for answer in answers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--describe", "missing.png"], "image 'missing.png' cannot be read"),
        (["--prompts", "<audio:missing.wav>"], "audio 'missing.wav' cannot be read"),
        (["--transcribe", "LONG"], r"long\.wav.*audio_max_tokens=8; give a shorter clip"),
        (["--draw", "x", "--vocoder_checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_wrong_files_are_named(words, message, folder):
    words = [str(folder / "long.wav") if word == "LONG" else word for word in words]
    with pytest.raises((OSError, ValueError), match=message):
        call(folder, *words)


def test_a_checkpoint_and_a_prompt_are_needed(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(ChatArguments, ["--draw", "x"], "")
    assert end.value.code == 2 and "--checkpoint and one of --draw" in capsys.readouterr().err
