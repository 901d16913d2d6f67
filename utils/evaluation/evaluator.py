"""Base of the evaluations of all stages: loading of checkpoint and data, and the form of the results.

The evaluator of a stage is a subclass of `Evaluator` in its own module, registered in `evaluate.py`.
"""

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from rich.console import RenderableType
from torch.utils.tensorboard import SummaryWriter

from dataset_loading.audio.signal import save_waveform
from dataset_loading.files import read_manifest
from dataset_loading.image.buckets import sizes_of
from dataset_loading.image.folder import ImageFolderDataset
from dataset_loading.remote import open_remote
from utils.checkpoints import chosen_weights, data_of, load_model, read_stage
from utils.devices import compute_device, describe_device
from utils.drawing.images import save_image
from utils.drawing.playback import add_audio, playable
from utils.evaluation.arguments.base import EvaluationArguments
from utils.generation.exported import trained_steps
from utils.options import check_effects, declared_fields, validate_fields

logger = logging.getLogger(__name__)

AUDIO = "sounds"  # folder of wav files in the output folder


@dataclasses.dataclass
class Evaluation:
    """The results of an evaluation.

    Attributes:
        metrics: content of metrics.json, except what all stages have in common; JSON values.
        scalars: numbers for TensorBoard, by name.
        tables: printed to the console.
        images: by file name.
        curves: further numbers for TensorBoard, by name, over another axis than the training step.
        audio: waveforms (S,) in [-1, 1] with their sampling rates, by name.
    """

    metrics: dict[str, Any]
    scalars: dict[str, float]
    tables: Sequence[RenderableType]
    images: dict[str, Image] = dataclasses.field(default_factory=dict)
    curves: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    audio: dict[str, tuple[torch.Tensor, int]] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> list[Path]:
        """Write images, and audio as wav files; returns the images and the folder of the wav files."""
        for name, image in self.images.items():
            save_image(image, folder / name)
        # Values that a file cannot hold are clamped or silent.
        for name, (waveform, rate) in self.audio.items():
            save_waveform(playable(waveform), rate, folder / AUDIO / f"{name}.wav")
        return [*(folder / name for name in self.images), *([folder / AUDIO] if self.audio else [])]

    def log(self, writer: SummaryWriter, group: str, step: int) -> None:
        """Write scalars, curves, images and audio to TensorBoard."""
        for name, value in self.scalars.items():
            writer.add_scalar(f"{group}/{name}", value, step)
        # Curves have their own axis in place of the training step.
        for name, curve in self.curves.items():
            for position, value in curve.items():
                writer.add_scalar(f"{group}/{name}", value, position)
        for name, image in self.images.items():
            writer.add_image(f"{group}/{Path(name).stem}", np.asarray(image), step, dataformats="HWC")
        for name, (waveform, rate) in self.audio.items():
            add_audio(writer, f"{group}/{name}", waveform, rate=rate, step=step)


class Evaluator:
    """Evaluates one checkpoint. A subclass defines the class attributes, `build_dataset` and `measure`.

    Args:
        args: the flags.
        checkpoint: a complete checkpoint folder.
    Raises:
        ValueError: a flag was given that has no effect on this stage, or `--weights ema` for a checkpoint without
            averaged weights.
    """

    arguments_class: ClassVar[type[EvaluationArguments]]  # Other flags are refused.
    model_class: ClassVar[type]
    definitions: ClassVar[dict[str, str]]  # name of a metric -> its definition, for metrics.json
    features: Any = None  # the network of --features, a `GivenFeatures`

    @classmethod
    def of(cls, record: dict[str, Any]) -> "type[Evaluator]":
        """The evaluator of a checkpoint with this record: this one, or that of another kind of models of the stage."""
        return cls

    def __init__(self, args: Any, checkpoint: Path):
        self.args, self.checkpoint = args, checkpoint
        self.record = read_stage(checkpoint)
        # Flags of other stages, and flags that have no effect on this one, are refused before anything is loaded.
        known = {field.name for field in declared_fields(self.arguments_class)}
        foreign = ", ".join(f"--{name}" for name in args.given if name not in known)
        if foreign:
            raise ValueError(f"{foreign}: no effect on {checkpoint}, which is of stage {self.record['stage']!r}")
        self.args = args = own_arguments(self.arguments_class, args)
        # The model with the chosen weights, on the device.
        self.step = trained_steps(checkpoint)
        self.device = compute_device()
        self.weights = chosen_weights(checkpoint, args)
        if getattr(args, "features", ""):
            # It imports models of images, which texts and sounds need not wait for.
            from utils.metrics.given_features import FEATURE_DEFINITIONS, open_features

            self.definitions = {**self.definitions, **FEATURE_DEFINITIONS}
            self.features = open_features(args.features).to(self.device)
        self.model = self.load_model()

    def load_model(self) -> Any:
        """The model on the device, in eval mode."""
        return load_model(self.model_class, self.checkpoint, self.weights).requires_grad_(False).to(self.device)

    def build_dataset(self) -> Any:
        """The samples, with `entries` (a dict with `key` and `caption` per sample) and `fingerprint`."""
        raise NotImplementedError

    def measure(self, dataset: Any, indices: list[int]) -> Evaluation:
        """Evaluate the samples with these indices."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What was evaluated and how, for metrics.json."""
        checkpoint = str(self.checkpoint)
        # The given flags; of a run's folder the checkpoint, since it may get newer ones.
        given = {name: getattr(self.args, name) for name in self.args.given}
        return {
            "stage": self.record["stage"],
            "checkpoint": checkpoint,
            "arguments": {**given, "checkpoint": checkpoint},
            "step": self.step,
            "weights": self.weights,
            "precision": "bf16 autocast" if self.args.bf16 else "fp32",
            "definitions": dict(self.definitions),  # so that metrics.json explains itself
            **({"features": self.features.describe()} if self.features else {}),
            "device": describe_device(self.device),
            "threads": torch.get_num_threads(),  # for the speed
            "trained_at_commit": self.record["git_commit"],
        }

    def cache(self) -> tuple[str, str]:
        """Folder and split of the preprocessed data set."""
        given = self.args.cached_dataset and str(open_remote(self.args.cached_dataset, self.args.remote_cache_gb))
        return given or self.own_folder, self.args.split or "validation"

    @cached_property
    def own_folder(self) -> str:
        """The preprocessed data set that the run trained on.

        Raises: FileNotFoundError: it is not where it was, nor where it would be if it had moved with the run.
        """
        folder = data_of(self.checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} does not exist, the data set that {self.checkpoint} was trained on (fingerprint "
                f"{self.record['data']['fingerprint']}); name its folder with --cached_dataset"
            )
        return str(folder)

    def source(self) -> tuple[str, str]:
        """Folder and split of the evaluated samples."""
        return self.cache()

    def describe_data(self, dataset: Any, n_samples: int) -> dict[str, Any]:
        """The evaluated samples, for metrics.json. Warns if the run's data set has been rebuilt since training."""
        folder, split = self.source()
        # A rebuilt cache may split samples differently, so held-out samples may have been trained on.
        trained_on = self.record["data"]
        is_same = (
            dataset.fingerprint == trained_on["fingerprint"].partition("+")[0]
        )  # without the fingerprint of conditions
        if not is_same and folder in (trained_on["folder"], str(data_of(self.checkpoint))):
            logger.warning(
                "%s was rebuilt since the run trained on it (fingerprint %s, now %s): its held-out split may contain "
                "training samples",
                folder,
                trained_on["fingerprint"],
                dataset.fingerprint,
            )
        return {
            "folder": str(folder),
            "split": split,
            "fingerprint": dataset.fingerprint,
            "is_the_runs_own": is_same,
            "n_samples": n_samples,
        }


def own_arguments(arguments_class: type[EvaluationArguments], args: Any) -> Any:
    """The flags of one stage: given ones, and others with the stage's own defaults, which differ between stages.

    Raises: ValueError: a value that the stage does not take, or a flag that the others switch off.
    """
    if isinstance(args, arguments_class) and type(args) is arguments_class:
        return args
    names = [field.name for field in declared_fields(arguments_class)]
    own = arguments_class(**{name: getattr(args, name) for name in names if name in args.given})
    own.given = args.given  # type: ignore[misc]
    validate_fields(own, "--{}")
    check_effects(own, own.given, "--{name}")
    return own


class ImageEvaluator(Evaluator):
    """Evaluates a model of images, preprocessed or not (`--dataset`)."""

    def open_images(self, image_size: int) -> ImageFolderDataset:
        """The images of `--dataset`, which get the sizes of those of the run's own data set, as it or flags say."""
        args = self.args
        treatment = {"resize_mode": args.resize_mode, "background_color": args.background_color}
        missing = [name for name, value in treatment.items() if not value]
        sizes = [(image_size, image_size)]
        try:
            settings = read_manifest(data_of(self.checkpoint), None)["settings"]
            sizes = sizes_of({**settings, "image_size": image_size})
            treatment |= {name: settings[name] for name in missing}
        except (OSError, ValueError, KeyError) as error:
            treatment |= {name: {"resize_mode": "crop", "background_color": "white"}[name] for name in missing}
            told = ", ".join(f"{name}={treatment[name]}" for name in missing)
            if missing:
                logger.warning("the run's own data set does not tell how images become square: %s (%s)", told, error)
        return ImageFolderDataset(args.dataset, args.split, sizes=sizes, allow_outside=args.allow_outside, **treatment)

    def source(self):
        return (self.args.dataset, self.args.split) if self.args.dataset else super().source()
