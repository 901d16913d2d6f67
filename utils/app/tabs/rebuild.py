"""Tab Rebuild image: an image and what an image VAE makes of it, as by `inference/reconstruct_image.py`."""

import functools
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from utils.app.arguments import AppArguments
from utils.app.commands import Command, command, whole_number
from utils.app.context import IMAGE_BUTTONS, Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.app.uploads import read_image
from utils.drawing.images import TRIPLE, Group, channel_images, draw_sheet, to_image, triple
from utils.generation.arguments.image import ReconstructionArguments
from utils.generation.image import ImageReconstructor, load_image_vae

KINDS = ("image_vae", "recurrent_vae")
MAX_STEPS = 64  # of a recurrent decoder
MAX_CHANNELS = 64  # latent channels that are drawn
IMAGE_HEIGHT = 280  # pixels on the page
N_ACROSS = 8  # latent channels side by side


def settings(
    checkpoint: Path, file: str | None, limits: AppArguments, *, image_size: float | None, decoder_steps: float | None
) -> Command[ReconstructionArguments]:
    """The call of the script for a tab's settings.

    Args: file: the uploaded one, of which the call has the name alone.
    Raises: ValueError: as `utils.app.commands.command`, no file, a field without a number, or more than the page
        allows.
    """
    if not file:
        raise ValueError("no file is given; drop an image into the field")
    return command(
        "inference/reconstruct_image.py",
        ReconstructionArguments,
        checkpoint=str(checkpoint),
        input=[Path(file).name],
        image_size=whole_number("image_size", image_size, limits.max_pixels),
        decoder_steps=whole_number("decoder_steps", decoder_steps, MAX_STEPS),
        max_pixels=limits.max_pixels,
    )


def rebuild(context: Context, report: Report, name: str, file: str | None, *values: Any) -> tuple[Any, ...]:
    """Reconstruct an image.

    Args:
        report: called with outputs on the way, see `utils.app.jobs.Jobs.attach`.
        name: of the checkpoint.
        file: the uploaded image.
        values: `image_size` and `decoder_steps` of `settings`.
    Returns: images as named by `TRIPLE`, latent channels, a line about them, and the command line.
    Raises: ValueError, OSError: no such checkpoint, an upload or settings that are refused.
    """
    image_size, decoder_steps = values
    checkpoint = context.runs.choose(name, *KINDS)
    call = settings(checkpoint.folder, file, context.args, image_size=image_size, decoder_steps=decoder_steps)
    args, clock = call.arguments, Clock()
    source = read_image(file, context.args, args.background_color)
    unchanged = [UNCHANGED] * (len(TRIPLE) + 1)
    report(*unchanged, f"loading {checkpoint.name}", str(call))
    vae = context.models.get("image_vae", checkpoint.folder, lambda: load_image_vae(args))
    reconstructor = ImageReconstructor(vae, args)
    report(*unchanged, "reconstructing", UNCHANGED)
    result = reconstructor.reconstruct(source)
    (Z, y, x), (height, width) = result.mean.shape, result.image.shape[1:]
    summary = f"PSNR {result.psnr_db:.2f} dB; {width}x{height} pixels; latents {x}x{y} of {Z} channels"
    images = triple(result.reconstruction, result.image)
    return *images, latent_sheet(result.mean), f"{summary}; {clock.seconds()}, {vae.device}", str(call)


def latent_sheet(mean: Tensor) -> Image.Image:
    """Posterior means (Z, y, x) as grey images, as training logs them: mean +- 2.5 std of a channel is black to
    white."""
    channels = channel_images(mean[None, :MAX_CHANNELS].float().cpu())[0]
    groups = [Group([to_image(channel)], str(number)) for number, channel in enumerate(channels)]
    return draw_sheet(groups, n_across=N_ACROSS, min_cell=64)


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr, shown = context.gr, {"format": "png", "interactive": False, "buttons": IMAGE_BUTTONS}
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            checkpoint = context.choose_checkpoint(*KINDS)
            file = gr.File(label="image", type="filepath")
            label = "shorter side in pixels; -1: that of the training images, 0: unchanged"
            image_size = gr.Number(label=label, value=-1, precision=0)
            label = "steps of a recurrent decoder; 0: the model's own"
            decoder_steps = gr.Slider(0, MAX_STEPS, value=0, step=1, label=label)
            button, stop = context.buttons("Rebuild")
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                images = [gr.Image(label=name, height=IMAGE_HEIGHT, **shown) for name in TRIPLE]
            latents = gr.Image(label="latent channels", **shown)
            status, line = context.status(), context.command()
    inputs, outputs = [checkpoint, file, image_size, decoder_steps], [*images, latents, status, line]
    work = functools.partial(rebuild, context)
    context.jobs.attach(button, stop, work, inputs=inputs, outputs=outputs, status=status, api_name="rebuild")
