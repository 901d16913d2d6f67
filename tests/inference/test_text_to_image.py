"""Prompts to images with a small untrained model: files, settings, and the same image for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference.text_to_image import generate
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.processes import newest_results
from tests.helpers.runs import changed
from utils.command_line import parse_arguments
from utils.generation.arguments.image import TextToImageArguments


@pytest.fixture(scope="module")
def checkpoint(latent_cache, tmp_path_factory):
    return save_diffusion_checkpoint(tmp_path_factory.mktemp("runs") / "image_diffusion" / "small", latent_cache)


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(name, *words): generate into `tmp_path / name`; returns the settings and the images by file name."""

    def call(name, *words):
        folder = tmp_path / name
        common = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--n_steps", "3"]
        generate(parse_arguments(TextToImageArguments, changed(common, *map(str, words)), ""))
        folder = newest_results(folder)
        images = {file.name: np.asarray(Image.open(file)).astype(int) for file in folder.glob("*.png")}
        return json.loads((folder / "settings.json").read_text()), images

    return call


def test_files_and_settings(run, checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("zwölf Bären\n\n  a red disc\n", encoding="utf-8")
    words = ["--prompts", "A key!", "--prompt_file", tmp_path / "prompts.txt", "--seeds", 7, 8]
    settings, images = run("out", *words, "--sampler", "euler")
    names = [
        f"{stem}_seed{seed}.png" for stem in ("000_a_key_", "001_zw_lf_b_ren", "002_a_red_disc") for seed in (7, 8)
    ]
    assert images.keys() == {*names, "sheet.png"}
    assert [image["file"] for image in settings["images"]] == names
    assert settings["images"][2]["prompt"] == "zwölf Bären" and settings["images"][2]["seed"] == 7
    assert settings["sampler"] == "euler" and settings["n_steps"] == 3 and settings["seeds"] == [7, 8]
    assert settings["checkpoint"] == str(checkpoint) and settings["weights"] == "ema" and "git_commit" in settings
    assert (Path(settings["vae_checkpoint"]) / "COMPLETE.json").is_file()  # The one that was found.
    assert all(images[name].shape == (32, 32, 3) for name in names)
    assert all(name in capsys.readouterr().out for name in ["sheet.png"])


def test_the_sheet_of_many_images_is_a_grid(run):
    words = ["--prompts", *(f"caption {number}" for number in range(9)), "--n_steps", 1]
    height, width, _ = run("prompts", *words)[1]["sheet.png"].shape
    assert 0.6 < width / height < 1.7
    height, width, _ = run("seeds", "--prompts", "a key", "--n_images", 9, "--n_steps", 1)[1]["sheet.png"].shape
    assert 0.6 < width / height < 1.7


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_the_same_seed_gives_the_same_image_in_every_batch(run, sampler):
    words = ["--prompts", "a red disc", "a very long caption " * 4, "", "--n_images", 2, "--sampler", sampler]
    alone, together = run("alone", *words, "--batch_size", 1)[1], run("together", *words, "--batch_size", 5)[1]
    assert alone.keys() == together.keys() and len(alone) == 7
    for name in alone.keys() - {"sheet.png"}:
        # Sums in a larger batch are taken in another order: a value between two levels may round either way.
        assert np.abs(alone[name] - together[name]).max() <= 1
    assert len({image.tobytes() for name, image in alone.items() if name != "sheet.png"}) == 6


def test_seeds_prompts_and_weights_matter(run):
    words = ["--prompts", "a red disc", "--seeds", 3]
    ((name, first),) = ((name, image) for name, image in run("a", *words)[1].items() if name != "sheet.png")
    among_others = run("b", "--prompts", "a red disc", "a key", "--seeds", 5, 3)[1]
    assert np.abs(among_others[name] - first).max() <= 1
    assert np.abs(among_others["000_a_red_disc_seed5.png"] - first).max() > 1
    assert (run("c", *words, "--weights", "raw")[1][name] != first).any()
    assert (run("d", *words, "--guidance_scale", 6)[1][name] != first).any()


def test_absent_averaged_weights_are_recorded(latent_cache, tmp_path):
    folder = save_diffusion_checkpoint(tmp_path / "run", latent_cache, with_average=False)
    words = ["--checkpoint", folder, "--prompts", "a", "--n_steps", 1, "--output_dir", tmp_path]
    generate(parse_arguments(TextToImageArguments, [str(word) for word in words], ""))
    assert json.loads((tmp_path / "settings.json").read_text())["weights"] == "raw"


def test_flags_that_are_needed_or_have_no_effect(capsys):
    for words, message in (
        (["--checkpoint", "runs/x"], "--prompts or --prompt_file are needed"),
        (
            ["--checkpoint", "runs/x", "--prompts", "a", "--seeds", "1", "--n_images", "2"],
            "--n_images has no effect",
        ),
        (["--checkpoint", "runs/x", "--prompts", "a", "--seeds", str(2**63)], "--seeds"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(TextToImageArguments, words, "")
        assert message in capsys.readouterr().err


def test_another_stage_and_an_empty_file_are_refused(run, checkpoint, latent_cache, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no line with text"):
        run("out", "--prompt_file", tmp_path / "empty.txt")
    vae = next((latent_cache.parent / "vae").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="text to image needs image_diffusion"):
        run("out", "--prompts", "a", "--checkpoint", vae)


def test_prompts_and_seeds_and_folders_that_do_not_fit(run, tmp_path, caplog):
    settings, _ = run("long", "--prompts", "a", "a " * 500, "--seeds", 1, 1)
    assert [record.args[0] for record in caplog.records if "is not read" in record.msg] == ["a " * 500]
    assert [image["seed"] for image in settings["images"]] == [1, 1] and settings["seeds"] == [1]
    with pytest.raises(ValueError, match=r"'caf\\udce9' is not UTF-8"):
        run("none", "--prompts", "a", "caf\udce9")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"--output_dir .*file is a file; give a folder"):
        run("file", "--prompts", "a")
    assert not (tmp_path / "none").exists()
