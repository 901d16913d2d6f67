"""Flags of all evaluations."""

import dataclasses
from typing import Any, ClassVar

from dataset_loading.remote import IS_REMOTE
from utils.flags.choices import ResizeMode, WeightsKind
from utils.options import Section, option


def expect_values(args: Any, *names: str) -> None:
    """Raises: ValueError: one of these flags, which are lists, has no value."""
    for name in names:
        if not getattr(args, name):
            raise ValueError(f"--{name} is empty; give one value or more")


@dataclasses.dataclass
class EvaluationArguments:
    """Flags of `evaluate.py` for every stage. A stage's evaluator names the subclass with all flags that it reads."""

    SECTION_DATA: ClassVar = Section("Models and data")
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    cached_dataset: str = option("", "preprocessed data set; default: the one that the run trained on")
    remote_cache_gb: float = option(
        50.0, "gigabytes of packs of a data set at a URL that lie on the local disk", gt=0, only_with=IS_REMOTE
    )
    split: str = option("", "split of the data set; default: validation")
    max_samples: int = option(0, "maximum number of samples, spread evenly over the split; 0: all", ge=0)

    SECTION_OUTPUT: ClassVar = Section("Computation and output")
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")
    output_dir: str = option("", "folder of metrics.json, images, audio and TensorBoard; default: the run's folder")

    given: ClassVar[list[str]]  # names of the flags that were given, set by `parse_arguments`

    def validate_checkpoint(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing: give a run folder such as runs/image_vae/<run>")


@dataclasses.dataclass
class BatchedEvaluationArguments(EvaluationArguments):
    """Flags of evaluators that read samples in batches."""

    SECTION_OUTPUT: ClassVar = Section("Computation and output")
    batch_size: int = option(32, "samples per forward pass", gt=0)
    num_workers: int = option(0, "data loading processes; 0: the main process loads", ge=0)


@dataclasses.dataclass
class ContactSheetArguments:
    """Flag of evaluators whose samples can be drawn."""

    SECTION_OUTPUT: ClassVar = Section("Computation and output")
    contact_sheet: int = option(
        0, "samples drawn next to the model's output in contact_sheet.png, audio also as wav files; 0: none", ge=0
    )


@dataclasses.dataclass
class FeatureArguments:
    """Flag of evaluators that compare sets of images."""

    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    features: str = option(
        "",
        "network whose features compare with papers: TorchScript file such as inception-2015-12-05.pt (FID, KID), or "
        "folder of a CLIP (with CLIP score) or DINOv2 model; default: the packaged EfficientNet alone",
    )


@dataclasses.dataclass
class ImageEvaluationArguments(FeatureArguments, ContactSheetArguments, BatchedEvaluationArguments):
    """Flags of evaluators of images, which may also be read without preprocessing."""

    SECTION_IMAGES: ClassVar = Section("Images without preprocessing")
    dataset: str = option(
        "",
        "instead of a preprocessed data set: folder of images, index file or hub name; --split: its only one",
        only_with=("cached_dataset", ""),
    )
    allow_outside: bool = option(
        False, "read files outside of --dataset, where its metadata names them", only_with=("dataset", bool)
    )
    resize_mode: ResizeMode | None = option(
        None,
        "how images of --dataset that are not square become square; default: as in the run's own data set",
        only_with=("dataset", bool),
    )
    background_color: str = option(
        "",
        "color of transparent pixels and of padding in images of --dataset; default: as in the run's own data set",
        only_with=("dataset", bool),
    )

    def validate_background(self):
        if self.background_color:
            # It imports torch, which takes a second that --help and a mistyped flag need not wait for.
            from dataset_loading.image.pixels import check_color

            check_color("background_color", self.background_color)
