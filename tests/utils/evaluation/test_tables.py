"""Tables of scores: which rows and columns they have, and how values are shown."""

import pytest
from rich.console import Console

from utils.evaluation.tables import Column, fact_table, latent_table, score_table

COLUMNS = {
    "kid": Column("KID", "{:.2f}", "low", error="kid_error"),
    "psnr_db": Column("PSNR dB", "{:.1f}", "high"),
    "absent": Column("absent"),
}
ROWS = {"jpeg": {"kid": 0.126, "kid_error": 0.013}, "model": {"kid": None, "psnr_db": 31.25}, "unnamed": {"kid": 0}}


def lines(table):
    """The words of each printed line."""
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return [line.split() for line in console.export_text().splitlines() if line.split()]


def test_rows_are_in_the_order_of_their_names_and_columns_without_values_are_left_out():
    table = score_table(ROWS, COLUMNS, title="Scores", names={"model": "this", "jpeg": "JPEG"}, reference="jpeg")
    assert [column.header for column in table.columns] == ["", "KID\n(low)", "PSNR dB\n(high)"]
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["this", "JPEG"], ["-", "0.13 +- 0.01"], ["31.2", "-"]]
    assert [row.style for row in table.rows] == ["bold", "dim"]


def test_rows_without_names_keep_their_order():
    points = [{"sampler": "euler", "n_steps": 2}, {"sampler": "ddim", "n_steps": 10}]
    columns = {"sampler": Column("sampler", "{}"), "n_steps": Column("steps", "{:d}")}
    text = lines(score_table(dict(enumerate(points)), columns, title="Curve"))
    assert text[0] == ["Curve"] and text[1] == ["sampler", "steps"] and text[-2:] == [["euler", "2"], ["ddim", "10"]]


def test_latents_are_summarised_over_channels():
    latents = {name: [3.0, 1.0, 2.5] for name in ("mean", "std", "posterior_std", "kl", "normalized_std")}
    text = lines(latent_table({**latents, "dead": [True, False, True]}))
    assert text[0] == ["Latent", "channels:", "3,", "dead:", "2"]
    assert all(line[-3:] == ["1.0000", "2.5000", "3.0000"] for line in text[-5:])


@pytest.mark.parametrize("value", ["4,096", "bf16"])
def test_facts_have_names(value):
    assert lines(fact_table("Model", {"size": value}))[-1] == ["size", value]
