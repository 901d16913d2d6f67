"""Tab Rebuild image: the reconstruction of the script, its latents as training draws them, and files that are
refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from inference.reconstruct_image import reconstruct
from model.image.recurrent_vae import RecurrentVAE, RecurrentVAEConfig
from tests.helpers.app.page import flags_of, upload, visitor
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint
from utils.app.arguments import AppArguments
from utils.app.tabs.rebuild import latent_sheet, settings
from utils.drawing.images import channel_images, to_image
from utils.generation.arguments.image import ReconstructionArguments

NAMES = ("image_vae/small/checkpoint-4", "recurrent_vae/small/checkpoint-4")
SCRIPT = "inference/reconstruct_image.py"


@pytest.fixture(scope="module")
def client(image_cache, tmp_path_factory):
    """A visitor of a page with a VAE and one of a recurrent decoder."""
    runs = tmp_path_factory.mktemp("rebuild") / "runs"
    save_checkpoint(runs / "image_vae" / "small", image_cache)
    torch.manual_seed(0)
    sizes = {"image_size": 16, "encoder_widths": [8, 16], "latent_channels": 4, "decoder_width": 8, "n_steps": 3}
    vae = RecurrentVAE(RecurrentVAEConfig(**sizes)).eval()
    for parameter in vae.parameters():  # Away from the zeros that it starts with.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    save_stage_checkpoint(vae, "recurrent_vae", runs / "recurrent_vae" / "small")
    with visitor(runs, max_pixels=10_000) as client:
        yield client


@pytest.fixture
def photo(tmp_path):
    """An image of 50 x 37 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((50, 37)).save(tmp_path / "my photo.png")
    return tmp_path / "my photo.png"


@pytest.mark.parametrize(("name", "size", "steps"), [(NAMES[0], -1, 0), (NAMES[0], 0, 0), (NAMES[1], 20, 5)])
def test_the_reconstruction_is_that_of_the_command_line_that_is_shown(client, photo, tmp_path, name, size, steps):
    *images, latents, status, line = client.predict(name, upload(photo), size, steps, api_name="/rebuild")
    flags = ["--input", photo, "--output_dir", tmp_path / "out"]
    args = flags_of(line, SCRIPT, ReconstructionArguments, *flags)
    assert (args.image_size, args.decoder_steps, args.max_pixels) == (size, steps, 10_000)
    reconstruct(args)
    source, reconstruction, _ = (np.asarray(Image.open(image)) for image in images)
    assert np.array_equal(reconstruction, np.asarray(Image.open(tmp_path / "out" / "my photo_reconstruction.png")))
    assert size or np.array_equal(source, np.asarray(Image.open(photo)))
    height, width = reconstruction.shape[:2]
    assert f"{width}x{height} pixels" in status and Image.open(latents).width > 100


def test_steps_of_a_recurrent_decoder_matter(client, photo):
    values = (NAMES[1], upload(photo), 16)
    results = [client.predict(*values, steps, api_name="/rebuild") for steps in (0, 3, 4)]
    few, same, more = (np.asarray(Image.open(result[1])) for result in results)
    assert np.array_equal(few, same) and not np.array_equal(few, more)
    assert "--decoder_steps" not in results[0][-1] and "--decoder_steps 4" in results[2][-1]


def test_latents_are_drawn_as_in_training():
    mean = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    sheet = np.asarray(latent_sheet(mean))
    for number, channel in enumerate(channel_images(mean[None])[0]):
        # Ten times as large in a cell of 64 pixels, its left edge as far as `draw_sheet` puts it.
        cell = np.asarray(to_image(channel).resize((60, 40), Image.Resampling.NEAREST))
        left = 9 + 2 + number * (64 + 6 + 12)
        assert np.array_equal(sheet[6 + 12 : 6 + 52, left : left + 60], cell)


def test_errors_are_in_our_words(client, photo, tmp_path):
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    good = upload(photo)
    for values, message in (
        ((NAMES[0], None, -1, 0), "no file is given; drop an image"),
        ((NAMES[0], upload(tmp_path / "text.png"), -1, 0), "text.png is no image of a known format"),
        ((NAMES[0], upload(tmp_path / "large.png"), -1, 0), "large.png has 101x100 pixels, more than"),
        ((NAMES[0], good, 5000, 0), "more than --max_pixels=10000; crop"),
        ((NAMES[0], good, -2, 0), "--image_size=-2 must be"),
        ((NAMES[0], good, -1, 3), "--decoder_steps 3 has no effect"),
        (("../image_vae", good, -1, 0), "is no complete checkpoint of image_vae or recurrent_vae"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            client.predict(*values, api_name="/rebuild")
        assert "Traceback" not in str(caught.value)


def test_steps_are_limited_and_an_empty_field_is_named():
    with pytest.raises(ValueError, match="decoder_steps=65 must be at most 64"):
        settings("runs/x", "a.png", AppArguments(), image_size=-1, decoder_steps=65)
    with pytest.raises(ValueError, match="image_size is no number"):
        settings("runs/x", "a.png", AppArguments(), image_size=None, decoder_steps=0)
