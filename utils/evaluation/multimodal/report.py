"""Rows, definitions and tables of the evaluation of multimodal models."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from utils.evaluation.audio import MIN_WORDS
from utils.evaluation.tables import FEATURE_COLUMNS, Column, fact_table, score_table
from utils.metrics.caption_agreement import N_POOLED

ROW_NAMES = {
    "real": "held-out images",
    "recording": "recordings",
    "vae": "their latents, decoded",
    "model": "this model",
    "shuffled": "shuffled conditions",
    "chance": "chance",
}
# fmt: off
COLUMNS = {
    "exact":             Column("exact",       "{:.3f}", "high"),
    "words":             Column("words",       "{:.3f}", "high"),
    "object":            Column("object",      "{:.3f}", "high"),
    "ground":            Column("ground",      "{:.3f}", "high"),
    "place":             Column("place",       "{:.3f}", "high"),
    "all":               Column("all",         "{:.3f}", "high"),
    "read_object":       Column("object",      "{:.3f}", "high"),
    "read_ground":       Column("ground",      "{:.3f}", "high"),
    "read_place":        Column("place",       "{:.3f}", "high"),
    "read_all":          Column("all",         "{:.3f}", "high"),
    "read_words":        Column("words",       "{:.3f}", "high"),
    "read_top1":         Column("text",        "{:.3f}", "high"),
    "probe_top1":        Column("probe",       "{:.3f}", "high"),
    "probe_words":       Column("AUC",         "{:.3f}", "high"),
    "kid":               Column("KID",         "{:.2f}", "low", error="kid_error"),
    "frechet":           Column("Frechet",     "{:.0f}", "low"),
    **FEATURE_COLUMNS,
    "wer":               Column("WER",         "{:.3f}", "low"),
    "wer_all":           Column("all clips",   "{:.3f}", "low"),
    "cer":               Column("CER",         "{:.3f}", "low"),
    "length_error":      Column("frames off",  "{:.1f}", "low"),
    "length_ratio":      Column("length",      "{:.3f}"),
}
LOSS_COLUMNS = {
    "steps_at":            Column("steps",          "{}"),
    "bits_per_byte":       Column("bits/byte",      "{:.4f}", "low"),
    "other_bits_per_byte": Column("other's",        "{:.4f}"),
    "token_accuracy":      Column("tokens",         "{:.3f}", "high"),
    "error_t0.5":          Column("error t=0.5",    "{:.3f}", "low"),
    "ratio_t0.5":          Column("other/true",     "{:.2f}", "high"),
    "error_t0.9":          Column("error t=0.9",    "{:.3f}", "low"),
    "ratio_t0.9":          Column("other/true",     "{:.2f}", "high"),
    "steps_text":          Column("steps of text",  "{:.2f}"),
    "steps_image":         Column("image",          "{:.2f}"),
    "steps_audio":         Column("audio",          "{:.2f}"),
    "exact":               Column("exact",          "{:.3f}", "high"),
    "read_all":            Column("read, all",      "{:.3f}", "high"),
    "read_top1":           Column("read, text",     "{:.3f}", "high"),
    "probe_top1":          Column("probe",          "{:.3f}", "high"),
    "wer_all":             Column("WER",            "{:.3f}", "low"),
}
# fmt: on
DEFINITIONS = {
    "items": "Held-out items, one of each distinct text. n_items: by direction, those that have both modalities. A "
    "share p of n items has a standard error of (p (1 - p) / n)^(1/2).",
    "rows": "real: raw held-out images. recording: recorded waveforms (--waveforms). vae: held-out latents, decoded. "
    "model: generated for the held-out condition. shuffled: the same, compared with the texts of other items. "
    "chance: random guessing among the distinct texts. Other rows: the models of --beside, for the same "
    "items; what diffusion models make is read after this run's VAE has "
    "encoded it.",
    "exact": "Share of generated texts that equal the true one without case and punctuation. words: share of the true "
    "words that occur in it. object, ground, place, all: share of texts that name the same factor, where all texts "
    "are captions of the embedded scenes. wer, cer of texts: word and character errors over words and characters.",
    "bits_per_byte": "Cross-entropy of a text and the token that ends it in bits, given its image or clip, over the "
    "UTF-8 bytes of the text; other_bits_per_byte: given that of another item. token_accuracy: share of these tokens "
    "that are the most probable one.",
    "error": "Mean squared error of the flow's prediction per value of a token, without channel weights, at a time "
    "(0: data, 1: noise). ratio: the error under the condition of another item over that under the true one; about 1 "
    "where the condition is ignored.",
    "read": "What a reader finds, a small convolutional network on latents that was trained on the training split. "
    "Factors where all texts are captions of the embedded scenes: share of items with the right object, ground, "
    "place, and all of them. Otherwise words: read_words is the area under the ROC curve of a word, mean over words, "
    "read_top1 the share of items whose own text is the most probable one of the distinct texts. The row vae is its "
    "score on real latents.",
    "probe": "Retrieval accuracy and mean area under the ROC curve of words of a probe on image features, see "
    "utils/metrics/caption_agreement.py; it is fitted to the images of the training split.",
    "kid": "Squared maximum mean discrepancy of EfficientNet-Lite0 features with the kernel (x.y / 1280 + 1)^3, "
    "compared with the row real, or vae where raw images cannot be read; of the first copy of each text. kid_error: "
    f"its jackknife standard error. frechet: biased upwards below {2 * N_POOLED} images.",
    "wer": "Word error rate of Whisper tiny.en with greedy decoding on vocoded clips whose text has "
    f"{MIN_WORDS} words or more; cer: of characters; wer_all, cer_all: of all clips.",
    "length_error": "Mean absolute difference from the length of the held-out clip of the same text, in latent "
    "frames. length_ratio: sum of the lengths over that of the held-out clips.",
    "round_trips": "What the model makes of its own output: text-image-text compares texts, image-text-image reads "
    "the images drawn for the captions of real ones; shuffled: compared with other items.",
    "thinking_steps": "The same with other numbers of thinking steps. exits: losses where tokens leave the core once "
    "another step changes them by less than the threshold. steps: mean thinking steps by modality. carried_steps: "
    "thinking steps in a sampler's steps after the first, which go on from the state of the one before; none: each "
    "takes all and begins anew. seconds: of the clock, per generated item.",
}


def tables_of(metrics: Mapping[str, Any], *, notes: Sequence[str]) -> list[Table]:
    """The tables of an evaluation: losses, a table per direction, round trips, depths, the model."""
    tables = []
    if metrics["losses"]:
        caption = "other's: under the condition of another item; other/true about 1: the condition is ignored"
        rows = {name: with_steps(row) for name, row in metrics["losses"].items()}
        tables.append(loss_table(rows, "Losses on held-out items", caption=caption))
    for name, rows in metrics["scores"].items():
        n = metrics["n_items"][name]
        title = f"{name.replace('-', ' to ')}, {n} held-out items"
        names = {**ROW_NAMES, **{row: row for row in rows if row not in ROW_NAMES}}
        caption = f"standard error of a share of {n}: at most {0.5 / n**0.5:.3f}"
        tables.append(score_table(rows, COLUMNS, title=title, names=names, caption=caption))
    if metrics["round_trips"]:
        trips = {(trip, row): scores for trip, rows in metrics["round_trips"].items() for row, scores in rows.items()}
        for back, title in (("text", "Round trips of texts"), ("", "Round trips of images and clips, read")):
            rows = {key: row for key, row in trips.items() if key[0].endswith("text") == bool(back)}
            columns = {name: COLUMNS[name] for name in COLUMNS if name.startswith("read_") != bool(back)}
            names = {key: f"{key[0]}{', shuffled' if key[1] == 'shuffled' else ''}" for key in rows}
            for name in ("wer", "cer"):
                columns.pop(name, None)
            tables += [score_table(rows, columns, title=title, names=names)] if rows else []
    depths = {"thinking_steps": "Thinking steps", "carried_steps": "Carried states", "exits": "Early exits"}
    for name, title in depths.items():
        if metrics.get(name):
            rows = {
                (point["at"], direction): {
                    **with_steps(row),
                    "steps_at": "all" if point["at"] is None else f"{point['at']:g}",
                }
                for point in metrics[name]
                for direction, row in point["directions"].items()
            }
            columns = {**LOSS_COLUMNS, "steps_at": Column("threshold" if name == "exits" else "steps", "{}")}
            columns["seconds"] = Column("s per item", "{:.3f}", "low")
            names = {key: key[1] for key in rows}
            tables.append(score_table(rows, columns, title=title, names=names))
    tables.append(model_table(metrics, notes))
    return tables


def with_steps(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the mean thinking steps of each modality as columns of their own."""
    return {**row, **{f"steps_{name}": value for name, value in row.get("steps", {}).items()}}


def loss_table(rows: Mapping[Any, Mapping[str, Any]], title: str, *, caption: str = "") -> Table:
    """A row of losses per direction."""
    names = {key: str(key).replace("-", " to ") for key in rows}
    return score_table(rows, LOSS_COLUMNS, title=title, names=names, evaluated=None, caption=caption)


def model_table(metrics: Mapping[str, Any], notes: Sequence[str]) -> Table:
    """Size, sampling, readers and what was not measured."""
    facts = {"parameters": f"{metrics['model']['parameters']:,}"}
    for name, sampling in metrics["sampling"].items():
        facts[f"sampling of {name}"] = (
            f"{sampling['sampler']}, {sampling['n_steps']} steps, guidance {sampling['guidance_scale']:g}"
        )
    for name, reader in metrics["readers"].items():
        scores = ", ".join(f"{key} {value:.3f}" for key, value in reader["held_out"].items())
        facts[f"reader of {name}"] = f"on {reader['n_held_out']} real held-out items: {scores}"
    if "vocoder" in metrics["model"]:
        facts["vocoder"] = metrics["model"]["vocoder"]
    facts |= {f"note {number}": note for number, note in enumerate(notes, 1)}
    return fact_table("Model", facts)
