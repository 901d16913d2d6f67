"""`--report_to`: what a run shows reaches every tracker."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, changed

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ("--logging_steps", "1", "--eval_steps", "2", "--n_logged_samples", "1")


def test_a_run_reaches_trackio_and_tensorboard_and_measured_steps_do_not(train, image_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when it is imported, here for the first time.
    trackio = pytest.importorskip("trackio")
    run = train("shown", 2, *FLAGS, "--report_to", "tensorboard", "trackio")
    tags = EventAccumulator(str(run.folder.parent)).Reload().Tags()
    assert {"train/loss", "eval/psnr"} <= set(tags["scalars"]) and tags["images"]
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--run_name", "measured"]
    ImageVAEStage.main(changed(SMALL_RUN, *words, "--measure", "1", "--report_to", "tensorboard", "trackio"))
    (shown,) = trackio.Api().runs("image_vae")
    assert shown.name == "shown" and shown.config["max_steps"] == 2


def test_nothing_is_written_where_a_run_reports_to_none(train):
    run = train("quiet", 1, "--report_to", "none")
    assert {path.name for path in run.folder.parent.iterdir()} == {"checkpoint-1"}


@pytest.mark.parametrize("values", [["none", "wandb"], []])
def test_none_stands_alone(train, values, capsys):
    with pytest.raises(SystemExit):
        train("wrong", 1, "--report_to", *values)
    assert "--report_to" in capsys.readouterr().err


def test_a_missing_tracker_is_an_error_before_the_model_is_built():
    program = (
        "import sys; sys.modules['wandb'] = None\n"
        "from utils.training.trackers import tracker_module\n"
        "try:\n    tracker_module('wandb')\nexcept ValueError as error:\n    print(error)"
    )
    message = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--report_to wandb" in message and "requirements-trackers.txt" in message
