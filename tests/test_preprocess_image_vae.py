import numpy as np
import pytest
import torch
from PIL import Image

from dataset_loading.image.pixels import ImageDataset, to_uint8
from preprocess_image_vae_dataset import ImageVAEPreprocess
from tests.helpers.runs import changed


@pytest.fixture
def raw(tmp_path):
    """A landscape, red left and blue right, half transparent white below; and a portrait turned by EXIF."""
    (tmp_path / "raw/seen").mkdir(parents=True)
    image = Image.new("RGBA", (60, 30), (255, 0, 0, 255))
    image.paste((0, 0, 255, 255), (30, 0, 60, 30))
    image.paste((0, 0, 0, 0), (0, 20, 60, 30))
    image.save(tmp_path / "raw/seen/wide.png")
    turned = Image.new("RGB", (60, 30), "red")
    turned.paste("blue", (30, 0, 60, 30))
    exif = turned.getexif()
    exif[0x0112] = 8  # Show it rotated counterclockwise: blue comes to the top.
    turned.save(tmp_path / "raw/seen/turned.jpg", exif=exif, quality=95)
    return tmp_path / "raw"


def prepare(raw, out, *flags):
    argv = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "20", "--validation_fraction", "0"]
    ImageVAEPreprocess.main(changed([*argv, "--num_workers", "0"], *flags))
    data = ImageDataset(out, "train").expect(image_size=20)
    return {entry["source"]: to_uint8(data[i]["image"]).permute(1, 2, 0) for i, entry in enumerate(data.entries)}, data


def colour(image, x, y):
    return (
        ["red", "green", "blue"][int(image[y, x].argmax())] if image[y, x].float().std() > 60 else int(image[y, x, 0])
    )


@pytest.mark.parametrize(
    ("mode", "seen"),
    [
        ("crop", {(2, 5): "red", (17, 5): "blue", (10, 18): 128}),
        ("squash", {(2, 1): "red", (17, 1): "blue", (10, 18): 128}),
        ("pad", {(2, 2): 128, (2, 7): "red", (17, 7): "blue", (10, 14): 128, (10, 18): 128}),
    ],
)
def test_modes_transparency_and_background(raw, tmp_path, mode, seen):
    images, data = prepare(raw, tmp_path / "out", "--resize_mode", mode, "--background_color", "#808080")
    assert {place: colour(images["seen/wide.png"], *place) for place in seen} == seen
    turned = images["seen/turned.jpg"]
    assert colour(turned, 10, 4) == "blue" and colour(turned, 10, 16) == "red"
    assert data.manifest["settings"]["resize_mode"] == mode


def test_files_hold_uint8_images_and_captions_come_from_a_column(raw, tmp_path):
    _, data = prepare(raw, tmp_path / "out", "--caption_column", "label")
    sample = torch.load(tmp_path / "out/train" / f"{data.entries[0]['key']}.pt", weights_only=True)
    assert list(sample) == ["image"] and sample["image"].dtype == torch.uint8
    assert sample["image"].shape == (3, 20, 20) and sample["image"].is_contiguous()
    assert [entry["caption"] for entry in data.entries] == ["seen", "seen"]


def test_every_augmentation_changes_copies(raw, tmp_path):
    for flag in ("--random_resized_crop", "--horizontal_flip=1", "--color_jitter", "--rotation"):
        _, data = prepare(raw, tmp_path / flag, "--num_augmented_copies", "1", flag)
        by_copy = {(entry["source"], entry["copy"]): data[i]["image"] for i, entry in enumerate(data.entries)}
        plain, copy = by_copy["seen/wide.png", 0], by_copy["seen/wide.png", 1]
        assert not torch.equal(plain, copy)
        if flag == "--horizontal_flip=1":
            assert torch.equal(copy, plain.flip(-1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rotation"], "--rotation has no effect with num_augmented_copies=0"),
        (["--num_augmented_copies", "2"], "needs one of --random_resized_crop"),
        (["--background_color", "wite"], "--background_color='wite': unknown color"),
        (["--resize_mode", "croop"], "did you mean 'crop'"),
        (["--image_size", "0"], "--image_size=0 must be > 0"),
    ],
)
def test_wrong_flags(raw, tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit):
        prepare(raw, tmp_path / "out", *flags)
    assert message in capsys.readouterr().err


def test_noise_keeps_its_mean_when_shrunk(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    (tmp_path / "raw").mkdir()
    Image.fromarray(pixels).save(tmp_path / "raw/noise.png")
    images, _ = prepare(tmp_path / "raw", tmp_path / "out")
    assert abs(images["noise.png"].float().mean() - pixels.mean()) < 1
    assert images["noise.png"].float().std() < 10
