"""Prompts of text, images and audio from the command line: files, seeds, placeholders, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from inference.chat import chat
from model.attention import MegaTransformerSelfAttention
from pretrain_multimodal import MultimodalStage
from tests.helpers.processes import newest_results
from tests.helpers.stream_caches import SMALL_STREAMS, make_stream_caches
from utils.command_line import parse_arguments
from utils.generation.arguments.multimodal import ChatArguments
from utils.generation.chat import TextStream
from utils.generation.multimodal import MultimodalPipeline


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
    return json.loads((newest_results(folder / "out") / "settings.json").read_text())["answers"]


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
    # The same image, in a folder of its own: earlier answers stay.
    assert again[0]["answer"] != answers[0]["answer"]
    first, second = (Path(found[0]["answer"]) for found in (answers, again))
    assert (second.name, second.read_bytes()) == (first.name, first.read_bytes())
    assert json.loads((first.parent / "settings.json").read_text())["answers"] == answers


def test_clips_without_sound_are_named(folder, caplog):
    for name, n_samples in (("silent", 8000), ("point", 20)):
        soundfile.write(folder / f"{name}.wav", np.zeros(n_samples), 16000)
    call(folder, "--transcribe", str(folder / "silent.wav"), "--max_new_tokens", "1")
    assert f"{folder / 'silent.wav'}' is silent" in caplog.text
    with pytest.raises(ValueError, match=r"point.wav' lasts 0.0013 s; give at least"):
        call(folder, "--transcribe", str(folder / "point.wav"))


def test_prompts_hold_files_as_placeholders(folder):
    prompt = f"<image:{folder / 'gray.png'}> and <audio:{folder / 'tone.wav'}>"
    answers = call(folder, "--prompts", prompt, "--max_new_tokens", "2", "--temperature", "1")
    assert all(answer["prompt"] == prompt for answer in answers)


def test_lines_of_a_file_are_answered_in_batches_and_as_alone(folder, capsys, monkeypatch):
    sizes, options = [], []
    original = MultimodalPipeline.answer

    def spy(self, prompts, seeds, sampling, **keywords):
        sizes.append(len(prompts))
        options.append(sampling)
        return original(self, prompts, seeds, sampling, **keywords)

    monkeypatch.setattr(MultimodalPipeline, "answer", spy)
    (folder / "lines.txt").write_text("a red bear\n\na bear \U0001f43b\na fish\n", encoding="utf-8")
    words = ["--input", str(folder / "lines.txt"), "--input_task", "draw", "--image_sampler", "heun"]
    words += ["--image_n_steps", "1", "--image_guidance_scale", "1.5"]
    answers = call(folder, *words, "--draw", "a bus", "--batch_size", "3")
    assert sizes == [3, 1] and options[0].sampler == {"image": "heun"}
    assert options[0].n_steps == {"image": 1} and options[0].guidance_scale == {"image": 1.5}
    assert [answer["prompt"] for answer in answers] == ["a bus", "a red bear", "a bear \U0001f43b", "a fish"]
    pixels = np.asarray(Image.open(answers[1]["answer"])).astype(int)
    (alone,) = call(folder, *words[4:], "--draw", "a red bear")
    assert abs(np.asarray(Image.open(alone["answer"])).astype(int) - pixels).max() <= 1


def test_bf16_is_the_precision_of_products(folder, monkeypatch):
    seen, original = [], MegaTransformerSelfAttention.attend

    def spy(self, q, k, v, **keywords):
        seen.append(v.dtype)
        return original(self, q, k, v, **keywords)

    monkeypatch.setattr(MegaTransformerSelfAttention, "attend", spy)
    for words, dtype in (([], torch.float32), (["--bf16"], torch.bfloat16)):
        call(folder, "--speak", "a red bear", *words)
        assert set(seen) == {dtype}
        seen.clear()


def test_texts_are_shown_token_by_token(folder, capsys):
    image = str(folder / "gray.png")
    words = ["--describe", image, image, "--max_new_tokens", "5", "--temperature", "2"]
    answers = call(folder, *words)
    plain = capsys.readouterr().out
    assert call(folder, *words, "--stream") == answers and capsys.readouterr().out == plain
    # The bytes of a character come as one.
    stream = TextStream(MultimodalPipeline.load(folder / "multimodal" / "run"))
    pieces = [stream.add(token) for token in stream.pipeline.text_part("a \U0001f43b b").ids]
    assert "".join(pieces) == "a \U0001f43b b" and "" in pieces and " \U0001f43b" in pieces


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draw", "x", "--seed", str(2**63)], f"--seed={2**63} must be < {2**63}"),
        (["--draw", "x", "--audio_n_steps", "3"], "--audio_n_steps has no effect without --speak or --prompts"),
        (["--draw", "x", "--input_task", "draw"], "--input_task has no effect with input=''"),
        (["--draw", "x", "--stream", "--batch_size", "2"], "--batch_size has no effect with stream=True"),
        (["--draw", "x", "--image_sampler", "rk4"], "--image_sampler='rk4' must be one of 'dpmpp_2m'"),
    ],
)
def test_flags_without_effect_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(ChatArguments, ["--checkpoint", "run", *words], "")
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draw", " "], "a text to draw or speak is empty: ' '"),
        (["--prompts", "see <image:a.png and go"], "'<image:a.png and go' of a prompt: write <image:path>"),
        (["--prompts", "< Audio : a.wav >"], "'< Audio : a.wav >' of a prompt: write <image:path>"),
        (["--prompts", "<video:frog.mp4> x"], "'<video:frog.mp4>' of a prompt: write <image:path> or <audio:path>"),
        (["--prompts", "<image:>"], "image '' cannot be read"),
        (["--prompts", "a bear " * 900], "prompt 0 has .* max_position_embeddings=2048"),
        (["--input", "missing.txt"], "missing.txt"),
        (["--draw", "x", "--carried_steps", "2"], "n_carried_steps=2 has no effect.*no recurrent core"),
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


def test_a_bad_file_does_not_end_the_others(folder, caplog):
    (folder / "damaged.png").write_bytes((folder / "gray.png").read_bytes()[:60])
    bad = [str(folder / "damaged.png"), str(folder / "gone.png"), str(folder / "long.wav")]
    words = ["--draw", " ", "a bear", "--describe", *bad[:2], str(folder / "gray.png"), "--transcribe", bad[2]]
    with pytest.raises(ValueError, match="4 of 6 files gave no result") as error:
        call(folder, *words, "--max_new_tokens", "2", "--temperature", "2")
    answers = json.loads((newest_results(folder / "out") / "settings.json").read_text())["answers"]
    assert {answer["prompt"] for answer in answers} == {"a bear", str(folder / "gray.png")}
    assert all(name in str(error.value) and f"{name} is left out" in caplog.text for name in bad)


def test_a_checkpoint_and_a_prompt_are_needed(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(ChatArguments, ["--draw", "x"], "")
    assert end.value.code == 2 and "--checkpoint and one of --draw" in capsys.readouterr().err
