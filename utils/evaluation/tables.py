"""Tables that several evaluations print."""

import statistics

from rich.box import SIMPLE_HEAD
from rich.table import Table


def latent_table(latents: dict[str, list]) -> Table:
    """One row per statistic: its range over the channels."""
    n_channels, n_dead = len(latents["dead"]), sum(latents["dead"])
    table = Table(title=f"Latent channels: {n_channels}, dead: {n_dead}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("over the channels", "lowest", "median", "highest"):
        table.add_column(name, justify="left" if name == "over the channels" else "right")
    meanings = {
        "mean": "mean of posterior means",
        "std": "std of posterior means",
        "posterior_std": "std of the posterior",
        "kl": "KL in nats per position",
        "normalized_std": "std once normalized, 1 is right",
    }
    for name, meaning in meanings.items():
        values = latents[name]
        table.add_row(meaning, *(f"{pick(values):.4f}" for pick in (min, statistics.median, max)))
    return table
