"""Tables that the evaluations and benchmarks print: scores in rows, facts about a model, statistics of latents."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Column:
    """How a metric is shown.

    Attributes:
        title: heading of the column.
        template: format of a value.
        better: which values are good; empty where neither are.
        error: name of the metric's standard error in the same row; empty for none.
    """

    title: str
    template: str = "{:.3f}"
    better: Literal["", "high", "low"] = ""
    error: str = ""

    @property
    def heading(self) -> str:
        """The title, and below it which values are good."""
        return f"{self.title}\n({self.better})" if self.better else self.title

    def cell(self, row: Mapping[str, Any], name: str) -> str:
        """The value of the metric `name` in a row, with its error; "-" where it is missing or None."""
        # Not every row has every metric.
        if row.get(name) is None:
            return "-"
        value = self.template.format(row[name])  # the error has the same number of digits
        return f"{value} +- {self.template.format(row[self.error])}" if self.error else value


FEATURE_COLUMNS = {  # of the network of --features
    "features_frechet": Column("Frechet*", "{:.2f}", "low"),
    "features_kid": Column("KID*", "{:.5f}", "low", error="features_kid_error"),
    "clip_score": Column("CLIP", "{:.2f}", "high"),
}


def score_table(
    rows: Mapping[Any, Mapping[str, Any]],
    columns: Mapping[str, Column],
    *,
    title: str,
    names: Mapping[Any, str] | None = None,
    evaluated: Any = "model",
    reference: Any = None,
    caption: str = "",
) -> Table:
    """Rows of metrics. A metric that no row has gets no column.

    Args:
        rows: key of the row -> metrics by name.
        columns: name of a metric -> how it is shown.
        names: key of the row -> its label, in the order of the table; None: no labels, order of `rows`.
        evaluated: key of the row of the evaluated model, in bold.
        reference: key of the row that the others are compared with, dimmed.
        caption: remarks below the table.
    """
    # Columns: the label of the row, then every metric that some row has. Text is left-aligned, numbers right-aligned.
    table = Table(title=title, caption=caption or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    shown = {
        name: column for name, column in columns.items() if any(row.get(name) is not None for row in rows.values())
    }
    if names is not None:
        table.add_column("", no_wrap=True)
    for name, column in shown.items():
        is_text = any(isinstance(row.get(name), str) for row in rows.values())
        table.add_column(column.heading, justify="left" if is_text else "right", no_wrap=True)
    # Rows in the order of their labels, or in their own order.
    for key in rows if names is None else [key for key in names if key in rows]:
        # The evaluated model is bold, the reference dimmed.
        label = [] if names is None else [names[key]]
        cells = [column.cell(rows[key], name) for name, column in shown.items()]
        table.add_row(*label, *cells, style="bold" if key == evaluated else "dim" if key == reference else "")
    return table


def fact_table(title: str, facts: Mapping[str, str]) -> Table:
    """Names and values below each other, such as size and speed of a model."""
    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE_HEAD)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


LATENT_NAMES = {  # statistic of `LatentHealth` -> label
    "mean": "mean of posterior means",
    "std": "std of posterior means",
    "posterior_std": "std of the posterior",
    "kl": "KL in nats per position",
    "normalized_std": "std after normalization (ideal: 1)",
}


def latent_table(latents: dict[str, list]) -> Table:
    """Minimum, median and maximum over the channels of each statistic of the latents."""
    n_channels, n_dead = len(latents["dead"]), sum(latents["dead"])
    statistic = {"minimum": min, "median": statistics.median, "maximum": max}
    # A row per statistic, with its minimum, median and maximum over the channels.
    rows = {name: {key: pick(latents[name]) for key, pick in statistic.items()} for name in LATENT_NAMES}
    return score_table(
        rows,
        {key: Column(key, "{:.4f}") for key in statistic},
        title=f"Latent channels: {n_channels}, dead: {n_dead}",
        names=LATENT_NAMES,
    )
