"""Flags of evaluations of image models."""

import dataclasses
from typing import ClassVar, Literal

from utils.evaluation.arguments.base import ImageEvaluationArguments, expect_values
from utils.flags.choices import SamplerKind
from utils.generation.arguments.image import PipelineArguments
from utils.options import Section, option


@dataclasses.dataclass
class ImageVAEEvaluationArguments(ImageEvaluationArguments):
    """Flags of the evaluation of image VAEs."""

    SECTION_IMAGE_VAE: ClassVar = Section("Image VAEs")
    references: list[Literal["jpeg", "thumbnail"]] = option(
        ["jpeg", "thumbnail"], "baselines: JPEG at quality 10; bicubic upsampling from the latent's rows and columns"
    )


@dataclasses.dataclass
class ImageDiffusionEvaluationArguments(PipelineArguments, ImageEvaluationArguments):
    """Flags of the evaluation of text to image."""

    SECTION_SAMPLING: ClassVar = Section("Sampling")
    seed: int = option(0, "seed of the generated images", ge=0, lt=2**63)
    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    compare_with: Literal["real", "reconstruction"] = option(
        "real", "reference of generated images: raw images, if they can be read, or the VAE's reconstructions"
    )
    training_samples: int = option(
        5000, "training images, spread evenly, for the probe and the nearest neighbours; 0: all", ge=0
    )
    SECTION_CURVE: ClassVar = Section("Curve of steps and guidance scales")
    curve: bool = option(False, "measure every combination of steps, guidance scale and sampler")
    curve_steps: list[int] = option([5, 10, 20, 50], "sampling steps of the curve", gt=0, only_with=("curve", True))
    curve_scales: list[float] = option(
        [1.0, 2.0, 3.0, 5.0], "guidance scales of the curve", ge=0, only_with=("curve", True)
    )
    curve_samplers: list[SamplerKind] = option(["dpmpp_2m"], "samplers of the curve", only_with=("curve", True))
    curve_samples: int = option(64, "captions per point of the curve, spread evenly", gt=0, only_with=("curve", True))

    def validate_curve(self):
        expect_values(self, "curve_steps", "curve_scales", "curve_samplers")
