"""Tab Watch: any run under the folder, from its beginning, also while a model computes."""

import io
import re
import shlex
import time

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from dataset_loading.locks import only_writer
from tests.helpers.app.page import wait_until
from utils.app.run_folders import choose_run, run_names
from utils.app.runs import Runs
from utils.app.tabs.watch import decoded, plot_update
from utils.training.trackers import write_flags

NAME = "vocoder/begun"
DRAW = ("image_diffusion/small/checkpoint-4", "a key", 0, 2, 250, 3.0, "heun")


@pytest.fixture
def begun(runs):
    """A run that has logged two steps of 100, and holds its lock."""
    folder = runs / NAME
    with only_writer(folder, "wait"), SummaryWriter(str(folder)) as writer:
        write_flags(writer, {"max_steps": 100, "gan_weight": 0.1, "gan_start_step": 60, "run_name": "x"})
        for step in (10, 20):
            for tag, value in (("train/loss", 1 / step), ("train/memory_gib", 1.25), ("loss/mel", 0.5), ("eval/x", 3)):
                writer.add_scalar(tag, value, step, walltime=time.time() - 30 + step)
        writer.add_image("images/mel", np.full((3, 8, 16), 200, np.uint8), 20)
        writer.flush()
        yield folder
        for file in folder.glob("events*"):
            file.unlink()


def test_a_run_that_has_just_begun_is_watched(client, begun):
    runs, tags, status, *shown, line = client.predict(NAME, [], api_name="/watch")
    assert NAME in [name for name, _ in runs["choices"]] and "image_diffusion/small" in [n for n, _ in runs["choices"]]
    assert [tag for tag, _ in tags["choices"]] == ["train/loss", "eval/x", "loss/mel", "train/memory_gib"]
    first, second = status.splitlines()
    assert first == "step 20/100 (20 %)  loss 0.05  loss/mel 0.5  1.2 GiB  80 s left, more from step 60 on"
    assert second.startswith("running, last entry ")
    plots, images = shown[:6], shown[6:]
    assert [plot["label"] for plot in plots if plot["visible"]] == [
        "train/loss",
        "eval/x",
        "loss/mel",
        "train/memory_gib",
    ]
    assert plots[0]["value"]["data"][-1] == pytest.approx([20, 0.05])
    assert plots[0]["value"]["mark"] == "line" and plots[0]["x_lim"] == [10, 20]
    assert [image["label"] for image in images if image["visible"]] == ["mel, step 20"] and images[0]["value"]
    assert shlex.split(line) == ["tensorboard", "--logdir", str(begun)]
    chosen = client.predict(NAME, ["loss/mel"], api_name="/watch")[3:9]
    assert [plot["label"] for plot in chosen if plot["visible"]] == ["loss/mel"]


def test_a_run_that_has_ended_says_so(client, begun):
    (begun / ".lock").write_text("{}")
    status = client.predict(NAME, [], api_name="/watch")[2]
    assert "left" not in status and "not running, last entry" in status
    with SummaryWriter(str(begun)) as writer:
        writer.add_scalar("train/loss", 0.01, 100)
    assert "has made all its steps" in client.predict(NAME, [], api_name="/watch")[2]


def test_it_answers_while_a_model_computes(client, begun):
    job = client.submit(*DRAW, api_name="/draw")
    wait_until(lambda: len(job.outputs()) > 2 or job.done())
    start = time.process_time()
    assert "step 20/100" in client.predict(NAME, [], api_name="/watch")[2]
    assert time.process_time() - start < 5 and not job.done()
    assert job.cancel()


@pytest.mark.parametrize(
    "name", ["../runs/" + NAME, "vocoder/../" + NAME, NAME + "/", "vocoder", "/etc", "", ".", None]
)
def test_what_is_no_run_cannot_be_watched(client, begun, name):
    runs, _, status, *shown, line = client.predict(name, [], api_name="/watch")
    assert re.search(r"is no run in .*; choose one of the list", status) and "Traceback" not in status
    # Nothing of another run stays.
    assert NAME in [name for name, _ in runs["choices"]] and line == ""
    assert not any(component["visible"] for component in shown)
    assert "is no run in" in client.predict(str(begun), [], api_name="/watch")[2]


def test_too_many_curves_are_refused(client, begun):
    status = client.predict(NAME, [f"x{number}" for number in range(7)], api_name="/watch")[2]
    assert status == "7 curves are more than 6; TensorBoard shows all"


@pytest.mark.parametrize(("step", "limits"), [(250, [0, 500]), (0, [0, 1])])
def test_a_curve_of_one_step_is_a_point_in_the_middle(step, limits):
    gr = pytest.importorskip("gradio")
    update = plot_update(gr, "eval/x", [[step, 3.0]])
    assert (update["value"]["mark"], update["x_lim"]) == ("point", limits)
    assert plot_update(gr, "eval/x", [[step, 3.0], [step + 1, 2.0]])["value"]["mark"] == "line"
    assert plot_update(gr, "eval/x", [])["value"] is None


def test_runs_of_a_folder(tmp_path):
    runs = Runs(tmp_path / "runs")
    runs.root.mkdir()
    words = (
        r"has no run; begin one, such as by `python preprocess_image_vae_dataset.*, then `python pretrain_image_vae"
    )
    with pytest.raises(ValueError, match=words):
        choose_run(runs, "x")
    for name in ("a/begun/.lock", "a/former/tensorboard/events.out.tfevents.1", "b/saved/checkpoint-4/vae/.lock"):
        (runs.root / name).parent.mkdir(parents=True)
        (runs.root / name).touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / ".lock").touch()
    (runs.root / "a" / "linked").symlink_to(tmp_path / "outside")
    assert run_names(runs) == ["a/former", "a/begun", "b/saved"]
    assert choose_run(runs, "a/begun") == runs.root / "a" / "begun"
    with pytest.raises(ValueError, match="is no run"):
        choose_run(runs, "a/linked")


def test_a_damaged_image_is_left_out():
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    content = stream.getvalue()
    shown = decoded(
        {"images/a": (1, b"none"), "images/b": (2, content[: len(content) // 2]), "images/c": (3, content)}
    )
    assert [label for _, label in shown] == ["c, step 3"]
