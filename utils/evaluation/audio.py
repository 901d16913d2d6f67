"""Base of the evaluations of vocoders and audio VAEs: metrics of every clip and system, speed, table, audio, sheet.

A row is a system that produces waveforms, such as the evaluated model or Griffin-Lim.
S samples, M mel bins, F frames.
"""

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from dataset_loading.audio.cached import EVALUATED_FRAMES
from dataset_loading.cached import evenly_spaced
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, MelSettings
from utils.console.progress import reported
from utils.drawing.audio import TRIPLE, mel_triple, strip_sheet
from utils.drawing.images import Group
from utils.evaluation.arguments.audio import AudioEvaluationArguments
from utils.evaluation.evaluator import Evaluation, Evaluator
from utils.evaluation.tables import Column, score_table
from utils.generation.exported import home_of
from utils.metrics.audio import (
    N_CEPSTRA,
    PACKAGES,
    NaturalnessPredictor,
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
from utils.metrics.timing import RealTime
from utils.metrics.words import RECOGNIZER_NAME, Recognizer, knows_language, normalize_text, word_error_rate

logger = logging.getLogger(__name__)

GRIFFIN_LIM_ITERATIONS = 60  # with momentum
DOUBTFUL_WER = 0.5  # On recordings: transcripts are of another language, or of other clips.
MIN_WORDS = 4  # Shorter transcripts are not recognised: without context, a single word is unreliable.
Scores = dict[str, float | None]  # None: not defined for a clip
# fmt: off
COLUMNS = {
    "pesq_wb":            Column("PESQ-wb",  "{:.2f}", "high"),
    "pesq_wb_starts":     Column("4 starts", "{:.2f}", "high"),
    "stoi":               Column("STOI",     "{:.3f}", "high"),
    "mel_l1":             Column("mel-L1",   "{:.3f}", "low"),
    "mcd_db":             Column("MCD dB",   "{:.2f}", "low"),
    "stft_distance":      Column("STFT",     "{:.3f}", "low"),
    "voicing_f1":         Column("V/UV F1",  "{:.3f}", "high"),
    "periodicity_rmse":   Column("period.",  "{:.3f}", "low"),
    "speaker_similarity": Column("speaker",  "{:.3f}", "high"),
    "distillmos":         Column("MOS",      "{:.2f}", "high"),
    "wer":                Column("WER",      "{:.3f}", "low"),
    "real_time_factor":   Column("RTF",      "{:.3f}", "low"),
}
# fmt: on
DEFINITIONS = {
    "rows": f"The systems compared, on the first {EVALUATED_FRAMES} mel frames of a clip. ground_truth: the recorded "
    "waveforms. Each clip of each row is compared with the "
    "same clip of the row `reference`; scores are means over the clips for which they are defined.",
    "pesq_wb": "Wide-band PESQ (ITU-T P.862.2) at 16 kHz, 1.0 to 4.64. Clips longer than 16 s are split; the score is "
    "the mean over the pieces.",
    "pesq_wb_starts": "Mean of wide-band PESQ after removing 0, 4, 8 and 12 ms at the beginning of both clips. PESQ "
    "depends on the offset between its frames of 16 ms and those of a vocoder, by 0.4 or more; use this mean to "
    "compare systems with different frames.",
    "stoi": "Short-time objective intelligibility, 0 to 1.",
    "mel_l1": "Mean absolute difference of natural log-mels of magnitudes (definition: `mel`) between the row's "
    "waveform and the data.",
    "mcd_db": f"Mel-cepstral distortion in dB of the same log-mels, coefficients 1 to {N_CEPSTRA}, without alignment.",
    "stft_distance": "Spectral convergence plus mean absolute difference of log magnitudes, mean over frame sizes of "
    "512, 1024 and 2048 samples.",
    "voicing_f1": "F1 score of voiced frames, with a normalised cross-correlation pitch tracker, 60 to 550 Hz, "
    "every 10 ms.",
    "periodicity_rmse": "Root mean square difference of the periodicity, the tracker's correlation.",
    "f0_rmse_cents": "Root mean square difference of the pitch in cents over frames voiced in both clips; an octave "
    "error counts 1200.",
    "speaker_similarity": "Cosine similarity of resemblyzer's speaker embeddings.",
    "distillmos": "Mean opinion score that DistillMOS predicts without a reference, 1 to 5 (arXiv 2502.05356).",
    "wer": f"Word error rate of Whisper tiny.en with greedy decoding on clips whose transcript has {MIN_WORDS} words "
    "or more, both texts in the form of Whisper's English normaliser (arXiv 2212.04356, appendix C).",
    "real_time_factor": "Seconds of computation per second of audio at batch size 1: CPU seconds of one thread, or "
    "seconds on the GPU. The first clip is excluded if there are several.",
}


@dataclasses.dataclass
class Clip:
    """One clip of an evaluation.

    Attributes:
        entry: its entry in the manifest.
        mel: the target log-mel (M, F).
        predicted: the model's log-mel (M, F), for the sheet.
        rows: name of the row -> waveform (S,) on the CPU; the first row is the reference.
        scores: name of the row -> scores that only the stage defines.
    """

    entry: dict[str, Any]
    mel: Tensor
    predicted: Tensor
    rows: dict[str, Tensor]
    scores: dict[str, Scores] = dataclasses.field(default_factory=dict)


class ClipScorer:
    """Metrics of the rows of a clip.

    Args:
        settings: definition of the log-mel.
        metrics: names as in `AudioEvaluationArguments.metrics`.
        language: of clips whose entry has none.
    Attributes: n_other: clips that were not recognised, since they are not English.
    Raises: ValueError: a metric's package is missing.
    """

    def __init__(self, settings: MelSettings, metrics: Sequence[str], language: str = "en"):
        self.language, self.n_other = language, 0
        self.not_measured = not_measured(metrics)
        # A metric whose package needs a compiler is left out, with a warning.
        for sentence in self.not_measured.values():
            logger.warning(sentence)
        metrics = [metric for metric in metrics if metric not in self.not_measured]
        # Any other missing package should stop the evaluation at the start, not after the first clip.
        for metric in metrics:
            for package in PACKAGES.get(metric, []):
                import_optional(package)
        self.metrics, self.rate, self.log_mel = metrics, settings.sample_rate, LogMel(settings)
        self.encoder, self.recognizer = SpeakerEncoder(), Recognizer(torch.get_num_threads())
        self.naturalness = NaturalnessPredictor()

    def score(self, clip: Clip) -> dict[str, Scores]:
        """Name of the row -> scores."""
        # Everything that the rows have in common is computed once: log-mels, pitch and speaker of the reference.
        reference = next(iter(clip.rows.values()))
        mels = {name: self.log_mel(waveform[None])[0] for name, waveform in clip.rows.items()}
        pitch, speaker = None, None
        if "pitch" in self.metrics:
            pitch = track_pitch(reference, self.rate)
        if "speaker" in self.metrics:
            speaker = self.encoder.embed(reference, self.rate)
        # All metrics of each row, generated before target.
        scores: dict[str, Scores] = {}
        for name, waveform in clip.rows.items():
            row = dict(clip.scores.get(name, {}))  # what the stage has measured itself
            # Perception and intelligibility, of waveforms.
            if "pesq" in self.metrics:
                row["pesq_wb"], row["pesq_wb_starts"] = pesq_wb_and_mean(waveform, reference, self.rate)
            if "stoi" in self.metrics:
                row["stoi"] = stoi(waveform, reference, self.rate)
            # Spectra: the log-mel of the row's waveform and that of the data, and short-time Fourier transforms.
            if "mel" in self.metrics:
                row |= {"mel_l1": mel_l1(mels[name], clip.mel), "mcd_db": mcd(mels[name], clip.mel)}
            if "stft" in self.metrics:
                row["stft_distance"] = multi_resolution_stft_distance(waveform, reference)
            # Voicing, pitch, speaker.
            if pitch is not None:
                row |= pitch_scores(track_pitch(waveform, self.rate), pitch)
            if "speaker" in self.metrics:
                row["speaker_similarity"] = self.encoder.cosine(self.encoder.embed(waveform, self.rate), speaker)
            if "mos" in self.metrics:
                row["distillmos"] = self.naturalness.score(waveform, self.rate)
            scores[name] = row
        return scores

    def transcribe(self, clip: Clip) -> dict[str, str]:
        """Name of the row -> recognised text; empty where the true transcript is too short, unknown, or in a language
        that the recogniser does not know."""
        if "wer" not in self.metrics or len(normalize_text(clip.entry["caption"])) < MIN_WORDS:
            return {}
        if not knows_language(clip.entry.get("language") or self.language):
            self.n_other += 1
            return {}
        return {name: self.recognizer.transcribe(waveform, self.rate) for name, waveform in clip.rows.items()}


class AudioEvaluator(Evaluator):
    """Evaluates whole clips at batch size 1. Subclasses state `row_names`, `build_dataset` and `clip`."""

    arguments_class = AudioEvaluationArguments
    row_names: dict[str, str]  # row -> its label in the table; "model" is the evaluated one
    title: str
    definitions: ClassVar[dict[str, str]] = DEFINITIONS

    def clip(self, dataset: Any, index: int) -> Clip:
        """The waveforms of all rows for one sample."""
        raise NotImplementedError

    def __init__(self, args: Any, checkpoint: Path):
        super().__init__(args, checkpoint)
        self.settings: MelSettings = self.model.config.mel
        self.scorer = ClipScorer(self.settings, args.metrics, args.transcript_language)
        self.speed = RealTime(self.device)

    def griffin_lim(self, row: str, mel: Tensor) -> Tensor:
        """The waveform (S,) of a log-mel (M, F) by Griffin-Lim; its time counts for the row."""
        seconds = mel.shape[1] * self.settings.hop_length / self.settings.sample_rate
        mel = mel[None].to(self.device)  # (1, M, F)
        return self.speed.run(row, seconds, lambda: griffin_lim(mel, self.settings, GRIFFIN_LIM_ITERATIONS))[0].cpu()

    def autocast(self) -> torch.autocast:
        """bfloat16 autocast, if asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def finite(self, output: Tensor, entry: dict[str, Any], checkpoint: Path | None = None) -> Tensor:
        """The output of a checkpoint, by default the evaluated one, in fp32 on the CPU.

        Raises: ValueError: it is not finite; names checkpoint and sample.
        """
        if not output.isfinite().all():
            raise ValueError(
                f"{checkpoint or self.checkpoint} generates values that are not finite for {entry['key']}; the "
                "weights are broken"
            )
        return output.float().cpu()

    def measure(self, dataset, indices):
        # Clips of the contact sheet, evenly spaced.
        on_sheet = {indices[i] for i in evenly_spaced(len(indices), self.args.contact_sheet)}
        values: dict[str, list[Scores]] = {}  # by row: scores of every clip
        transcripts: list[dict[str, Any]] = []
        examples: list[tuple[Clip, Scores]] = []
        # One clip at a time: waveforms of all rows, their scores, and their words.
        for index in reported(indices, "all rows and their metrics", len(indices), "clips"):
            clip = self.clip(dataset, index)
            scores = self.scorer.score(clip)
            for name, row in scores.items():
                values.setdefault(name, []).append(row)
            recognized = self.scorer.transcribe(clip)
            if recognized:
                transcripts.append({"key": clip.entry["key"], "text": clip.entry["caption"], **recognized})
            if index in on_sheet:
                examples.append((clip, scores["model"]))
        return self.report(values, transcripts, examples)

    def report(self, values, transcripts, examples) -> Evaluation:
        """Scores as metrics, scalars, tables, audio and the contact sheet.

        Args:
            values: row -> scores of every clip.
            transcripts: recognised text of every row, for the clips that have one.
            examples: clips of the contact sheet with the model's scores.
        """
        # Means over clips; the word error rate is a ratio of sums over clips.
        scores = {name: means(rows) for name, rows in values.items()}
        counts = {name: counts_of(rows) for name, rows in values.items()}
        if self.scorer.n_other:
            logger.warning("no WER for %d clips, which are not English: %s", self.scorer.n_other, RECOGNIZER_NAME)
        for name, row in scores.items():
            if transcripts:
                recognized, texts = ([transcript[key] for transcript in transcripts] for key in (name, "text"))
                row["wer"], counts[name]["wer"] = word_error_rate(recognized, texts), len(transcripts)
            row["real_time_factor"] = self.speed.factor(name)
        # Without transcripts there is no word error rate, which is no error.
        if "wer" in self.args.metrics and not transcripts:
            logger.warning("no word error rate: no clip has a transcript of %d words or more", MIN_WORDS)
        # The report: scores in metrics.json, those of the model in TensorBoard, all of them in the table.
        doubtful = next(iter(scores.values())).get("wer") or 0.0
        if doubtful > DOUBTFUL_WER:
            told = "the transcripts may be of another language, see --transcript_language"
            logger.warning("%s: a WER of %.2f on the reference: %s", RECOGNIZER_NAME, doubtful, told)
        n_clips = len(values["model"])
        # Size, log-mel and speed of the model.
        model = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "mel": self.settings.as_dict(),
            "real_time_factor": scores["model"]["real_time_factor"],
        }
        metrics = {
            "scores": scores,
            "n_clips_defined": counts,  # a mean over few clips is to be read with care
            "reference": next(iter(scores)),
            "model": model,
            "transcripts": transcripts,
            "not_measured": self.scorer.not_measured,
            "recognizer": {"name": RECOGNIZER_NAME, "language": "en", "n_other_languages": self.scorer.n_other},
        }
        scalars = {name: value for name, value in scores["model"].items() if value is not None}
        evaluation = Evaluation(metrics, scalars, [self.score_table(scores, n_clips, len(transcripts))])
        if examples:
            # The sheet, and the waveforms of all rows for the same clips.
            evaluation.images["contact_sheet.png"] = self.contact_sheet(examples, n_clips)
            for clip, _ in examples:
                for name, waveform in clip.rows.items():
                    evaluation.audio[f"{clip.entry['key']}_{name}"] = (waveform, self.settings.sample_rate)
        return evaluation

    def score_table(self, scores: dict[str, Scores], n_clips: int, n_recognized: int) -> Table:
        """One row per system, with notes on the metrics that were measured."""
        reference = next(iter(scores))
        unit = "CPU seconds of one thread" if self.device.type == "cpu" else "GPU seconds"
        notes = {
            "mel_l1": "mel-L1, MCD: compared with the log-mels of the data.",
            "pesq_wb_starts": "4 starts: mean PESQ after removing 0, 4, 8, 12 ms.",
            "periodicity_rmse": "period.: RMSE of the periodicity.",
            "wer": self.words_note(n_recognized, scores[reference].get("wer")),
            "real_time_factor": f"RTF: {unit} per second of audio.",
        }
        # Notes on the metrics that some row has.
        measured = [note for name, note in notes.items() if any(row.get(name) is not None for row in scores.values())]
        unmeasured = list(self.scorer.not_measured.values())
        if self.scorer.n_other and not n_recognized:  # Otherwise the note on the metric says it.
            unmeasured.append(self.words_note(0, None))
        return score_table(
            scores,
            COLUMNS,
            title=f"{self.title}, {n_clips} clips",
            names=self.row_names,
            reference=reference,
            caption=" ".join([f"All rows compared with: {self.row_names[reference]}.", *measured, *unmeasured]),
        )

    def words_note(self, n_recognized: int, reference: float | None) -> str:
        """What the word error rates are measured on, and whether they can be trusted.

        Args: reference: that of the recordings.
        """
        note = f"WER: {n_recognized} clips with {MIN_WORDS} words or more, {RECOGNIZER_NAME}."
        if self.scorer.n_other:
            note += f" {self.scorer.n_other} clips are not English and have none."
        if reference is not None and reference > DOUBTFUL_WER:
            note += f" {reference:.2f} on the reference: are the transcripts English, and theirs?"
        return note

    def contact_sheet(self, examples: list[tuple[Clip, Scores]], n_clips: int) -> Image.Image:
        """One row per clip: target log-mel, the model's, their difference."""
        # All clips have the same time scale.
        max_frames = max(clip.mel.shape[1] for clip, _ in examples)
        groups = []
        for clip, scores in examples:
            # The caption of a row: scores of the model, then the transcript or the key.
            shown = [
                f"{COLUMNS[name].title} {COLUMNS[name].cell(scores, name)}"
                for name in ("pesq_wb", "stoi", "mel_l1")
                if scores.get(name) is not None
            ]
            caption = "  ".join([*shown, clip.entry["caption"] or clip.entry["key"]])
            images = mel_triple(clip.predicted, clip.mel, self.settings, max_frames=max_frames)
            groups.append(Group(images, caption))
        title = f"{home_of(self.checkpoint).name}, step {self.step}: log-mels of {len(examples)} of {n_clips} clips"
        return strip_sheet(groups, TRIPLE, title=title)


def counts_of(rows: Sequence[Scores]) -> dict[str, int]:
    """Score -> number of clips for which it is defined."""
    return {name: sum(row[name] is not None for row in rows) for name in rows[0]}


def means(rows: Sequence[Scores]) -> Scores:
    """Score -> mean over the clips for which it is defined; None where there are none."""
    defined = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: statistics.fmean(values) if values else None for name, values in defined.items()}
