"""Images of any kind and size through a small VAE."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_loading.image.pixels import to_float
from inference.reconstruct_image import reconstruct
from model.image.vae import ImageVAE
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.processes import newest_results
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.drawing.images import to_image
from utils.generation.arguments.image import ReconstructionArguments


@pytest.fixture(scope="module")
def checkpoint(image_cache, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "image_vae" / "small", image_cache)


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(*words): reconstruct into `tmp_path / "out"` and return the sizes of the images there by name."""

    def call(*words):
        words = ["--checkpoint", str(checkpoint.parent), "--output_dir", str(tmp_path / "out"), *words]
        reconstruct(parse_arguments(ReconstructionArguments, [str(word) for word in words], ""))
        return {file.name: Image.open(file).size for file in newest_results(tmp_path / "out").glob("*.png")}

    return call


def test_sizes_are_kept_and_nothing_is_left_over(run, tmp_path, capsys):
    Image.new("RGB", (37, 21), "red").save(tmp_path / "odd.png")
    sizes = run("--input", tmp_path / "odd.png", "--image_size", 0)
    assert sizes.keys() == {"odd_reconstruction.png", "sheet.png"} and sizes["odd_reconstruction.png"] == (37, 21)
    assert "odd_reconstruction.png  37x21 pixels, PSNR " in capsys.readouterr().out


def test_the_default_size_is_the_models(run, tmp_path):
    Image.new("RGB", (80, 160), "red").save(tmp_path / "tall.png")
    assert run("--input", tmp_path / "tall.png")["tall_reconstruction.png"] == (32, 64)
    assert run("--input", tmp_path / "tall.png", "--image_size", 50)["tall_reconstruction.png"] == (50, 100)


def test_orientation_transparency_palettes_and_folders(run, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees.
    Image.new("RGB", (40, 20), "red").save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("P", (16, 16)).save(folder / "deep" / "palette.gif")
    sizes = run("--input", folder, "--image_size", 0, "--background_color", "blue")
    assert sizes["turned_reconstruction.png"] == (20, 40) and "deep__palette_reconstruction.png" in sizes
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert (sheet == (0, 0, 255)).all(2).any()  # The background behind the transparent image.


def test_the_result_is_the_models_where_nothing_is_padded(run, tmp_path, checkpoint):
    Image.linear_gradient("L").resize((64, 32)).convert("RGB").save(tmp_path / "a.png")
    run("--input", tmp_path / "a.png", "--image_size", 0)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    with torch.no_grad():
        expected = load_model(ImageVAE, checkpoint)(image=to_float(pixels)[None]).reconstruction[0]
    found = np.asarray(Image.open(tmp_path / "out" / "a_reconstruction.png")).astype(int)
    # The last bit of a convolution depends on the memory layout, so that a value in between may round either way.
    assert np.abs(found - np.asarray(to_image(expected))).max() <= 1


def test_damaged_files_are_left_out(run, tmp_path, caplog):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"1 of 2 files gave no result: .*b\.png"):
        run("--input", tmp_path / "a.png", tmp_path / "b.png")
    names = {"a_reconstruction.png", "sheet.png", "settings.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names and "b.png is left out" in caplog.text


def test_images_of_one_name_are_kept_apart(run, tmp_path):
    for name in ("day1/IMG.png", "day1/IMG_2.png", "day2/IMG.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    sizes = run("--input", tmp_path / "day1", tmp_path / "day2")
    assert sizes.keys() == {f"{name}_reconstruction.png" for name in ("IMG", "IMG_2", "IMG_3")} | {"sheet.png"}


def test_strips_larger_than_the_limit_are_left_out(run, tmp_path):
    Image.new("RGB", (20000, 3), "red").save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"20000x3 pixels, 213333x32 for the model, more than --max_pixels=4000000"):
        run("--input", tmp_path / "strip.png")
    Image.new("RGB", (64, 8), "red").save(tmp_path / "short.png")
    run("--input", tmp_path / "short.png", "--image_size", 0, "--max_pixels", 512)
    with pytest.raises(ValueError, match="--max_pixels=511"):
        run("--input", tmp_path / "short.png", "--image_size", 0, "--max_pixels", 511)


def test_flags_that_are_needed(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(ReconstructionArguments, ["--checkpoint", "runs/x"], "")
    assert "--checkpoint and --input are needed" in capsys.readouterr().err
    words = ["--checkpoint", "runs/x", "--input", "a.png", "--background_color", "#12"]
    with pytest.raises(SystemExit):
        parse_arguments(ReconstructionArguments, words, "")
    assert "--background_color='#12'" in capsys.readouterr().err
