"""Tab Draw: images for a prompt, shown as they form; those of `inference/text_to_image.py` with the same flags."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image
from torch import Tensor

from model.samplers import n_evaluations
from utils.app.commands import MAX_SEED, Command, command, real_number, whole_number
from utils.app.context import Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.drawing.images import to_image
from utils.flags.choices import SamplerKind
from utils.generation.arguments.image import TextToImageArguments
from utils.generation.text_to_image import load_pipeline

KIND = "image_diffusion"
MAX_IMAGES = 16  # As many as the script generates at once: the numbers of a batch are the same.
MAX_STEPS = 250
N_PREVIEWS = 8  # Estimates that are decoded on the way; decoding one takes as long as a few steps.


def settings(
    checkpoint: Path,
    prompt: str,
    *,
    seed: float | None,
    n_images: float | None,
    n_steps: float | None,
    guidance_scale: float | None,
    sampler: SamplerKind,
) -> Command[TextToImageArguments]:
    """The call of the script for a tab's settings: images with the seeds `seed`, `seed` + 1, ...

    Raises: ValueError: as `utils.app.commands.command`, a field without a number, no image, or more images or steps
        than the page allows.
    """
    first, count = whole_number("seed", seed, MAX_SEED), whole_number("n_images", n_images, MAX_IMAGES)
    if count < 1:
        raise ValueError(f"n_images={count} must be at least 1")
    return command(
        "inference/text_to_image.py",
        TextToImageArguments,
        checkpoint=str(checkpoint),
        prompts=[prompt],
        seeds=[first + number for number in range(count)],
        n_steps=whole_number("n_steps", n_steps, MAX_STEPS),
        guidance_scale=real_number("guidance_scale", guidance_scale),
        sampler=sampler,
    )


def draw(context: Context, report: Report, name: str, *values: Any) -> tuple[Any, str, str]:
    """Generate images.

    Args:
        report: called with outputs on the way, see `utils.app.jobs.Jobs.attach`.
        name: of the checkpoint.
        values: of the arguments of `settings`, in their order.
    Returns: images with captions, a line about them, and the command line.
    Raises: ValueError, OSError: no such checkpoint, or settings that the script refuses.
    """
    prompt, seed, n_images, n_steps, guidance_scale, sampler = values
    checkpoint = context.runs.choose(name, KIND)
    call = settings(
        checkpoint.folder,
        prompt,
        seed=seed,
        n_images=n_images,
        n_steps=n_steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
    )
    args, clock = call.arguments, Clock()
    report(UNCHANGED, f"loading {checkpoint.name}", str(call))
    pipeline = context.models.get(KIND, checkpoint.folder, lambda: load_pipeline(args))
    pipeline.check_prompts(args.prompts)
    total = n_evaluations(args.sampler, args.n_steps)

    def show(number: int, latents: Tensor) -> None:
        # The last estimate is the result, which is decoded anyway.
        is_shown = number < total and (number - 1) % -(-total // N_PREVIEWS) == 0
        images = captioned(pipeline.decode(latents), args.seeds) if is_shown else UNCHANGED
        report(images, clock.progress(number, total, "evaluation" if total > args.n_steps else "step"), UNCHANGED)

    images = pipeline.images([prompt] * len(args.seeds), args.seeds, args, pipeline.chosen_size(args), show)
    height, width = images.shape[2:]
    record = f"weights {pipeline.record['weights']}, {pipeline.record['device']}"
    summary = f"{len(images)} of {width}x{height} pixels in {clock.seconds()}; {record}"
    return captioned(images, args.seeds), summary, str(call)


def captioned(images: Tensor, seeds: Sequence[int]) -> list[tuple[Image.Image, str]]:
    """Images (B, 3, Y, X) in [-1, 1] with their seeds, for a gallery."""
    return [(to_image(image.clamp(-1, 1)), f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr, defaults = context.gr, TextToImageArguments()
    gr.Markdown("Images for a prompt, shown as they form.")
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            checkpoint = context.choose_checkpoint(KIND)
            prompt = gr.Textbox(label="prompt", lines=2, max_lines=6, value="a large red house")
            with gr.Row():
                seed = gr.Number(label="seed of the first image", value=0, precision=0)
                n_images = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="images")
            n_steps = gr.Slider(1, MAX_STEPS, value=defaults.n_steps, step=1, label="steps")
            guidance = gr.Slider(0, 15, value=defaults.guidance_scale, step=0.1, label="guidance scale; 1: none")
            sampler = gr.Dropdown(get_args(SamplerKind), value=defaults.sampler, label="sampler")
            button, stop = context.buttons("Draw")
        with gr.Column(scale=2, min_width=320):
            gallery = gr.Gallery(label="images", columns=4, format="png", object_fit="contain", height="auto")
            status, line = context.status(), context.command()
    inputs = [checkpoint, prompt, seed, n_images, n_steps, guidance, sampler]
    work = functools.partial(draw, context)
    context.jobs.attach(
        button, stop, work, inputs=inputs, outputs=[gallery, status, line], status=status, api_name="draw"
    )
