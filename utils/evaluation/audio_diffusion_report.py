"""Rows, definitions and tables of the evaluation of text to speech."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from utils.evaluation.audio import MIN_WORDS, Scores
from utils.evaluation.tables import Column, fact_table, score_table

ROW_NAMES = {  # row -> label, in the order of the table
    "recording": "recordings",
    "vocoder": "vocoder alone",
    "vae": "VAE + vocoder",
    "teacher": "true durations",
    "model": "this model",
    "prior": "prior alone",
    "shuffled": "shuffled texts",
    "sentences": "new sentences",
}
# fmt: off
COLUMNS = {
    "wer":                Column("WER",       "{:.3f}", "low"),
    "wer_95":             Column("95 %",      "{}"),
    "wer_all":            Column("all clips", "{:.3f}", "low"),
    "cer":                Column("CER",       "{:.3f}", "low"),
    "n_words":            Column("words",     "{:d}"),
    "speaker_similarity": Column("speaker",   "{:.3f}", "high"),
    "voice_accuracy":     Column("voice",     "{:.3f}", "high"),
    "f0_mean_hz":         Column("F0 Hz",     "{:.0f}"),
    "f0_std_semitones":   Column("F0 std",    "{:.2f}"),
    "distillmos":         Column("MOS",       "{:.2f}", "high"),
    "length_ratio":       Column("length",    "{:.3f}"),
    "real_time_factor":   Column("RTF",       "{:.3f}", "low"),
}
# fmt: on
CURVE_COLUMNS = {
    "guidance_scale": Column("guidance", "{:g}"),
    "n_steps": Column("steps", "{:d}"),
    **{name: COLUMNS[name] for name in ("wer", "wer_95", "cer", "n_words", "f0_std_semitones", "real_time_factor")},
}
DEFINITIONS = {
    "rows": "recording: the recorded waveforms (--waveforms). vocoder: the vocoder on the true log-mels. vae: the "
    "decoded true latents, vocoded. teacher: generated with the true durations. model: generated with predicted "
    "durations. prior: the prior's mean with predicted durations, without sampling. shuffled: as model, for the text "
    "of the next clip, compared with the clip's own text. sentences: as model, for sentences that are in no data set.",
    "wer": f"Word error rate of Whisper tiny.en with greedy decoding: errors over words of all clips whose text has "
    f"{MIN_WORDS} words or more, both in the form of Whisper's English normaliser (arXiv 2212.04356, appendix C). "
    "n_clips, n_words: of these clips.",
    "wer_all": "The same over all clips, also those of one word. n_clips_all, n_words_all: of these clips.",
    "wer_interval": "95 % percentile bootstrap interval over clips, 2000 resamples seeded by --seed; wer_all_interval "
    "likewise.",
    "cer": "Character error rate of the clips of wer, single spaces included; cer_all of those of wer_all.",
    "speaker_similarity": "Cosine similarity of resemblyzer's speaker embeddings to the same clip of the row "
    "`reference`; of new sentences to the mean embedding of their speaker's reference clips.",
    "voice_accuracy": "Where there are several speakers: share of clips whose speaker embedding is most like the mean "
    "embedding of their own speaker's reference clips. voices: the same and error rates of each speaker; model: "
    "held-out clips, sentences: new sentences.",
    "f0_mean_hz": "Pitch of voiced frames in Hz, mean over clips of each clip's mean (tracker: 60 to 550 Hz, every "
    "10 ms).",
    "f0_std_semitones": "Std of the pitch in semitones over the voiced frames of a clip, mean over clips. Flat speech "
    "has less than the reference.",
    "distillmos": "Mean opinion score that DistillMOS predicts without a reference, 1 to 5 (arXiv 2502.05356).",
    "length_ratio": "Seconds of the row over seconds of the reference.",
    "real_time_factor": "Seconds of computation per second of audio, from text to waveform at batch size 1: CPU "
    "seconds of one thread, or seconds on the GPU. The first clip is excluded if there are several.",
}


def with_interval(row: dict[str, Any]) -> dict[str, Any]:
    """A row of scores with its interval as a text."""
    if "wer_interval" not in row:
        return row
    low, high = row["wer_interval"]
    return {**row, "wer_95": f"{low:.2f}-{high:.2f}"}


def speech_table(scores: dict[str, Scores], reference: str, *, n_clips: int, notes: Sequence[str]) -> Table:
    """One row per system.

    Args:
        reference: the row that the others are compared with.
        notes: sentences below the table.
    """
    caption = [
        f"speaker, length: compared with: {ROW_NAMES[reference]}.",
        *notes,
    ]
    if any("wer" in row for row in scores.values()):
        words = f"WER, CER: clips with {MIN_WORDS} words or more, 95 % by bootstrap over clips; all clips: WER of all."
        caption.insert(0, words)
    return score_table(
        {name: with_interval(row) for name, row in scores.items()},
        COLUMNS,
        title=f"Text to speech, {n_clips} held-out clips",
        names=ROW_NAMES,
        reference=reference,
        caption=" ".join(caption),
    )


def voice_table(voices: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """One row per speaker and row of the evaluation.

    Args: voices: speaker -> row -> scores.
    """
    columns = {name: COLUMNS[name] for name in ("wer", "wer_95", "wer_all", "n_words", "voice_accuracy")}
    columns |= {"n_voices": Column("clips", "{:d}")}
    rows = {(speaker, name): row for speaker, rows in voices.items() for name, row in rows.items() if row}
    labels = {key: f"{key[0]}, {ROW_NAMES[key[1]]}" for key in rows}
    scores = {key: with_interval(row) for key, row in rows.items()}
    return score_table(scores, columns, title="Speakers", names=labels, evaluated=None)


def model_table(model: dict[str, Any], sampling: dict[str, Any]) -> Table:
    """Size, sampling and speed."""
    facts = {
        "parameters": f"{model['parameters']:,}",
        "sampling": f"{sampling['sampler']}, {sampling['n_steps']} steps, guidance {sampling['guidance_scale']:g}, "
        f"seed {sampling['seed']}",
        "vocoder": model["vocoder"],
    }
    return fact_table("Model", facts)


def curve_table(points: Sequence[dict[str, Any]], n_clips: int) -> Table:
    """One row per combination of guidance scale and steps."""
    rows = {number: with_interval(point) for number, point in enumerate(points)}
    return score_table(rows, CURVE_COLUMNS, title=f"Curve, {n_clips} clips per point")


def curves_by_steps(points: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """One curve over the number of steps per metric and guidance scale."""
    curves: dict[str, dict[int, float]] = {}
    for point in points:
        for name in ("wer", "cer", "f0_std_semitones", "real_time_factor"):
            if point.get(name) is not None:
                curves.setdefault(f"curve_{name}/guidance_{point['guidance_scale']:g}", {})[point["n_steps"]] = point[
                    name
                ]
    return curves
