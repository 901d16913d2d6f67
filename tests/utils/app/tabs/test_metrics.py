"""Tab Metrics: two evaluations side by side, what they were measured under, and what makes a missing one."""

import json
import shlex
import shutil

import pytest
from PIL import Image

from evaluate import EvaluateArguments
from utils.app.metrics import evaluated, names
from utils.app.runs import Runs
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
    return {**base, "definitions": {"words": "Shares of words."}, "seconds": 3.0, "threads": 1, **changed}


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
    notes, table, *sheets, definitions, _ = client.predict("measured/first", "measured/second", api_name="/metrics")
    assert table["headers"] == [
        "row", "metric", "measured/first, step 4", "measured/second, step 4", "difference", "better",
    ]  # fmt: skip
    assert table["data"] == [
        ["generated", "Frechet", "100.0", "80.0", "-20.0", "second"],
        ["generated", "KID", "2.000 ± 0.500", "1.500 ± 0.500", "-0.500", "within the error"],
        ["generated", "words", "0.500", "0.750", "+0.250", "second"],
        ["shuffled (reference)", "words", "0.250", "0.250", "0.000", ""],
        ["model", "parameters", "7", "9", "+2", ""],
    ]
    assert notes == "measured under different conditions: data.n_samples: 288 and 10"
    assert definitions == "- **words**: Shares of words."
    shown = [sheet for sheet in sheets if sheet["visible"]]
    assert [sheet["label"] for sheet in shown] == ["contact_sheet of the first", "contact_sheet of the second"]
    assert shown[0]["value"] and not shown[1]["value"]
    same = client.predict("measured/first", "measured/first", api_name="/metrics")
    assert same[0] == "measured under the same conditions" and len(same[1]["data"]) == 5 - 1


def test_what_was_not_measured_names_the_command(client, measured, runs):
    notes, table, *_, line = client.predict(CHECKPOINT, "measured/second", api_name="/metrics")
    assert notes == f"{CHECKPOINT} has no metrics yet: run its command below"
    assert table["data"][0] == ["generated", "Frechet", "-", "80.0", "", ""]
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
    (root / "small" / "metrics-8" / "metrics.json").write_text(json.dumps(metrics_of(step=8)))
    assert evaluated(listed, "small/checkpoint-8").metrics["step"] == 8
    # The command of a folder that holds metrics alone evaluates the checkpoint that they are of.
    line = evaluated(listed, "small/metrics-8").command
    assert line == f"python evaluate.py --checkpoint x/checkpoint-4 --output_dir {root / 'small' / 'metrics-8'}"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("measured/first", "measured/vocoder", "of stage image_diffusion and .* of stage vocoder.* choose two of one"),
        ("measured/first", "measured/damaged", "has no field stage; evaluate the checkpoint again"),
        ("measured/first", "measured/odd", "scores is no table; evaluate the checkpoint again"),
        ("measured/first", "../runs/measured/first", "is neither a run with a checkpoint nor one"),
        ("/etc", "measured/first", "is neither a run with a checkpoint nor one"),
        (None, "measured/first", "choose one, such as"),
    ],
)
def test_errors_are_in_our_words(client, measured, first, second, message):
    with pytest.raises(Exception, match=message) as caught:
        client.predict(first, second, api_name="/metrics")
    assert "Traceback" not in str(caught.value)


def test_links_that_lead_out_are_not_followed(runs, measured, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of()))
    (measured / "linked").symlink_to(tmp_path)
    (measured / "damaged" / "metrics.json").unlink()
    (measured / "damaged" / "metrics.json").symlink_to(tmp_path / "metrics.json")
    listed = names(Runs(runs))
    assert "measured/first" in listed and not {"measured/linked", "measured/damaged"} & set(listed)
