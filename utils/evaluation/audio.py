"""What the evaluations of vocoders and audio VAEs share: clips in rows, their metrics, speed, table, sounds, sheet.

S samples, M mel bins, F frames.
"""

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dataset_loading.cached import evenly_spaced
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, MelSettings
from utils.drawing.audio import TRIPLE, mel_triple, strip_sheet
from utils.drawing.images import Group
from utils.evaluation.evaluator import ContactSheetArguments, Evaluation, EvaluationArguments, Evaluator
from utils.metrics.audio import (
    N_CEPSTRA,
    PACKAGES,
    SpeakerEncoder,
    import_optional,
    mcd,
    mel_l1,
    multi_resolution_stft_distance,
    not_measured,
    pesq_wb_and_mean,
    stoi,
)
from utils.metrics.pitch import pitch_scores, track_pitch
from utils.metrics.words import Recognizer, normalize_text, word_error_rate
from utils.options import option
from utils.timing import RealTime

logger = logging.getLogger(__name__)

GRIFFIN_LIM_ITERATIONS = 60
MIN_WORDS = 4  # Shorter transcripts are not recognised: one word alone is a matter of luck.
Scores = dict[str, float | None]
Metric = Literal["pesq", "stoi", "mel", "stft", "pitch", "speaker", "wer"]
# fmt: off
COLUMNS = {  # score -> title in the table, which values are good, digits
    "pesq_wb":            ("PESQ-wb",  "high", 2),
    "pesq_wb_starts":     ("4 starts", "high", 2),
    "stoi":               ("STOI",     "high", 3),
    "mel_l1":             ("mel-L1",   "low",  3),
    "mcd_db":             ("MCD dB",   "low",  2),
    "stft_distance":      ("STFT",     "low",  3),
    "voicing_f1":         ("V/UV F1",  "high", 3),
    "periodicity_rmse":   ("period.",  "low",  3),
    "speaker_similarity": ("speaker",  "high", 3),
    "wer":                ("WER",      "low",  3),
    "real_time_factor":   ("x time",   "low",  3),
}
# fmt: on
DEFINITIONS = {
    "rows": "ground_truth: the recorded waveforms. Every row is held against `reference` clip by clip; scores are "
    "means over the clips for which they are defined",
    "pesq_wb": "wide-band PESQ (P.862.2) at 16 kHz, 1.0 to 4.64; over 16 s, the mean of its pieces",
    "pesq_wb_starts": "its mean over clips cut by 0, 4, 8 and 12 ms at the beginning: PESQ depends on where its "
    "frames of 16 ms lie relative to a vocoder's, by 0.4 or more; compare systems with other frames by this mean",
    "stoi": "short-time objective intelligibility, 0 to 1",
    "mel_l1": "mean |difference| of natural log-mels of magnitudes (`mel`), of the row's waveform and of the data",
    "mcd_db": f"mel-cepstral distortion of the same log-mels, coefficients 1 to {N_CEPSTRA}, frame by frame",
    "stft_distance": "spectral convergence + mean |difference| of log magnitudes, mean of frames of 512, 1024, 2048",
    "voicing_f1": "F1 of voiced frames by a normalised cross-correlation tracker, 60 to 550 Hz, 10 ms",
    "periodicity_rmse": "root mean square difference of the tracker's correlation",
    "f0_rmse_cents": "root mean square difference of pitch where both are voiced; an octave error counts 1200",
    "speaker_similarity": "cosine of resemblyzer's embeddings",
    "wer": f"errors over words, whisper tiny.en, greedy, on clips whose transcript has {MIN_WORDS} words or more; "
    "numbers are spelled out, case and punctuation ignored",
    "real_time_factor": "seconds of computing per second of sound, clips one at a time: CPU seconds of one thread, or "
    "seconds on the GPU; the first clip left out where there are several",
}


@dataclasses.dataclass
class AudioEvaluationArguments(ContactSheetArguments, EvaluationArguments):
    """Flags of the evaluation of models that generate audio."""

    metrics: list[Metric] = option(
        list(get_args(Metric)), "metrics; wer is the slowest, about a second per clip and row; mel: mel-L1 and MCD"
    )

    def validate_metrics(self):
        if not self.metrics:
            raise ValueError("--metrics is empty; give one or more")


@dataclasses.dataclass
class Clip:
    """One clip of an evaluation.

    Attributes:
        entry: its entry in the manifest.
        mel: the true log-mel (M, F).
        predicted: the model's log-mel (M, F), for the sheet.
        rows: row's name -> waveform (S,) on the CPU; the first one is the reference.
        scores: row's name -> scores that the stage measures itself.
    """

    entry: dict[str, Any]
    mel: Tensor
    predicted: Tensor
    rows: dict[str, Tensor]
    scores: dict[str, Scores] = dataclasses.field(default_factory=dict)


class ClipScorer:
    """Metrics of the rows of a clip.

    Args:
        settings: the log-mel.
        metrics: names as in `AudioEvaluationArguments.metrics`.
    Raises: ValueError: a metric's package is missing.
    """

    def __init__(self, settings: MelSettings, metrics: Sequence[str]):
        self.not_measured = not_measured(metrics)
        for sentence in self.not_measured.values():
            logger.warning(sentence)
        metrics = [metric for metric in metrics if metric not in self.not_measured]
        for metric in metrics:
            for package in PACKAGES.get(metric, []):
                import_optional(package)
        self.metrics, self.rate, self.log_mel = metrics, settings.sample_rate, LogMel(settings)
        self.encoder, self.recognizer = SpeakerEncoder(), Recognizer(torch.get_num_threads())

    def score(self, clip: Clip) -> dict[str, Scores]:
        """Row's name -> scores."""
        reference = next(iter(clip.rows.values()))
        mels = {name: self.log_mel(waveform[None])[0] for name, waveform in clip.rows.items()}
        pitch, voice = None, None
        if "pitch" in self.metrics:
            pitch = track_pitch(reference, self.rate)
        if "speaker" in self.metrics:
            voice = self.encoder.embed(reference, self.rate)
        scores: dict[str, Scores] = {}
        for name, waveform in clip.rows.items():
            row = dict(clip.scores.get(name, {}))
            if "pesq" in self.metrics:
                row["pesq_wb"], row["pesq_wb_starts"] = pesq_wb_and_mean(reference, waveform, self.rate)
            if "stoi" in self.metrics:
                row["stoi"] = stoi(reference, waveform, self.rate)
            if "mel" in self.metrics:
                row |= {"mel_l1": mel_l1(clip.mel, mels[name]), "mcd_db": mcd(clip.mel, mels[name])}
            if "stft" in self.metrics:
                row["stft_distance"] = multi_resolution_stft_distance(reference, waveform)
            if pitch is not None:
                row |= pitch_scores(pitch, track_pitch(waveform, self.rate))
            if "speaker" in self.metrics:
                row["speaker_similarity"] = self.encoder.cosine(voice, self.encoder.embed(waveform, self.rate))
            scores[name] = row
        return scores

    def transcribe(self, clip: Clip) -> dict[str, str]:
        """Row's name -> what is understood; empty where the true transcript is too short or unknown."""
        if "wer" not in self.metrics or len(normalize_text(clip.entry["caption"])) < MIN_WORDS:
            return {}
        return {name: self.recognizer.transcribe(waveform, self.rate) for name, waveform in clip.rows.items()}


class AudioEvaluator(Evaluator):
    """Clips are taken whole and one at a time. Subclasses state `row_names`, `build_dataset` and `clip`."""

    arguments_class = AudioEvaluationArguments
    row_names: dict[str, str]  # row -> how the table names it; "model" among them
    title: ClassVar[str]
    definitions: ClassVar[dict[str, str]] = DEFINITIONS

    def clip(self, dataset: Any, index: int) -> Clip:
        """Everything that is measured of one sample."""
        raise NotImplementedError

    def __init__(self, args: Any, checkpoint: Path):
        super().__init__(args, checkpoint)
        self.settings: MelSettings = self.model.config.mel
        self.scorer = ClipScorer(self.settings, args.metrics)
        self.speed = RealTime(self.device)

    def griffin_lim(self, row: str, mel: Tensor) -> Tensor:
        """A log-mel (M, F) as a waveform (S,) without a trained vocoder; timed as a row's."""
        seconds = mel.shape[1] * self.settings.hop_length / self.settings.sample_rate
        mel = mel[None].to(self.device)
        return self.speed.run(row, seconds, lambda: griffin_lim(mel, self.settings, GRIFFIN_LIM_ITERATIONS))[0].cpu()

    def autocast(self) -> torch.autocast:
        """The precision that the model runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def finite(self, made: Tensor, entry: dict[str, Any], maker: Path | None = None) -> Tensor:
        """What a checkpoint made, by default the evaluated one, fp32 on the CPU.

        Raises: ValueError: it is not finite; names checkpoint and sample.
        """
        if not made.isfinite().all():
            raise ValueError(
                f"{maker or self.checkpoint} makes of {entry['key']} values that are not finite; the weights are "
                "broken"
            )
        return made.float().cpu()

    def measure(self, dataset, indices):
        on_sheet = {indices[i] for i in evenly_spaced(len(indices), self.args.contact_sheet)}
        values: dict[str, list[Scores]] = {}
        transcripts: list[dict[str, Any]] = []
        drawn: list[tuple[Clip, Scores]] = []
        for index in indices:
            clip = self.clip(dataset, index)
            scores = self.scorer.score(clip)
            for name, row in scores.items():
                values.setdefault(name, []).append(row)
            found = self.scorer.transcribe(clip)
            if found:
                transcripts.append({"key": clip.entry["key"], "text": clip.entry["caption"], **found})
            if index in on_sheet:
                drawn.append((clip, scores["model"]))
        return self.report(values, transcripts, drawn, len(indices))

    def report(self, values, transcripts, drawn, n_clips: int) -> Evaluation:
        """Numbers as metrics, scalars, tables, sounds and the contact sheet."""
        scores = {name: means(rows) for name, rows in values.items()}
        counts = {name: counts_of(rows) for name, rows in values.items()}
        for name, row in scores.items():
            if transcripts:
                texts, found = ([each[key] for each in transcripts] for key in ("text", name))
                row["wer"], counts[name]["wer"] = word_error_rate(texts, found), len(transcripts)
            row["real_time_factor"] = self.speed.factor(name)
        if "wer" in self.args.metrics and not transcripts:
            logger.warning("no word error rate: no clip has a transcript of %d words or more", MIN_WORDS)
        reference = next(iter(scores))
        model = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "mel": self.settings.as_dict(),
            "real_time_factor": scores["model"]["real_time_factor"],
        }
        metrics = {
            "scores": scores,
            "n_clips_defined": counts,
            "reference": reference,
            "model": model,
            "transcripts": transcripts,
            "not_measured": self.scorer.not_measured,
        }
        scalars = {name: value for name, value in scores["model"].items() if value is not None}
        evaluation = Evaluation(metrics, scalars, [self.score_table(scores, n_clips, len(transcripts))], {})
        if drawn:
            evaluation.images["contact_sheet.png"] = self.contact_sheet(drawn, n_clips)
            for clip, _ in drawn:
                for name, waveform in clip.rows.items():
                    sound = (waveform, self.settings.sample_rate)
                    evaluation.sounds[f"{clip.entry['key']}_{name}"] = sound
        return evaluation

    def score_table(self, scores: dict[str, Scores], n_clips: int, n_recognized: int) -> Table:
        """One row per way to a waveform."""
        reference = self.row_names[next(iter(scores))]
        where = "seconds on the GPU" if self.device.type == "cuda" else "CPU seconds of one thread"
        shown = [name for name in COLUMNS if any(row.get(name) is not None for row in scores.values())]
        notes = {
            "mel_l1": "mel-L1 and MCD: against the data's log-mels.",
            "pesq_wb_starts": "4 starts: mean PESQ once 0, 4, 8, 12 ms are cut off.",
            "periodicity_rmse": "period.: error of periodicity.",
            "wer": f"WER: {n_recognized} clips of {MIN_WORDS} words or more.",
            "real_time_factor": f"x time: computing per second of sound, {where}.",
        }
        caption = " ".join([f"Every row against: {reference}.", *(notes[name] for name in shown if name in notes)])
        caption = " ".join([caption, *self.scorer.not_measured.values()])
        table = Table(title=f"{self.title}, {n_clips} clips", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.title_justify = table.caption_justify = "left"
        table.add_column("", no_wrap=True)
        for name in shown:
            heading, good, _ = COLUMNS[name]
            table.add_column(f"{heading}\n({good})", justify="right", no_wrap=True)
        for row in (row for row in self.row_names if row in scores):
            cells = [number(scores[row].get(name), COLUMNS[name][2]) for name in shown]
            table.add_row(self.row_names[row], *cells, style="bold" if row == "model" else "")
        return table

    def contact_sheet(self, drawn: list[tuple[Clip, Scores]], n_clips: int) -> Image.Image:
        """One row per clip: the log-mel, the model's, their difference."""
        longest = max(clip.mel.shape[1] for clip, _ in drawn)
        groups = []
        for clip, scores in drawn:
            shown = [
                f"{COLUMNS[name][0]} {scores[name]:.{COLUMNS[name][2]}f}"
                for name in ("pesq_wb", "stoi", "mel_l1")
                if scores.get(name) is not None
            ]
            caption = "  ".join([*shown, clip.entry["caption"] or clip.entry["key"]])
            groups.append(Group(mel_triple(clip.mel, clip.predicted, self.settings.log_floor, longest), caption))
        title = f"{self.checkpoint.parent.name}, step {self.step}: log-mels of {len(drawn)} clips out of {n_clips}"
        return strip_sheet(groups, TRIPLE, title=title)


def number(value: float | None, digits: int) -> str:
    """A value as it stands in a table; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def counts_of(rows: Sequence[Scores]) -> dict[str, int]:
    """Score -> number of clips for which it is defined."""
    return {name: sum(row[name] is not None for row in rows) for name in rows[0]}


def means(rows: Sequence[Scores]) -> Scores:
    """Score -> mean over the clips for which it is defined; None where there are none."""
    defined = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: statistics.fmean(found) if found else None for name, found in defined.items()}
