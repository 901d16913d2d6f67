"""Tables of the metrics.json of every stage, references beside the model, and the figures that sum them up."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from utils.evaluation import (
    audio,
    audio_diffusion_report,
    captioned_sounds_report,
    image_diffusion_report,
    image_vae,
    text,
)
from utils.evaluation.audio_vae import AudioVAEEvaluator
from utils.evaluation.multimodal import report as streams
from utils.evaluation.tables import Column, score_table
from utils.evaluation.vocoder import VocoderEvaluator

Rows = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rows of metrics that belong into one table.

    Attributes:
        title: of the table.
        rows: name of the row -> metrics by name.
        columns: name of a metric -> how it is shown.
        names: name of the row -> its label.
        main: metrics that sum up the table; the first that the model's row has is shown.
        model: the row of the evaluated model.
    """

    title: str
    rows: Rows
    columns: Mapping[str, Column]
    names: Mapping[str, str]
    main: Sequence[str]
    model: str = "model"

    def table(self) -> Table:
        """All rows and metrics."""
        names = {**self.names, **{row: row for row in self.rows if row not in self.names}}
        return score_table(self.rows, self.columns, title=self.title, names=names, evaluated=self.model)

    def figure(self) -> "Figure | None":
        """The main metric of the model and of the other rows; None where the model has none of the main ones."""
        own = self.rows.get(self.model, {})
        metric = next((name for name in self.main if own.get(name) is not None), None)
        if metric is None:
            return None
        column = dataclasses.replace(self.columns[metric], error="")
        order = [row for row in (*self.names, *self.rows) if self.rows.get(row, {}).get(metric) is not None]
        bars = [
            Bar(
                self.names.get(row, row),
                self.rows[row][metric],
                column.cell(self.rows[row], metric),
                row == self.model,
            )
            for row in dict.fromkeys(order)
        ]
        return Figure(self.title, column.title, column.better, bars)


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of a figure: label, value, the value as text, whether it is that of the evaluated model."""

    label: str
    value: float
    text: str
    is_model: bool


@dataclasses.dataclass(frozen=True)
class Figure:
    """A metric that sums up a table.

    Attributes:
        title: of the table.
        metric: its name.
        better: which values are good, "high", "low" or "".
        bars: its rows, in the order of the table.
    """

    title: str
    metric: str
    better: str
    bars: Sequence[Bar]

    @property
    def value(self) -> str:
        """The model's."""
        return next(bar.text for bar in self.bars if bar.is_model)

    def __str__(self) -> str:
        others = ", ".join(f"{bar.label} {bar.text}" for bar in self.bars if not bar.is_model)
        return f"{self.metric} {self.value}" + (f" ({others})" if others else "")


AUDIO = (audio.COLUMNS, ("pesq_wb", "stoi", "mel_l1"))
LAYOUTS: dict[str, tuple[str, Mapping[str, Column], Mapping[str, str], tuple[str, ...]]] = {
    "image_vae": ("Reconstruction of held-out images", image_vae.COLUMNS, image_vae.ROW_NAMES, ("psnr_db",)),
    "recurrent_vae": ("Reconstruction of held-out images", image_vae.COLUMNS, image_vae.ROW_NAMES, ("psnr_db",)),
    "vocoder": ("Held-out recordings", AUDIO[0], VocoderEvaluator.row_names, AUDIO[1]),
    "audio_vae": ("Held-out recordings", AUDIO[0], AudioVAEEvaluator.row_names, AUDIO[1]),
}
STREAM_FIGURES = ("exact", "probe_top1", "read_all", "read_top1", "wer")


def scores_of(stage: str, metrics: Mapping[str, Any]) -> list[Scores]:
    """The scores in the metrics.json of a stage; none where there are no metrics.

    Raises: KeyError, TypeError, AttributeError: it has another form than this version's evaluation writes.
    """
    if not metrics:
        return []
    rows = metrics["scores"]
    if stage in LAYOUTS:
        title, columns, names, main = LAYOUTS[stage]
        return [Scores(title, rows, columns, names, main)]
    if stage == "image_diffusion":
        names, main = image_diffusion_report.ROW_NAMES, ("agreement", "kid")
        title, columns = "Images for held-out captions", image_diffusion_report.COLUMNS
        return [Scores(title, rows, columns, names, main, model="generated")]
    if stage == "audio_diffusion" and "generated" in rows:
        names, main = captioned_sounds_report.ROW_NAMES, ("agreement", "kid")
        title, columns = "Sounds for held-out captions", captioned_sounds_report.COLUMNS
        return [Scores(title, rows, columns, names, main, model="generated")]
    if stage == "audio_diffusion":
        rows = {name: audio_diffusion_report.with_interval(row) for name, row in rows.items()}
        names, columns = audio_diffusion_report.ROW_NAMES, audio_diffusion_report.COLUMNS
        return [Scores("Held-out texts, spoken", rows, columns, names, ("wer", "wer_all"))]
    if "n_targets" in metrics:
        return [Scores("Held-out text", rows, text.COLUMNS, text.ROW_NAMES, ("bits_per_byte",))]
    return [
        Scores(name.replace("-", " to "), directions, streams.COLUMNS, streams.ROW_NAMES, STREAM_FIGURES)
        for name, directions in rows.items()
    ]
