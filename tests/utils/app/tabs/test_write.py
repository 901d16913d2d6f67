"""Tab Write: the text of the script, shown token by token, ended by a cancel."""

import json
import time

import pytest

from inference.generate_text import generate
from tests.helpers.app.page import flags_of, visitor, wait_until
from tests.helpers.processes import newest_results
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from utils.app.tabs.write import FIELDS, settings
from utils.generation.arguments.text import GenerateTextArguments
from utils.generation.text import TextGenerator

FLAT, DEEP = "multimodal/small/checkpoint-4", "multimodal/deep/checkpoint-4"
USUAL = {"max_new_tokens": 12, "temperature": 1, "top_k": 0, "top_p": 1, "seed": 0} | {
    "thinking_steps": 0,
    "exit_threshold": -1,
}


def values(**changes):
    return [{**USUAL, **changes}[name] for name in FIELDS]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A visitor of a page with two models of text, one of which has a recurrent core."""
    folder = tmp_path_factory.mktemp("write")
    cache, runs = make_text(folder / "bytes"), folder / "runs"
    save_text_checkpoint(runs / "multimodal" / "small", cache, "tiny")
    fields = {"recurrent_exit_criterion": "kl", "recurrent_mean_thinking_steps": 4}
    save_text_checkpoint(runs / "multimodal" / "deep", cache, "recurrent-tiny", **fields)
    with visitor(runs) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (FLAT, {"temperature": 0}),
        (FLAT, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7}),
        (DEEP, {"thinking_steps": 2, "exit_threshold": 0, "max_new_tokens": 20}),
    ],
)
def test_the_text_is_that_of_the_command_line_that_is_shown(client, tmp_path, name, changes):
    text, status, line = client.predict(name, "-a 'list'; $(x) Zwölf", *values(**changes), api_name="/write")
    others = ("--output_dir", tmp_path / "out")
    generate(flags_of(line, "inference/generate_text.py", GenerateTextArguments, *others))
    (entry,) = json.loads((newest_results(tmp_path / "out") / "settings.json").read_text())["texts"]
    assert text == entry["prompt"] + entry["continuation"] and entry["continuation"]
    assert "per second; weights ema, " in status and "tokens in" in status


def test_the_text_grows_token_by_token(client):
    last, outputs = client.results(FLAT, "a list", *values(max_new_tokens=300, seed=1), api_name="/write")
    texts = [text for text, _, _ in outputs if isinstance(text, str) and text]
    assert len(texts) > 3 and texts[-1] == last[0] and len(set(map(len, texts))) > 3
    # What is shown stays, but for a character of which some bytes are still to come.
    assert all(last[0].startswith(text.rstrip("\ufffd")) for text in texts)
    assert any("token " in status and " of 300, " in status for _, status, _ in outputs)


def test_a_cancel_ends_the_text_at_the_next_token(client):
    job = client.submit(
        DEEP, "a", *values(max_new_tokens=1000, thinking_steps=16, exit_threshold=0), api_name="/write"
    )
    wait_until(lambda: len(job.outputs()) > 3 or job.done())
    start = time.process_time()
    assert not job.done() and job.cancel()
    client.predict(FLAT, "a", *values(max_new_tokens=1), api_name="/write")
    assert time.process_time() - start < 5


def test_every_job_warns_of_a_text_that_is_longer_than_those_in_training(client, monkeypatch):
    messages, copies = [], []
    original = TextGenerator.check_length

    def spy(self, *lengths):
        copies.append(self)
        messages.append(self.trained_length)
        original(self, *lengths)

    monkeypatch.setattr(TextGenerator, "check_length", spy)
    for _ in range(2):
        client.predict(FLAT, "a", *values(max_new_tokens=40), api_name="/write")
    assert messages == [32, 32] and copies[0].model is copies[1].model


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("../../etc", {}, "is no complete checkpoint of text"),
        (FLAT, {"seed": -1}, "--seed=-1 must be &gt;= 0"),
        (FLAT, {"temperature": 0, "top_k": 3}, "--top_k has no effect with temperature=0.0"),
        (FLAT, {"thinking_steps": 2}, "--thinking_steps has no effect: the model has no recurrent core"),
        (FLAT, {"seed": None}, "seed is no number; give one"),
        (FLAT, {"exit_threshold": None}, "exit_threshold is no number; give one"),
        (DEEP, {"exit_threshold": -0.5}, "--exit_threshold=-0.5 must be -1, 0 or above"),
    ],
)
def test_errors_are_in_our_words(client, name, changes, message):
    with pytest.raises(Exception, match=message) as caught:
        client.predict(name, "a", *values(**changes), api_name="/write")
    assert "Traceback" not in str(caught.value)


def test_settings_are_checked_as_flags():
    call = settings("runs/x", "a", **USUAL)
    assert str(call) == "python inference/generate_text.py --max_new_tokens 12 --checkpoint runs/x --prompts a"
    for prompt, changes, message in (
        ("a" * 8001, {}, "characters of the prompt=8001 must be at most 8000"),
        ("\ud800", {}, "is not UTF-8"),
        ("a", {"top_p": 1.5}, "--top_p=1.5 must be <= 1"),
        ("a", {"max_new_tokens": 9999}, "max_new_tokens=9999 must be at most 1000; the command line takes more"),
        ("a", {"max_new_tokens": 0}, "--max_new_tokens=0 must be > 0"),
        ("a", {"seed": float("nan")}, "seed is no number"),
    ):
        with pytest.raises(ValueError, match=message):
            settings("runs/x", prompt, **{**USUAL, **changes})
