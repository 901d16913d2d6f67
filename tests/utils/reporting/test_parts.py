"""Parts of the page: escaping, curves, media within a limit, times of a recipe."""

import base64
import io
import math
import re

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils.reporting.curves import chart, number, ticks
from utils.reporting.markup import Markup, escape, tag
from utils.reporting.media import MAX_SECONDS, Media
from utils.reporting.runs import Run
from utils.reporting.scores import scores_of
from utils.reporting.sections import answers, figures, html_table, section
from utils.reporting.times import Step, by_stage, duration, read_steps
from utils.reporting.views import VIEWS


def test_everything_but_markup_is_escaped():
    text = "<script>\"'&"
    element = tag("p", text, [tag("b", text), None], title=text, hidden=True, lang=None, class_="a", data_x=1)
    escaped = "&lt;script&gt;&quot;&#x27;&amp;"
    attributes = f'title="{escaped}" hidden class="a" data-x="1"'
    assert element == f"<p {attributes}>{escaped}<b>{escaped}</b></p>"
    assert tag("img", src="x") == '<img src="x"/>'
    assert escape(Markup("<b>")) == "<b>"


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(2, 6))
def test_ticks_are_round_and_cover_the_values(low, width, count):
    high = low + width
    values = ticks(low, high, count)
    steps = np.diff(values)
    assert values[0] <= low + 1e-6 * width and values[-1] <= high + 1e-6 * width
    if len(values) > 1:
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(mantissa - round_) for round_ in (1, 2, 2.5, 5, 10)) < 1e-3
        assert np.allclose(steps, steps[0], rtol=1e-3)
    assert len(values) <= 2 * count + 2


def test_a_chart_draws_every_finite_point_in_its_place():
    points = [(0, 4.0), (50, math.nan), (100, 2.0), (200, 1.0)]
    drawn = chart({"training": points, "one point": [(0, 1.0)]}, "Loss")
    assert drawn is not None and "<b>1</b>" in drawn and "one point" not in drawn
    pixels = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn)]
    assert len(pixels) == 3
    # Steps 0, 100 and 200 are evenly spaced; values fall downwards, and 4 to 2 is twice as far as 2 to 1.
    assert pixels[1][0] - pixels[0][0] == pytest.approx(pixels[2][0] - pixels[1][0], abs=0.2)
    assert pixels[1][1] - pixels[0][1] == pytest.approx(2 * (pixels[2][1] - pixels[1][1]), abs=0.3)
    assert chart({"flat": [(1, 2.0), (2, 2.0)]}, "Loss") is not None
    assert chart({"nothing": []}, "Loss") is None


def test_long_curves_keep_their_ends():
    drawn = chart({"loss": [(step, 1 / (1 + step)) for step in range(5000)]}, "Loss", is_logarithmic=True)
    assert drawn is not None and len(re.findall("[ML][0-9]", drawn)) == 300
    assert [number(x) for x in (0, 12345.0, 0.5, 1e-5, 123456)] == ["0", "12,345", "0.5", "1.0e-05", "1.2e+05"]


def decoded(element: str) -> bytes:
    """The content of a data URI."""
    found = re.search(r'src="data:[a-z/]+;base64,([^"]+)"', element)
    assert found is not None
    return base64.b64decode(found[1])


def test_images_and_clips_keep_their_content_within_the_limit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.fromarray(noise[:20, :30]).save(small)
    Image.fromarray(noise).save(large)
    waveform = np.sin(np.arange(16000 * (round(MAX_SECONDS) + 2)) * 0.05) * 0.5
    soundfile.write(tmp_path / "tone.wav", waveform, 16000)
    media = Media(2_000_000)
    image = media.image(small, "small <image>")
    assert image is not None and "small &lt;image&gt;" in image
    assert decoded(image) == small.read_bytes()  # PNG as it is
    image = media.image(large, "large")
    assert image is not None and Image.open(io.BytesIO(decoded(image))).format == "WEBP"
    player = media.audio(tmp_path / "tone.wav", "tone")
    assert player is not None
    samples, rate = soundfile.read(io.BytesIO(decoded(player)))
    assert rate == 16000 and len(samples) == 16000 * MAX_SECONDS
    assert np.abs(samples - waveform[: len(samples)]).max() < 1e-4
    # What is over the limit, cut off or no file is left out, and named.
    (tmp_path / "cut.png").write_bytes(large.read_bytes()[:1000])
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    full = Media(100)
    assert full.image(small, "") is None
    for name in ("cut.png", "none.png"):
        assert full.image(tmp_path / name, "") is None
    for name in ("cut.wav", "none.wav", "tone.wav"):
        assert full.audio(tmp_path / name, "") is None
    assert len(full.left_out) == 6 and "too large" in full.left_out[str(small)]


def test_times_add_up_by_stage_and_damaged_lines_are_left_out(tmp_path):
    rows = [
        "A\tdata/x\t5\t12-3\tpython x",
        "B\truns/b\t70\t-\tpython b.py --text a\\ b",
        "A\truns/a\t3\t1-1\ty",
        "B\truns",
    ]
    (tmp_path / "steps.tsv").write_text("\n".join(rows))
    steps = read_steps(tmp_path)
    assert by_stage(steps) == {"A": 8, "B": 70}
    assert [step.is_complete for step in steps] == [True, False, True]
    assert steps[1].command == "python b.py --text 'a b'"
    assert [duration(seconds) for seconds in (8, 70, 3720)] == ["8 s", "1 min 10 s", "1 h 02 min"]
    assert read_steps(tmp_path / "nowhere") == []


def test_the_last_row_of_an_output_counts(tmp_path):
    rows = ["A\truns/a\t5\t-+1\tx", "B\truns/b\t1\t1+1\ty", "A\truns/a\t9\t1+1\tx"]
    (tmp_path / "steps.tsv").write_text("\n".join(rows))
    assert [(step.output, step.seconds, step.is_complete) for step in read_steps(tmp_path)] == [
        ("runs/a", 9, True),
        ("runs/b", 1, True),
    ]


def test_answers_show_images_and_clips_of_prompts_and_replies(tmp_path):
    image, clip = tmp_path / "drawn.png", tmp_path / "spoken.wav"
    Image.new("RGB", (8, 8), "red").save(image)
    soundfile.write(clip, np.zeros(800), 16000)
    rows = [
        {"prompt": "a <frog>", "modality": "image", "answer": str(image)},
        {"prompt": "a house", "modality": "audio", "answer": str(clip)},
        {"prompt": str(image), "modality": "text", "answer": "a large <b>frog</b>"},
        {"prompt": str(clip), "modality": "text", "answer": "a house"},
        {"prompt": "gone", "modality": "image", "answer": str(tmp_path / "gone.png")},
    ]
    shown = answers({"answers": [*rows, "no row"]}, Media(1_000_000))
    assert shown is not None and shown.count("<img") == 2 and shown.count("<audio") == 2
    assert "“a &lt;frog&gt;”" in shown and "“a large &lt;b&gt;frog&lt;/b&gt;”" in shown
    assert shown.count("asked") == 5 and shown.count("answered") == 4


def test_every_direction_of_a_multimodal_model_has_its_control():
    rows = {
        "image-text": {"model": {"exact": 1.0, "words": 1.0}, "shuffled": {"exact": 0.0, "words": 0.25}},
        "text-image": {"vae": {"read_all": 0.5}, "model": {"probe_top1": 0.75}, "shuffled": {"probe_top1": 0.03}},
        "text-audio": {"model": {"length_error": 2.0}},
    }
    scores = scores_of("multimodal", {"scores": rows, "losses": {}})
    first, second, third = (table.figure() for table in scores)
    assert str(first) == "exact 1.000 (shuffled conditions 0.000)"
    assert str(second) == "probe 0.750 (shuffled conditions 0.030)" and third is None
    drawn = figures([first, second]) if first and second else None
    assert drawn is not None and "width:100.0%" in drawn and "width:4.0%" in drawn
    table = html_table(scores[0].table())
    assert '<tr class="bold"><td>this model</td><td>1.000</td><td>1.000</td></tr>' in table
    assert "<th>exact<small>(high)</small></th>" in table
    assert scores_of("multimodal", {}) == []


def test_a_section_has_the_commands_of_its_own_run(tmp_path):
    folder = tmp_path / "multimodal" / "demo"
    outputs = (folder, f"{folder}/metrics.json", f"{folder}_text")
    steps = [Step("A", str(output), 1.0, True, f"python {number}.py") for number, output in enumerate(outputs)]
    shown = section(VIEWS[-1], Run.read("multimodal", folder), [], Media(0), steps)
    assert "python 0.py" in shown and "python 1.py" in shown and "python 2.py" not in shown
