"""Every class of declared options: conditions name existing fields, former names are free and still work."""

import dataclasses
import importlib
import subprocess
from pathlib import Path
from typing import get_args

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from model.audio.mel_discriminators import MEL_DISCRIMINATORS
from model.audio.spectral import MEL_PRESETS
from model.audio.waveform_discriminators import DISCRIMINATORS as WAVEFORM_DISCRIMINATORS
from model.diffusion_process import DiffusionProcess
from model.image.augmentation import AUGMENTATIONS
from model.image.discriminators import DISCRIMINATORS
from model.image.feature_extractors import PERCEPTUAL_DISTANCES
from model.samplers import SAMPLERS
from utils.command_line import parse_arguments
from utils.configuration import FlowPrediction, FlowSampler, FlowTimes
from utils.flags.choices import (
    AugmentationKind,
    DiscriminatorKind,
    MelDiscriminatorKind,
    MelPreset,
    PerceptualKind,
    Prediction,
    SamplerKind,
    Schedule,
    TimeSampling,
    WaveformDiscriminatorKind,
)
from utils.megatransformer_utils import SchedulerKind, TrainerKind
from utils.options import declared_fields, effect_conditions, inherited
from utils.training_utils import StageTrainer, trainer_class_for

ROOT = Path(__file__).resolve().parent.parent


def option_classes() -> dict[str, type]:
    """All dataclasses with declared options outside the tests, by module and name."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    classes = {}
    for file in map(Path, files.split()):
        if file.parts[0] == "tests" or "option(" not in (ROOT / file).read_text():
            continue
        module = importlib.import_module(".".join(file.with_suffix("").parts))
        for name, member in vars(module).items():
            if isinstance(member, type) and member.__module__ == module.__name__ and dataclasses.is_dataclass(member):
                classes[f"{module.__name__}.{name}"] = member
    return {name: member for name, member in classes.items() if declared_fields(member)}


CLASSES = option_classes()


def test_the_walk_finds_flags_and_configurations():
    assert {"utils.megatransformer_utils.StageArguments", "utils.configuration.MegaTransformerConfig"} <= set(CLASSES)
    assert len(CLASSES) > 40


@pytest.mark.parametrize("owner", CLASSES.values(), ids=CLASSES)
def test_conditions_name_other_existing_fields(owner):
    known = {field.name for field in declared_fields(owner)}
    for name, conditions in effect_conditions(owner).items():
        for other, _ in conditions:
            assert other in known - {name}, f"{name} is only with {other!r}, which {owner.__name__} does not declare"


@pytest.mark.parametrize("owner", CLASSES.values(), ids=CLASSES)
def test_former_names_are_nobodys_name_now(owner):
    known = [field.name for field in declared_fields(owner)]
    former = [alias for name in known for alias in inherited(owner, name, "aliases") or ()]
    assert len({*known, *former}) == len(known) + len(former)


@pytest.mark.parametrize(
    ("owner", "former", "name"),
    [
        ("utils.training.arguments.image_vae.ImageVAEGANArguments", "n_logged_pictures", "n_logged_samples"),
        ("utils.training.arguments.image_vae.RecurrentVAEArguments", "n_logged_pictures", "n_logged_samples"),
        ("utils.training.arguments.vocoder.VocoderArguments", "n_logged_clips", "n_logged_samples"),
        ("utils.training.arguments.audio_vae.AudioVAEArguments", "n_logged_clips", "n_logged_samples"),
        ("utils.training.arguments.audio_vae.AudioVAEArguments", "statistics_samples", "latent_statistics_samples"),
        ("utils.training.arguments.diffusion.ImageDiffusionArguments", "eval_pictures", "eval_images"),
        ("utils.generation.arguments.image.TextToImageArguments", "n_pictures", "n_images"),
    ],
)
def test_former_flags_still_work(owner, former, name, caplog):
    words = ["--checkpoint", "runs/x", "--prompts", "a"] if "generation" in owner else []
    args = parse_arguments(CLASSES[owner], [*words, f"--{former}", "3"], "test")
    assert getattr(args, name) == 3 and name in args.given
    (notice,) = caplog.messages
    assert f"--{former} is now called --{name}" in notice
    assert getattr(parse_arguments(CLASSES[owner], [*words, f"--{former}=4"], "test"), name) == 4


@pytest.mark.parametrize(
    ("kind", "registry"),
    [
        (SamplerKind, SAMPLERS),
        (DiscriminatorKind, DISCRIMINATORS),
        (MelDiscriminatorKind, MEL_DISCRIMINATORS),
        (WaveformDiscriminatorKind, WAVEFORM_DISCRIMINATORS),
        (AugmentationKind, AUGMENTATIONS),
        (PerceptualKind, PERCEPTUAL_DISTANCES),
        (MelPreset, MEL_PRESETS),
    ],
)
def test_names_in_a_flag_are_those_of_its_table(kind, registry):
    assert set(get_args(kind)) == set(registry)


def test_every_trainer_and_scheduler_exists():
    trainers = {trainer_class_for(name, StageTrainer) for name in get_args(TrainerKind)}
    assert len(trainers) == len(get_args(TrainerKind)) and all(issubclass(each, StageTrainer) for each in trainers)
    assert set(get_args(SchedulerKind)) <= {name.value for name in TYPE_TO_SCHEDULER_FUNCTION}


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_has_a_prediction(schedule):
    def is_accepted(prediction):
        try:
            return bool(DiffusionProcess(schedule, prediction))
        except ValueError:
            return False

    assert any(is_accepted(prediction) for prediction in get_args(Prediction))


def test_the_flow_of_the_transformer_is_known_to_the_diffusion_modules():
    assert set(get_args(FlowSampler)) <= set(SAMPLERS)
    assert set(get_args(FlowTimes)) == set(get_args(TimeSampling))
    for prediction in get_args(FlowPrediction):
        DiffusionProcess("rectified_flow", prediction)
