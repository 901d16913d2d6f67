"""The Python blocks of docs/api.md run, on small models that are exported here."""

import re
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image

from inference.export_model import main as export
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from pretrain_audio_diffusion import AudioDiffusionStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.audio_latent_cache import (
    SETTINGS,
    SMALL_SPEECH,
    make_audio_latents,
    save_audio_vae,
    write_spoken_cache,
)
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.runs import SMALL_LDM_VAE, changed, run_stage
from tests.helpers.stream_caches import SMALL_STREAMS, make_stream_caches
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.vocoder_checkpoint import SMALL_VOCODER, save_stage_checkpoint, small_vocoder

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "api.md"
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", DOCUMENT.read_text(), re.S | re.M))

FLAGS = {
    **{name: ["--with_parts"] for name in ("my_painter", "my_voice", "my_sounds", "my_model")},
    "my_autoencoder_kl": ["--format", "diffusers"],
}
# Captions have no frames of tokens.
FIELDS = [word for word in SMALL_SPEECH if "=" in word and not word.startswith(("frame_width", "text_dropout"))]
RUNS = {
    "my_voice": (SMALL_SPEECH, []),
    "my_sounds": (changed(SMALL_SPEECH, "--override", *FIELDS), ["--conditioning", "caption", "--max_tokens", "32"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, latent_cache):
    """A folder with an image, a recording, and an export of each model under the name that the document gives it."""
    place, runs = tmp_path_factory.mktemp("api"), tmp_path_factory.mktemp("api_runs")
    torch.manual_seed(0)
    for name in ("my_images", "my_recordings"):
        (place / name).mkdir()
    Image.new("RGB", (40, 32), (200, 30, 30)).save(place / "my_images" / "house.png")
    soundfile.write(place / "my_recordings" / "hello.wav", 0.1 * torch.randn(8000).numpy(), 16000)
    # Models that need no data.
    vocoder = small_vocoder(**SETTINGS.as_dict(), **SMALL_VOCODER)
    checkpoints = {
        "my_vae": save_stage_checkpoint(ImageVAE.from_preset("tiny", image_size=32), "image_vae", runs / "vae"),
        "my_recurrent_vae": save_stage_checkpoint(
            RecurrentVAE.from_preset("tiny", image_size=32), "recurrent_vae", runs / "recurrent"
        ),
        "my_vocoder": save_stage_checkpoint(vocoder, "vocoder", runs / "vocoder"),
        "my_audio_vae": save_audio_vae(runs / "audio_vae"),
        "my_autoencoder_kl": save_stage_checkpoint(
            ImageVAE.from_preset("ldm", **SMALL_LDM_VAE), "image_vae", runs / "ldm"
        ),
        "my_painter": save_diffusion_checkpoint(runs / "painter", latent_cache),
        "my_writer": save_text_checkpoint(runs / "writer", make_text(runs / "texts", 20), "tiny"),
    }
    # Runs of a step: speech and captioned sounds on the same recordings, and a model of streams.
    mels = write_spoken_cache(runs / "mels", 12)
    for name, (common, flags) in RUNS.items():
        make_audio_latents(mels, checkpoints["my_audio_vae"], runs / name, *flags)
        checkpoints[name] = run_stage(AudioDiffusionStage, common, runs / name, runs, name, 1).folder
    at = SMALL_STREAMS.index("--override") + 1
    few = ["audio_n_sampling_steps=2", "image_n_sampling_steps=2", "audio_max_tokens=8"]
    streams = [*SMALL_STREAMS[:at], *few, *SMALL_STREAMS[at:], *make_stream_caches(runs / "streams")]
    checkpoints["my_model"] = run_stage(MultimodalStage, [*streams, "--batch_size", "4"], None, runs, "one", 1).folder
    for name, checkpoint in checkpoints.items():
        export(["--checkpoint", str(checkpoint), "--output", str(place / name), *FLAGS.get(name, [])])
    return place


@pytest.mark.parametrize("title", BLOCKS)
def test_block(title, place, monkeypatch):
    monkeypatch.chdir(place)
    torch.manual_seed(0)
    exec(compile(BLOCKS[title], f"docs/api.md, {title}", "exec"), {})


def test_no_block_is_left_out():
    assert len(BLOCKS) == DOCUMENT.read_text().count("```python\n") == 10


def test_cards_have_commands_that_work(place):
    for name, command in {
        "my_voice": 'text_to_speech.py --checkpoint my_voice --text "Hello." --speaker ann',
        "my_sounds": "text_to_audio.py --checkpoint my_sounds --prompts",
    }.items():
        assert command in (place / name / "README.md").read_text()
