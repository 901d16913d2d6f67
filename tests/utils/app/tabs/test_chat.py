"""Tab Chat: the answers of the script in every direction, inputs that fit, a cancel between steps."""

import json
import time

import numpy as np
import pytest
import soundfile
from PIL import Image

from dataset_loading.files import MANIFEST
from inference.chat import chat
from pretrain_multimodal import MultimodalStage
from tests.helpers.app.page import flags_of, upload, visitor, wait_until
from tests.helpers.audio_latent_cache import SETTINGS
from tests.helpers.processes import newest_results
from tests.helpers.stream_caches import SMALL_STREAMS, make_stream_caches
from tests.helpers.vocoder_checkpoint import SMALL_VOCODER, save_stage_checkpoint, small_vocoder
from utils.app.arguments import AppArguments
from utils.app.audio import GRIFFIN_LIM
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs
from utils.app.tabs.chat import OWN, SPAN_FIELDS, fitting_vocoders, settings
from utils.generation.arguments.multimodal import ChatArguments

NAME = "multimodal/run/checkpoint-1"
FREE = "the model chooses"
USUAL = (4, 0, 0, 0)  # new tokens, temperature, seed, thinking steps
VOCODER = "vocoder/small/checkpoint-4"
OWN_SPANS = (*SPAN_FIELDS.values(), *SPAN_FIELDS.values())  # sampler, steps and guidance scale of images, of audio


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, an image and sounds."""
    path = tmp_path_factory.mktemp("chat_tab")
    words = ["--output_dir", str(path / "runs"), "--run_name", "run", "--max_steps", "1", "--batch_size", "4"]
    few = ["audio_n_sampling_steps=6", "image_n_sampling_steps=6", "audio_max_tokens=8"]
    at = SMALL_STREAMS.index("--override") + 1
    flags = [*SMALL_STREAMS[:at], *few, *SMALL_STREAMS[at:]]
    caches = make_stream_caches(path / "caches")
    manifest = path / "caches" / "audio" / MANIFEST
    content = json.loads(manifest.read_text())
    content["settings"]["mel"] = SETTINGS.as_dict()
    manifest.write_text(json.dumps(content))
    MultimodalStage.main([*flags, *words, *caches])
    save_stage_checkpoint(small_vocoder(**SETTINGS.as_dict(), **SMALL_VOCODER), "vocoder", path / "runs/vocoder/small")
    save_stage_checkpoint(small_vocoder(), "vocoder", path / "runs/vocoder/other")
    pixels = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    Image.fromarray(pixels).save(path / "gray.png")
    soundfile.write(path / "tone.wav", 0.1 * np.sin(np.arange(8000) / 9), 16000)
    soundfile.write(path / "long.wav", 0.1 * np.sin(np.arange(80000) / 9), 16000)
    return path


@pytest.fixture(scope="module")
def client(folder):
    with visitor(folder / "runs", max_pixels=10_000, max_seconds=20) as client:
        yield client


def inputs(folder, choice, text="", image=None, recording=None, usual=USUAL, vocoder=GRIFFIN_LIM, spans=OWN_SPANS):
    files = [upload(folder / name) if name else None for name in (image, recording)]
    return [NAME, choice, text, *files, *usual, 0, vocoder, *spans]


@pytest.mark.parametrize(
    ("choice", "given"),
    [
        ("draw", {"text": "-a red bear; $(x)", "spans": ("euler", 3, 1.5, *OWN_SPANS[3:]), "vocoder": VOCODER}),
        ("speak", {"text": " a fish", "spans": (*OWN_SPANS[:3], "heun", 2, 2), "vocoder": VOCODER}),
        ("describe", {"image": "gray.png", "usual": (5, 2, 3, 0)}),
        ("transcribe", {"recording": "tone.wav", "usual": (5, 2, 1, 0)}),
        (FREE, {"text": " and a bear ", "image": "gray.png", "recording": "tone.wav", "usual": (12, 2, 5, 0)}),
    ],
)
def test_answers_are_those_of_the_command_line_that_is_shown(client, folder, tmp_path, monkeypatch, choice, given):
    text, gallery, *players, status, line = client.predict(*inputs(folder, choice, **given), api_name="/chat")
    shown = {
        "draw": "--image_sampler euler --image_n_steps 3 --image_guidance_scale 1.5",
        "speak": "--audio_n_steps 2",
    }
    assert shown.get(choice, "") in line and ("--vocoder_checkpoint" in line) == (choice == "speak")
    monkeypatch.chdir(folder)  # The command line names uploaded files as the visitor does.
    chat(flags_of(line, "inference/chat.py", ChatArguments, "--output_dir", tmp_path / "out"))
    answers = json.loads((newest_results(tmp_path / "out") / "settings.json").read_text())["answers"]
    expected = {kind: [a["answer"] for a in answers if a["modality"] == kind] for kind in ("text", "image", "audio")}
    assert answers and "; weights ema, " in status
    assert text == "\n\n".join(expected["text"])
    assert len(gallery) == len(expected["image"])
    for shown, file in zip(gallery, expected["image"]):
        assert np.array_equal(np.asarray(Image.open(shown["image"]).convert("RGB")), np.asarray(Image.open(file)))
    clips = [player["value"] for player in players if player["visible"]]
    assert len(clips) == len(expected["audio"])
    for clip, file in zip(clips, expected["audio"]):
        (shown, rate), (waveform, other) = soundfile.read(clip), soundfile.read(file)
        assert rate == other and np.abs(shown - waveform).max() <= 2**-15


def test_texts_and_images_are_shown_as_they_come(client, folder):
    values = inputs(folder, "describe", image="gray.png", usual=(200, 2, 3, 0))
    last, outputs = client.results(*values, api_name="/chat")
    texts = [output[0] for output in outputs if isinstance(output[0], str)]
    assert len(set(texts)) > 3 and any("text, token" in output[-2] for output in outputs)
    assert all(last[0].startswith(text.strip()) for text in texts)
    _, outputs = client.results(*inputs(folder, "draw", "a bear"), api_name="/chat")
    assert any("image, evaluation" in output[-2] and " of 6, " in output[-2] for output in outputs)


def test_a_cancel_ends_the_text_at_the_next_token(client, folder):
    job = client.submit(*inputs(folder, "describe", image="gray.png", usual=(1000, 2, 3, 0)), api_name="/chat")
    wait_until(lambda: len(job.outputs()) > 3 or job.done())
    start = time.process_time()
    assert not job.done() and job.cancel()
    client.predict(*inputs(folder, "draw", "a bear"), api_name="/chat")
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("choice", "given", "message"),
    [
        (FREE, {}, "the prompt is empty; give text, image, recording"),
        ("draw", {}, "draw needs text, and the field is empty"),
        ("describe", {"recording": "tone.wav"}, "describe needs image"),
        ("speak", {"text": "a", "image": "gray.png"}, "speak takes text alone; empty the field of image"),
        ("transcribe", {"recording": "gray.png"}, "gray.png is no audio of a known format"),
        ("describe", {"image": "tone.wav"}, "tone.wav is no image of a known format"),
        ("transcribe", {"recording": "long.wav"}, "long.wav.*audio_max_tokens=8; give a shorter clip"),
        (FREE, {"text": "see <image:/etc/passwd>"}, "in the text: drop the file into its field"),
        ("draw", {"text": "a", "spans": (OWN, 251, *OWN_SPANS[2:])}, "image_n_steps=251 must be at most 250"),
        ("speak", {"text": "a", "spans": (*OWN_SPANS[:5], -2)}, "--audio_guidance_scale=-2.0 must be &gt;= 0"),
        ("speak", {"text": "a", "spans": (*OWN_SPANS[:5], None)}, "audio_guidance_scale is no number"),
        ("speak", {"text": "a", "vocoder": "vocoder/other/checkpoint-4"}, "use different log-mels"),
        ("draw", {"text": "a", "usual": (4, 0, -1, 0)}, "--seed=-1 must be &gt;= 0"),
        ("draw", {"text": "a", "usual": (4, 0, 0, 2)}, "n_thinking_steps=2 has no effect"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(client, folder, choice, given, message):
    with pytest.raises(Exception, match=message) as caught:
        client.predict(*inputs(folder, choice, **given), api_name="/chat")
    assert "Traceback" not in str(caught.value)


def test_what_the_answer_cannot_have_does_not_count(folder):
    usual = {"max_new_tokens": 4, "temperature": 0, "seed": 0, "thinking_steps": 0, "carried_steps": 0}
    spans = ("euler", 3, 1, "heun", 2, 2)
    for choice, flags in (("draw", {"image"}), ("speak", {"audio"}), ("describe", set()), (FREE, {"image", "audio"})):
        given = ("", "a.png") if choice == "describe" else ("a", None)
        line = str(settings("runs/x", choice, *given, None, spans=spans, **usual))
        assert {name for name in ("image", "audio") if f"--{name}_sampler" in line} == flags
    context = Context(gr=None, args=AppArguments(), runs=Runs(folder / "runs"), models=Models(), jobs=Jobs(None))
    assert fitting_vocoders(context, NAME) == {"vocoder": {"choices": [VOCODER, GRIFFIN_LIM], "value": VOCODER}}
    assert fitting_vocoders(context, None) == {"vocoder": {"choices": [GRIFFIN_LIM], "value": GRIFFIN_LIM}}


def test_texts_of_the_page_read_no_file():
    usual = {"max_new_tokens": 4, "temperature": 0, "seed": 0, "thinking_steps": 0, "carried_steps": 0}
    for text in ("<audio:a.wav>", "< Image : a.png", "<video:b>"):
        with pytest.raises(ValueError, match="drop the file into its field"):
            settings("runs/x", FREE, text, None, None, **usual)
    assert settings("runs/x", "draw", "<image:a>", None, None, **usual).arguments.draw == ["<image:a>"]
    with pytest.raises(ValueError, match="'sing' is none of the model chooses, draw"):
        settings("runs/x", "sing", "a", None, None, **usual)
