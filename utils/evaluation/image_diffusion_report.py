"""Tables of the evaluation of text-to-image diffusion, and its sheet and curves over sampling settings."""

from typing import Any

from PIL import Image
from rich.table import Table

from utils.drawing.images import Group, draw_sheet
from utils.evaluation.tables import FEATURE_COLUMNS, Column, fact_table, score_table
from utils.metrics.caption_agreement import N_POOLED

ROW_NAMES = {  # row -> label, in the order of the table
    "real": "held-out images",
    "training": "training images",
    "reconstruction": "reconstruction",
    "generated": "generated",
    "shuffled": "shuffled captions",
    "chance": "chance",
}
COLUMNS = {
    "frechet": Column("Frechet", "{:.1f}", "low"),
    "kid": Column("KID", "{:.3f}", "low", error="kid_error"),
    "precision": Column("precision", "{:.3f}", "high"),
    "recall": Column("recall", "{:.3f}", "high"),
    "agreement": Column("agreement", "{:.3f}", "high"),
    "words": Column("words", "{:.3f}", "high"),
    **FEATURE_COLUMNS,
}
CURVE_COLUMNS = {
    "sampler": Column("sampler", "{}"),
    "guidance_scale": Column("guidance", "{:g}"),
    "n_steps": Column("steps", "{:d}"),
    "n_evaluations": Column("evaluations", "{:d}"),
    **{name: COLUMNS[name] for name in ("frechet", "kid", "precision", "recall", "agreement", *FEATURE_COLUMNS)},
    "seconds_per_image": Column("s/image", "{:.3f}", "low"),
}
CURVE_METRICS = (*COLUMNS, "seconds_per_image")


def generation_table(metrics: dict[str, Any], n_samples: int) -> Table:
    """One row per set of images."""
    caption = (
        f"Frechet, KID: distance from the {metrics['reference']} images (0: none). precision: realism. recall: "
        "diversity.\nagreement: accuracy of retrieving the caption with a probe. words: AUC of words (chance: 0.5)."
    )
    # Notes that depend on the data.
    if n_samples < 2 * N_POOLED:
        caption += f"\nFrechet is biased upwards below {2 * N_POOLED} images (here {n_samples}): read KID."
    if metrics["captions"]["problem"]:
        caption += f"\nNo agreement: {metrics['captions']['problem']}."
    if metrics["captions"]["remark"]:
        caption += f"\nFew captions: {metrics['captions']['remark']}."
    return score_table(
        metrics["scores"],
        COLUMNS,
        title=f"Text to image, {n_samples} held-out captions",
        names=ROW_NAMES,
        evaluated="generated",
        reference=metrics["reference"],
        caption=caption,
    )


def detail_table(metrics: dict[str, Any]) -> Table:
    """Distance without the VAE's error, memorisation, the probe, size, settings and speed."""
    facts: dict[str, str] = {}
    generated, captions = metrics["scores"]["generated"], metrics["captions"]
    copied, model, sampling = metrics["memorisation"], metrics["model"], metrics["sampling"]
    # Rows that exist only with raw images, and only with a probe.
    if generated.get("kid_to_reconstruction") is not None:
        facts["compared with reconstructions"] = (
            f"Frechet {generated['frechet_to_reconstruction']:.1f}, KID {generated['kid_to_reconstruction']:.3f}"
        )
    facts["nearest training image"] = (
        f"{copied['median_ratio']:.2f} x the distance of held-out images; {copied['share_closer']:.0%} closer than "
        f"95 % of them (5 %: no memorisation), among {copied['n_training']}"
    )
    if captions["n_words"]:
        facts["probe"] = (
            f"{captions['n_words']} words, R^2 {captions['explained']:.2f} on held-out captions; "
            f"{captions['n_distinct']} distinct captions evaluated, {captions['n_without_words']} without known words"
        )
    # Size, settings and speed.
    facts["parameters"] = f"{model['parameters']:,}"
    facts["sampling"] = (
        f"{sampling['sampler']}, {sampling['n_steps']} steps ({model['n_evaluations']} evaluations), guidance "
        f"{sampling['guidance_scale']:g}, seed {sampling['seed']}"
    )
    facts["time"] = f"{model['seconds_per_image']:.3f} s per image at batch size {model['batch_size']}"
    return fact_table("Model and sampling", facts)


def curve_table(points: list[dict[str, Any]], n_samples: int) -> Table:
    """One row per combination of sampler, guidance scale and steps."""
    return score_table(dict(enumerate(points)), CURVE_COLUMNS, title=f"Curve, {n_samples} captions per point")


def curves_by_steps(points: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """One curve over the number of steps per metric, sampler and guidance scale."""
    curves: dict[str, dict[int, float]] = {}
    for point in points:
        for name in CURVE_METRICS:
            if point.get(name) is not None:  # metrics that are not defined get no curve
                title = f"curve_{name}/{point['sampler']}_guidance_{point['guidance_scale']:g}"
                curves.setdefault(title, {})[point["n_steps"]] = point[name]
    return curves


def curve_sheet(shown: dict[tuple[str, float, int], Image.Image], caption: str) -> Image.Image:
    """One caption and seed at every combination: a row per sampler and guidance scale, a column per number of steps.

    Args: shown: images by (sampler, guidance scale, steps).
    """
    # Distinct values in the order of their first occurrence.
    steps = list(dict.fromkeys(n_steps for _, _, n_steps in shown))
    rows = dict.fromkeys((sampler, scale) for sampler, scale, _ in shown)
    groups = [Group([shown[*row, n_steps] for n_steps in steps], f"{row[0]}, guidance {row[1]:g}") for row in rows]
    return draw_sheet(groups, [f"{n_steps} steps" for n_steps in steps], title=caption)
