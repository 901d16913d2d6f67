"""Tab Metrics: two evaluations side by side, what they were measured under, and what makes a missing one."""

import json
import os
import re
import shlex
import shutil

import pytest
from PIL import Image

from evaluate import EvaluateArguments
from utils.app.arguments import AppArguments
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.metrics import Evaluated, conditions, evaluated, n_samples, names
from utils.app.models import Models
from utils.app.runs import Runs
from utils.app.tabs.metrics import ALONE, choices_of
from utils.command_line import parse_arguments

STAGE = "image_diffusion"
CHECKPOINT = f"{STAGE}/small/checkpoint-4"


def metrics_of(**changed):
    scores = {
        "generated": {"frechet": 100.0, "kid": 2.0, "kid_error": 0.5, "words": 0.5},
        "shuffled": {"words": 0.25, "kid": None},
    }
    model = {"parameters": 7, "seconds_per_image": 0.5, "latent_shape": [16, 8, 8]}
    data = {"folder": "x", "n_samples": 288}
    base = {"stage": STAGE, "step": 4, "checkpoint": "x/checkpoint-4", "scores": scores, "model": model, "data": data}
    base |= {"definitions": {"words": "Shares of words."}, "seconds": 3.0, "threads": 1}
    return {**base, "arguments": {"max_samples": 288, "checkpoint": "x/checkpoint-4", "curve": True}, **changed}


@pytest.fixture
def measured(runs):
    """Folders with metrics, by name; removed at the end."""
    better = {"generated": {"frechet": 80.0, "kid": 1.5, "kid_error": 0.5, "words": 0.75}, "shuffled": {"words": 0.25}}
    contents = {
        "first": metrics_of(),
        "second": metrics_of(scores=better, model={"parameters": 9}, data={"folder": "x", "n_samples": 10}),
        "vocoder": metrics_of(stage="vocoder"),
        "damaged": [],
        "odd": metrics_of(scores=5),
    }
    root = runs / "measured"
    for name, content in contents.items():
        (root / name).mkdir(parents=True)
        (root / name / "metrics.json").write_text(json.dumps(content))
    Image.new("RGB", (8, 8), "red").save(root / "first" / "contact_sheet.png")
    yield root
    shutil.rmtree(root)


def test_both_columns_their_difference_and_the_references(client, measured):
    notes, table, *sheets, definitions, line = client.predict("measured/first", "measured/second", api_name="/metrics")
    assert table["headers"] == [
        "row", "metric", "measured/first, step 4", "measured/second, step 4", "difference", "better", "samples",
    ]  # fmt: skip
    assert table["data"] == [
        ["generated", "Frechet", "100.0", "80.0", "-20.0", "second", "288 and 10"],
        ["generated", "KID", "2.000 ± 0.500", "1.500 ± 0.500", "-0.500", "within the error", "288 and 10"],
        ["generated", "words", "0.500", "0.750", "+0.250", "second", "288 and 10"],
        ["shuffled (reference)", "words", "0.250", "0.250", "0.000", "", "288 and 10"],
        ["model", "parameters", "7", "9", "+2", "", ""],
    ]
    assert notes == "measured under different conditions: data.n_samples: 288 and 10"
    # The command is the one that measured, each once.
    assert line == "python evaluate.py --checkpoint x/checkpoint-4 --max_samples 288 --curve"
    assert definitions == "- **words**: Shares of words."
    shown = [sheet for sheet in sheets if sheet["visible"]]
    assert [sheet["label"] for sheet in shown] == ["contact_sheet of the first", "contact_sheet of the second"]
    assert shown[0]["value"] and not shown[1]["value"]
    same = client.predict("measured/first", "measured/first", api_name="/metrics")
    assert same[0] == "measured under the same conditions" and len(same[1]["data"]) == 5 - 1


def test_one_is_shown_alone(client, measured):
    notes, table, *sheets, _, line = client.predict("measured/first", ALONE, api_name="/metrics")
    assert notes == "" and table["headers"] == ["row", "metric", "measured/first, step 4", "good", "samples"]
    assert table["data"][:2] == [
        ["generated", "Frechet", "100.0", "low", "288"],
        ["generated", "KID", "2.000 ± 0.500", "low", "288"],
    ]
    assert table["data"][-1] == ["model", "parameters", "7", "", ""]
    assert [sheet["label"] for sheet in sheets if sheet["visible"]] == ["contact_sheet of the first"]
    assert line.startswith("python evaluate.py --checkpoint x/checkpoint-4")
    alone, also = (client.predict("measured/first", name, api_name="/metrics")[1] for name in (None, ""))
    assert alone == also == table


@pytest.mark.parametrize(
    ("content", "path", "count"),
    [
        ({"n_clips_defined": {"model": {"stoi": 11}}}, ("scores", "model", "stoi"), "11"),
        ({"n_clips_defined": {"model": {"stoi": 11}}}, ("scores", "model", "real_time_factor"), ""),
        ({"n_clips_defined": {}, "scores": {"model": {"n_clips_all": 9}}}, ("scores", "model", "cer_all"), "9"),
        ({"n_clips_defined": [], "scores": {}}, ("scores", "model", "wer"), ""),
        ({"n_items": {"text-image": 72}}, ("losses", "text-image", "model", "error_t0.5"), "72"),
        ({"data": {"n_samples": 5}}, ("scores", "generated", "kid"), "5"),
        ({"data": {"n_samples": 5}}, ("model", "parameters"), ""),
    ],
)
def test_the_number_of_samples_of_a_metric(content, path, count):
    assert n_samples(content, path) == count


def test_the_second_list_follows_the_first(runs, measured):
    context = Context(None, AppArguments(), Runs(runs), Models(), Jobs(None))
    offered = choices_of(context, "measured/first")
    assert offered["second"]["value"] == "measured/second"
    listed = offered["second"]["choices"]
    assert listed[0] == ALONE and {"measured/second", CHECKPOINT} < set(listed)
    assert not {"measured/first", "measured/vocoder", "measured/damaged"} & set(listed)
    assert "measured/vocoder" in offered["first"]["choices"]
    # What was chosen stays where it fits.
    assert choices_of(context, "measured/first", CHECKPOINT)["second"]["value"] == CHECKPOINT
    assert choices_of(context, "measured/first", ALONE)["second"]["value"] == ALONE
    assert choices_of(context, "measured/vocoder", "measured/first")["second"] == {"choices": [ALONE], "value": ALONE}
    assert choices_of(context, "measured/first", "measured/first")["second"]["value"] == "measured/second"
    for name in ("nonsense", "measured/damaged"):
        assert choices_of(context, name)["second"] == {"choices": [ALONE], "value": ALONE}
    # The newest is the first that is shown; an own checkpoint, which has the same metrics, is not its partner.
    os.utime(measured / "vocoder" / "metrics.json", (2e9, 2e9))
    assert choices_of(context, None)["first"]["value"] == "measured/vocoder"
    os.utime(measured / "second" / "metrics.json", (3e9, 3e9))
    offered = choices_of(context, None)
    assert (offered["first"]["value"], offered["second"]["value"]) == ("measured/second", "measured/first")


def test_a_run_is_compared_with_another_run_or_with_none(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs / STAGE / "small", root / "small")
    (root / "small" / "metrics.json").write_text(json.dumps(metrics_of()))
    context = Context(None, AppArguments(), Runs(root), Models(), Jobs(None))
    assert choices_of(context, "small") == {
        "first": {"choices": ["small", "small/checkpoint-4"], "value": "small"},
        "second": {"choices": [ALONE, "small/checkpoint-4"], "value": ALONE},
    }
    (root / "small" / "metrics-8").mkdir()
    (root / "small" / "metrics-8" / "metrics.json").write_text(json.dumps(metrics_of(step=8)))
    assert choices_of(context, "small")["second"]["value"] == "small/metrics-8"
    shutil.copytree(root / "small", root / "other", ignore=shutil.ignore_patterns("metrics-8"))
    assert choices_of(context, "small")["second"]["value"] == "other"


def test_other_flags_are_other_conditions_where_they_are_recorded():
    with_vocoder = {"arguments": {"vocoder_checkpoint": "v", "output_dir": "a"}}
    sides = [Evaluated("x", STAGE, None, metrics, "") for metrics in ({"arguments": {"curve": True}}, with_vocoder)]
    assert conditions(*sides) == ["--curve: True and None", "--vocoder_checkpoint: None and v"]
    sides[0].metrics = {}
    assert conditions(*sides) == []


def test_what_was_not_measured_names_the_command(client, measured, runs):
    notes, table, *_, line = client.predict(CHECKPOINT, "measured/second", api_name="/metrics")
    assert notes == f"{CHECKPOINT} has no metrics yet: run its command below"
    assert table["data"][0] == ["generated", "Frechet", "-", "80.0", "", "", "10"]
    program, script, *words = shlex.split(line.splitlines()[0])
    args = parse_arguments(EvaluateArguments, words, "")
    assert (program, script, args.checkpoint) == ("python", "evaluate.py", str(runs / CHECKPOINT))
    assert args.output_dir == str(runs / STAGE / "small" / "metrics-4")
    assert f"--checkpoint {runs / STAGE / 'small'}\n" in client.predict(
        f"{STAGE}/small", CHECKPOINT, api_name="/metrics"
    )[-1]  # fmt: skip


def test_the_metrics_of_a_run_are_those_of_one_checkpoint(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs / STAGE / "small", root / "small")
    shutil.copytree(root / "small" / "checkpoint-4", root / "small" / "checkpoint-8")
    (root / "small" / "metrics.json").write_text(json.dumps(metrics_of()))
    listed = Runs(root)
    assert names(listed) == ["small", "small/checkpoint-4", "small/checkpoint-8"]
    assert evaluated(listed, "small/checkpoint-4").folder == evaluated(listed, "small").folder == root / "small"
    assert evaluated(listed, "small/checkpoint-8").folder is None
    (root / "small" / "metrics-8").mkdir()
    file = root / "small" / "metrics-8" / "metrics.json"
    file.write_text(json.dumps(metrics_of(step=8)))
    assert evaluated(listed, "small/checkpoint-8").metrics["step"] == 8
    assert (
        evaluated(listed, "small").command
        == "python evaluate.py --checkpoint x/checkpoint-4 --max_samples 288 --curve"
    )
    # Earlier versions recorded no flags: the folder's metrics are made of the checkpoint that they are of.
    file.write_text(json.dumps(metrics_of(step=8, arguments={})))
    line = evaluated(listed, "small/metrics-8").command
    assert line == f"python evaluate.py --checkpoint x/checkpoint-4 --output_dir {root / 'small' / 'metrics-8'}"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("measured/first", "measured/vocoder", "of stage image_diffusion and .* of stage vocoder.* choose two of one"),
        ("measured/first", "measured/damaged", "has no field stage; evaluate the checkpoint again"),
        ("measured/odd", ALONE, "scores is no table; evaluate the checkpoint again"),
        ("measured/first", "../runs/measured/first", "is neither a run with a checkpoint nor one"),
        ("nonsense", "measured/first", "'nonsense' is neither a run with a checkpoint nor one"),
        ("/etc", "measured/first", "is neither a run with a checkpoint nor one"),
        (None, "measured/first", "choose one, such as"),
    ],
)
def test_a_refusal_is_a_note_in_our_words_and_clears_the_rest(client, measured, first, second, message):
    notes, table, *sheets, definitions, line = client.predict(first, second, api_name="/metrics")
    assert re.search(message, notes) and "Traceback" not in notes
    assert table["data"] == [] and not any(sheet["visible"] for sheet in sheets)
    assert definitions == line == ""


def test_links_that_lead_out_are_not_followed(runs, measured, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of()))
    (measured / "linked").symlink_to(tmp_path)
    (measured / "damaged" / "metrics.json").unlink()
    (measured / "damaged" / "metrics.json").symlink_to(tmp_path / "metrics.json")
    listed = names(Runs(runs))
    assert "measured/first" in listed and not {"measured/linked", "measured/damaged"} & set(listed)
