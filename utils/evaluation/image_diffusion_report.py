"""How the evaluation of text to image is shown: tables, the sheet and the curves over sampling settings."""

from typing import Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from utils.drawing.images import Group, draw_sheet
from utils.metrics.caption_agreement import N_POOLED

ROW_NAMES = {
    "real": "held-out images",
    "training": "training images",
    "reconstruction": "reconstruction",
    "generated": "generated",
    "shuffled": "shuffled captions",
    "chance": "chance",
}
CURVE_METRICS = ("frechet", "kid", "precision", "recall", "agreement", "words", "seconds_per_image")


def number(value: float | None, digits: int = 3) -> str:
    """A value as it stands in a table; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def kid_text(row: dict[str, Any]) -> str:
    """The kernel distance with its error."""
    return "-" if row.get("kid") is None else f"{row['kid']:.3f} +- {row['kid_error']:.3f}"


def score_table(metrics: dict[str, Any], n_samples: int) -> Table:
    """One row per set of images."""
    caption = (
        f"Frechet, KID: difference from the {metrics['reference']} images (0: none). precision: realism. recall: "
        "variety.\nagreement: a probe finds the right caption among all. words: it reads single words (0.5: chance)."
    )
    if n_samples < 2 * N_POOLED:
        caption += f"\nFrechet is biased upwards under {2 * N_POOLED} images (here {n_samples}): read KID."
    if metrics["captions"]["problem"]:
        caption += f"\nNo agreement: {metrics['captions']['problem']}."
    table = Table(title=f"Text to image, {n_samples} held-out captions", caption=caption, box=SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("Frechet", "KID", "precision", "recall", "agreement", "words"):
        good = "low" if name in ("Frechet", "KID") else "high"
        table.add_column(f"{name}\n({good}: good)", justify="right", no_wrap=True)
    for name in (name for name in ROW_NAMES if name in metrics["scores"]):
        row = metrics["scores"][name]
        values = [number(row.get(column)) for column in ("precision", "recall", "agreement", "words")]
        style = "bold" if name == "generated" else ""
        table.add_row(ROW_NAMES[name], number(row.get("frechet"), 1), kid_text(row), *values, style=style)
    return table


def detail_table(metrics: dict[str, Any]) -> Table:
    """Memorisation, speed and settings."""
    table = Table(title="Model and sampling", title_justify="left", show_header=False, box=SIMPLE_HEAD)
    copied, model, sampling = metrics["memorisation"], metrics["model"], metrics["sampling"]
    generated, captions = metrics["scores"]["generated"], metrics["captions"]
    if "kid_to_reconstruction" in generated:
        distance = f"Frechet {number(generated['frechet_to_reconstruction'], 1)}"
        table.add_row("to reconstructions", f"{distance}, KID {number(generated['kid_to_reconstruction'])}")
    table.add_row(
        "nearest training image",
        f"{copied['median_ratio']:.2f} x the distance of held-out ones; {copied['share_closer']:.0%} nearer than "
        f"95 % of them (5 %: no copies), of {copied['n_training']}",
    )
    if captions["n_words"]:
        table.add_row(
            "probe",
            f"{captions['n_words']} words, {captions['explained']:.0%} of their variance on captions left out; "
            f"{captions['n_distinct']} distinct captions evaluated, {captions['n_without_words']} without known words",
        )
    table.add_row("parameters", f"{model['parameters']:,}")
    table.add_row(
        "sampling",
        f"{sampling['sampler']}, {sampling['n_steps']} steps ({model['n_evaluations']} evaluations), guidance "
        f"{sampling['guidance_scale']:g}, seed {sampling['seed']}",
    )
    table.add_row("time", f"{model['seconds_per_image']:.3f} s per image in batches of {model['batch_size']}")
    return table


def curve_table(points: list[dict[str, Any]], n_samples: int) -> Table:
    """One row per combination of sampler, guidance scale and steps."""
    table = Table(title=f"Curve, {n_samples} captions per point", title_justify="left", box=SIMPLE_HEAD)
    for name in ("sampler", "guidance", "steps", "evaluations", "Frechet", "KID", "precision", "recall", "agreement"):
        table.add_column(name, justify="left" if name == "sampler" else "right", no_wrap=True)
    table.add_column("s/image", justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            point["sampler"],
            f"{point['guidance_scale']:g}",
            str(point["n_steps"]),
            str(point["n_evaluations"]),
            number(point["frechet"], 1),
            kid_text(point),
            *(number(point[name]) for name in ("precision", "recall", "agreement", "seconds_per_image")),
        )
    return table


def curves_by_steps(points: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """One curve over the number of steps per metric, sampler and guidance scale."""
    curves: dict[str, dict[int, float]] = {}
    for point in points:
        for name in CURVE_METRICS:
            if point[name] is not None:
                title = f"curve_{name}/{point['sampler']}_guidance_{point['guidance_scale']:g}"
                curves.setdefault(title, {})[point["n_steps"]] = point[name]
    return curves


def curve_sheet(shown: dict[tuple[str, float, int], Image.Image], caption: str) -> Image.Image:
    """One caption and seed at every combination: a row per sampler and guidance scale, a column per number of steps.

    Args: shown: images by (sampler, guidance scale, steps).
    """
    steps = list(dict.fromkeys(n_steps for _, _, n_steps in shown))
    rows = dict.fromkeys((sampler, scale) for sampler, scale, _ in shown)
    groups = [Group([shown[*row, n_steps] for n_steps in steps], f"{row[0]}, guidance {row[1]:g}") for row in rows]
    return draw_sheet(groups, [f"{n_steps} steps" for n_steps in steps], title=caption)
