"""Flags of scripts that generate or reconstruct images."""

import dataclasses
from typing import Any, ClassVar

from utils.flags.choices import SamplerKind, WeightsKind
from utils.generation.arguments.sampling import check_interval, interval_option
from utils.options import Section, option, other_than_one


@dataclasses.dataclass
class SamplingArguments:
    """Flags of everything that samples images."""

    SECTION_SAMPLING: ClassVar = Section("Sampling")
    sampler: SamplerKind = option("dpmpp_2m", "sampler; euler and ddim take the same steps")
    n_steps: int = option(20, "sampling steps", gt=0)
    guidance_scale: float = option(3.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: list[float] = interval_option()
    guidance_rescale: float = option(
        0.0,
        "fraction of the std of the guided prediction that is rescaled (arXiv 2305.08891)",
        ge=0,
        le=1,
        only_with=("guidance_scale", other_than_one),
    )

    def validate_interval(self):
        check_interval(self.guidance_interval)

    def settings(self) -> dict[str, Any]:
        """Names and values of the sampling flags, for reports."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingArguments)}


@dataclasses.dataclass
class PipelineArguments(SamplingArguments):
    """Flags of what loads a pipeline: the frozen networks that a diffusion model was trained with."""

    SECTION_MODELS: ClassVar = Section("Models and data")
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run, or as recorded")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as recorded")


@dataclasses.dataclass
class ImageSizeArguments:
    """Flags of the size of generated images."""

    SECTION_SIZE: ClassVar = Section("Size of the images")
    width: int = option(0, "width of the images in pixels; 0: the height, or as in training", ge=0)
    height: int = option(0, "height of the images in pixels; 0: the width, or as in training", ge=0)
    aspect: str = option(
        "",
        "aspect ratio of the images, such as 16:9, instead of width and height: the nearest size in training",
        only_with=[("width", 0), ("height", 0)],
    )


@dataclasses.dataclass
class TextToImageArguments(ImageSizeArguments, PipelineArguments):
    """Flags of `inference/text_to_image.py`."""

    SECTION_MODELS: ClassVar = Section("Models and data")
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    SECTION_PROMPTS: ClassVar = Section("Prompts")
    prompts: list[str] = option([], "captions of the images")
    prompt_file: str = option("", "further captions, one per line")
    n_images: int = option(
        1, "images per prompt, with seeds 0, 1, 2, ...", gt=0, only_with=("seeds", []), aliases=("n_pictures",)
    )
    seeds: list[int] = option([], "seeds of each prompt's images", ge=0, lt=2**63)
    batch_size: int = option(16, "images per batch", gt=0)
    SECTION_OUTPUT: ClassVar = Section("Output")
    output_dir: str = option("inference/generated/image", "folder of the results")

    def validate_prompts(self):
        if not self.checkpoint or not (self.prompts or self.prompt_file):
            raise ValueError("--checkpoint and --prompts or --prompt_file are needed: a run folder, and captions")


@dataclasses.dataclass
class ReconstructionArguments:
    """Flags of `inference/reconstruct_image.py`."""

    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    input: list[str] = option([], "image files and folders of images")
    image_size: int = option(-1, "shorter side in pixels; 0: unchanged; -1: the size of the training images", ge=-1)
    decoder_steps: int = option(0, "recurrent decoder: number of steps; 0: the model's own", ge=0)
    background_color: str = option("white", "color of transparent pixels, name or #rrggbb")
    max_pixels: int = option(4_000_000, "maximum pixels of an image for the model; larger ones are left out", gt=0)
    output_dir: str = option("inference/generated/reconstruction", "folder of the results")

    def validate_input(self):
        if not self.checkpoint or not self.input:
            raise ValueError("--checkpoint and --input are needed: a run folder, and image files or folders")
        # It imports torch, which takes a second that --help and a mistyped flag need not wait for.
        from dataset_loading.image.pixels import check_color

        check_color("background_color", self.background_color)
