"""Flags of `evaluate.py`."""

import dataclasses
from typing import ClassVar, Literal, get_args

from utils.evaluation.arguments.audio import AudioDiffusionEvaluationArguments, AudioVAEEvaluationArguments, Metric
from utils.evaluation.arguments.image import ImageDiffusionEvaluationArguments, ImageVAEEvaluationArguments
from utils.evaluation.arguments.multimodal import (
    MultimodalEvaluationArguments,
    MultimodalMetric,
    TextEvaluationArguments,
)
from utils.options import Section, option


@dataclasses.dataclass
class AnyMetricArguments:
    """The flag `--metrics` of `evaluate.py`, of which every evaluator has a list of its own."""

    SECTION_MEASUREMENTS: ClassVar = Section("Measurements")
    metrics: list[Literal[Metric, MultimodalMetric]] = option(
        [name for name in dict.fromkeys((*get_args(Metric), *get_args(MultimodalMetric))) if name != "mos"],
        "metrics, those that the stage has; wer is the slowest, about a second per clip and row; mel: mel-L1 and MCD; "
        "mos: DistillMOS; losses, texts, probe, reader, wer, round_trips: of multimodal models",
    )


@dataclasses.dataclass
class EvaluateArguments(
    AnyMetricArguments,
    ImageVAEEvaluationArguments,
    ImageDiffusionEvaluationArguments,
    AudioVAEEvaluationArguments,
    TextEvaluationArguments,
    AudioDiffusionEvaluationArguments,
    MultimodalEvaluationArguments,
):
    """Flags of all evaluators; the evaluator of the checkpoint's stage refuses those that it does not read."""
