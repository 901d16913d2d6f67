"""Tab Draw: the images of the script, shown as they form, one job at a time, ended by a cancel."""

import json
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference.text_to_image import generate
from tests.helpers.app.page import wait_until
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from utils.app.arguments import AppArguments
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs
from utils.app.tabs.draw import MAX_STEPS, draw, settings
from utils.checkpoints import mark_complete, write_json
from utils.command_line import parse_arguments
from utils.generation.arguments.image import TextToImageArguments

NAME = "image_diffusion/small/checkpoint-4"


def gallery_images(gallery):
    return [np.asarray(Image.open(item["image"]).convert("RGB")) for item in gallery]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_images_are_those_of_the_command_line_that_is_shown(client, tmp_path, sampler):
    gallery, status, line = client.predict(NAME, "a red disc; $(x)", 3, 3, 4, 2.5, sampler, api_name="/draw")
    program, script, *words = shlex.split(line)
    assert (program, script) == ("python", "inference/text_to_image.py")
    generate(parse_arguments(TextToImageArguments, [*words, "--output_dir", str(tmp_path / "out")], ""))
    files = [file for file in sorted((tmp_path / "out").glob("*.png")) if file.name != "sheet.png"]
    images = gallery_images(gallery)
    assert len(images) == len(files) == 3 and "3 of 32x32 pixels" in status and "weights ema" in status
    for image, file in zip(images, files):
        assert np.array_equal(image, np.asarray(Image.open(file)))


def test_images_are_shown_as_they_form(client):
    (gallery, status, _), outputs = client.results(NAME, "a key", 0, 1, 20, 3.0, "euler", api_name="/draw")
    assert len(outputs) > 3 and "step" in outputs[1][1]
    assert "1 of 32x32" in status and len(gallery) == 1


def test_a_cancel_ends_the_job_and_frees_the_page(client):
    job = client.submit(NAME, "a key", 0, 4, MAX_STEPS, 3.0, "heun", api_name="/draw")
    wait_until(lambda: len(job.outputs()) > 3 or job.done())
    start = time.process_time()
    assert not job.done() and job.cancel()
    _, status, _ = client.predict(NAME, "a key", 0, 1, 1, 1.0, "euler", api_name="/draw")
    assert "1 of 32x32" in status and time.process_time() - start < 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("../../etc", "a", 0, 1, 1, 1.0, "euler"), "is no complete checkpoint of image_diffusion"),
        (("image_diffusion/small/../small/checkpoint-4", "a", 0, 1, 1, 1.0, "euler"), "is no complete checkpoint"),
        ((NAME, "a", -1, 1, 1, 1.0, "euler"), r"--seeds=\[-1\] must be &gt;= 0"),
        ((NAME, "a", 0, 99, 1, 1.0, "euler"), "n_images=99 must be at most 16; the command line takes more"),
        ((NAME, "a", 0, 1, 0, 1.0, "euler"), "--n_steps=0 must be &gt; 0"),
        ((NAME, "a", 0, 1, 1, -0.5, "euler"), "--guidance_scale=-0.5 must be &gt;= 0"),
        ((NAME, "a", 0, 1, "many", 1.0, "euler"), "n_steps is no number; give one"),
        ((NAME, "a", 0, 1, 1, 1.0, "eular"), "did you mean 'euler'"),
    ],
)
def test_errors_are_in_our_words_without_a_traceback(client, values, message):
    with pytest.raises(Exception, match=message) as caught:
        client.predict(*values, api_name="/draw")
    assert "Traceback" not in str(caught.value)


def test_a_vae_that_was_exchanged_is_looked_for_anew(latent_cache, tmp_path):
    cache = shutil.copytree(latent_cache, tmp_path / "cache")
    save_diffusion_checkpoint(tmp_path / "runs" / "image_diffusion" / "small", cache)
    context = Context(None, AppArguments(), Runs(tmp_path / "runs"), Models(), Jobs(None))
    paths = []
    for _ in range(3):
        draw(context, lambda *outputs: None, NAME, "a", 0, 1, 1, 1.0, "euler")
        paths.append(Path(context.models.loaded["image_diffusion"].model.record["vae_checkpoint"]))
        if len(paths) == 2:  # Another VAE takes its place; that of the latents is still where it was recorded.
            write_json(paths[-1] / "config.json", {**json.loads((paths[-1] / "config.json").read_text()), "x": 1})
            mark_complete(paths[-1])
    assert paths[0] == paths[1] == cache / "vae" / "checkpoint-4" and paths[2] != paths[0]


def test_settings_are_checked_as_flags():
    values = {"seed": 0, "n_images": 1, "n_steps": 1, "guidance_scale": 1.0, "sampler": "euler"}
    call = settings("runs/x", "-x 'y'", **values)
    parsed = parse_arguments(TextToImageArguments, shlex.split(str(call))[2:], "")
    assert parsed == call.arguments and parsed.given == sorted(call.arguments.given)
    for wrong, message in (
        ({"seed": -1}, r"--seeds=\[-1\] must be >= 0"),
        ({"seed": None}, "seed is no number"),
        ({"n_images": 17}, "n_images=17 must be at most 16"),
        ({"n_images": 0}, "n_images=0 must be at least 1"),
        ({"n_images": None}, "n_images is no number"),
        ({"n_steps": MAX_STEPS + 1}, "n_steps=251 must be at most 250"),
        ({"n_steps": 0}, "--n_steps=0 must be > 0"),
        ({"guidance_scale": None}, "guidance_scale is no number"),
        ({"guidance_scale": float("nan")}, "--guidance_scale=nan must be finite"),
        ({"sampler": "eular"}, "did you mean 'euler'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings("runs/x", "a", **{**values, **wrong})
