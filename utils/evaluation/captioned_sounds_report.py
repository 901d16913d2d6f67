"""Rows, definitions and tables of the evaluation of captions to sound."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from utils.evaluation.tables import Column, score_table

ROW_NAMES = {  # row -> label, in the order of the table
    "training": "training sounds",
    "reconstruction": "held-out sounds",
    "generated": "generated",
    "shuffled": "shuffled captions",
    "chance": "chance",
}
COLUMNS = {
    "agreement": Column("agreement", "{:.3f}", "high"),
    "words": Column("words", "{:.3f}", "high"),
    "kid": Column("KID", "{:.3f}", "low", error="kid_error"),
    "frechet": Column("Frechet", "{:.1f}", "low"),
    "precision": Column("precision", "{:.3f}", "high"),
    "recall": Column("recall", "{:.3f}", "high"),
}
CURVE_COLUMNS = {
    "guidance_scale": Column("guidance", "{:g}"),
    "n_steps": Column("steps", "{:d}"),
    **COLUMNS,
    "seconds_per_sound": Column("s/sound", "{:.3f}", "low"),
}
DEFINITIONS = {
    "rows": "reconstruction: held-out sounds, decoded from their latents; the reference. training: as many training "
    "sounds, an upper bound of the distances. generated: sounds for the held-out captions, as long as the real ones. "
    "shuffled: the generated sounds with captions of other clips, mean over 20 permutations. chance: random guessing.",
    "features": "Of log-mels, without a trained network: mean, std and mean absolute change of each mel bin, the "
    "course in 8 bands and 8 parts of the time, the duration. Distances use features standardised by those of the "
    "training sounds.",
    "agreement": "Retrieval accuracy: share of sounds whose own caption is the most similar among all distinct "
    "evaluated captions, of which chance is one over their number. "
    "Similarity is the cosine of standardised word vectors; those of sounds are predicted by a "
    "probe, ridge regression on the features fitted to the training sounds and the words of at least 5 of their "
    "captions; ties count fractionally. captions: n_distinct evaluated captions, n_words in the probe's vocabulary, "
    "explained: share of the words' variance (R^2) that the probe predicts for held-out training captions, "
    "remark: where few distinct captions say little.",
    "words": "Area under the ROC curve of predicting whether a caption contains a word, mean over words; chance: 0.5.",
    "kid": "Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, as U-statistic. Unbiased, may be "
    "negative. kid_error: its jackknife standard error.",
    "frechet": "Frechet distance of sets of equal size; biased upwards below 2 D sounds.",
    "precision": "Improved precision (arXiv 1904.06991) with k = 3: share of sounds on the manifold of the held-out "
    "sounds.",
    "recall": "Improved recall: share of held-out sounds on the manifold of the sounds.",
    "memorisation": "Distances to the nearest training sound. median_ratio: median over generated sounds divided by "
    "the median over held-out sounds. share_closer: share of generated sounds that are closer than 95 % of the held-"
    "out ones; 0.05 is expected without memorisation.",
    "seconds_per_sound": "Time of caption encoder, sampler and VAE. The first batch is excluded if there are several.",
}


def sound_table(metrics: dict[str, Any], n_clips: int) -> Table:
    """One row per set of sounds."""
    caption = (
        "agreement: accuracy of retrieving the caption with a probe. words: AUC of words (chance: 0.5). KID, Frechet: "
        "distance from the held-out sounds (0: none)."
    )
    if metrics["captions"]["problem"]:
        caption += f"\nNo agreement: {metrics['captions']['problem']}."
    if metrics["captions"]["remark"]:
        caption += f"\nFew captions: {metrics['captions']['remark']}."
    return score_table(
        metrics["scores"],
        COLUMNS,
        title=f"Captions to sound, {n_clips} held-out captions",
        names=ROW_NAMES,
        evaluated="generated",
        reference="reconstruction",
        caption=caption,
    )


def curve_table(points: Sequence[dict[str, Any]], n_clips: int) -> Table:
    """One row per combination of guidance scale and steps."""
    return score_table(dict(enumerate(points)), CURVE_COLUMNS, title=f"Curve, {n_clips} sounds per point")
