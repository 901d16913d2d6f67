"""Evaluation of text to speech: how well held-out texts and new sentences are understood, in whose voice, how lively.

S samples, M mel bins, F mel frames, L latent frames, Z latent channels, T tokens.
"""

import dataclasses
import itertools
import logging
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from dataset_loading.audio.latents import AudioLatentDataset, collate_audio_latents
from dataset_loading.cached import evenly_spaced
from dataset_loading.embedded.sentences import SENTENCES
from utils.console.progress import reported
from utils.drawing.alignment import MARKS, aligned_mel
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group
from utils.evaluation.arguments.audio import AudioDiffusionEvaluationArguments
from utils.evaluation.audio import MIN_WORDS, Scores, counts_of, means
from utils.evaluation.audio_diffusion_report import (
    DEFINITIONS,
    ROW_NAMES,
    curve_table,
    curves_by_steps,
    model_table,
    speech_table,
    voice_table,
)
from utils.evaluation.audio_pipeline import AudioPipelineEvaluator
from utils.evaluation.captioned_sounds import CaptionEvaluator
from utils.evaluation.evaluator import Evaluation
from utils.evaluation.recordings import Recordings
from utils.evaluation.speech_scores import SpeechScorer, Utterance, is_english, next_texts, recognition_scores
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments
from utils.generation.exported import home_of
from utils.generation.speech import SpeechPipeline
from utils.metrics.pitch import pitch_statistics, track_pitch
from utils.metrics.timing import RealTime
from utils.metrics.words import normalize_text
from utils.seeds import seed_of

logger = logging.getLogger(__name__)

N_TIMED = 6  # clips whose time is measured; the first one is a warm-up
SHEET = ("vae", "teacher", "model", "prior")  # rows whose log-mels are drawn


class AudioDiffusionEvaluator(AudioPipelineEvaluator):
    """Speaks held-out texts and new sentences. The noise of a clip depends on --seed and its key alone."""

    arguments_class = AudioDiffusionEvaluationArguments
    pipeline_class = SpeechPipeline
    definitions: ClassVar[dict[str, str]] = DEFINITIONS

    @classmethod
    def of(cls, record):
        return CaptionEvaluator if record["latents"]["conditioning"] == "caption" else cls

    def load_model(self):
        model = super().load_model()
        self.tokenizer = self.pipeline.tokenizer
        self.speed = RealTime(self.device)
        # The recogniser knows English alone.
        tokenizer, metrics = self.tokenizer, list(self.args.metrics)
        languages = tokenizer.known_languages
        self.english = next((language for language in languages if is_english(tokenizer, language)), None)
        if "wer" in metrics and self.english is None:
            languages = ", ".join(languages)
            logger.warning("no word error rate: language=%s, the recogniser knows English alone", languages)
            metrics.remove("wer")
        self.scorer = SpeechScorer(self.settings, metrics)
        return model

    def build_dataset(self):
        """The held-out clips; also opens their recordings."""
        folder, split = self.cache()
        latents, dataset = self.record["latents"], AudioLatentDataset(folder, split)
        names = ("conditioning", "vae_fingerprint", "symbols_fingerprint")
        dataset.expect(vae_checkpoint=self.args.vae_checkpoint, **{name: latents[name] for name in names})
        self.recordings = None
        if self.args.waveforms:
            self.recordings = Recordings(self.args.waveforms, self.settings, f"the VAE of {self.checkpoint}")
        else:
            logger.warning(
                "no rows of recordings and of the vocoder alone: a cache of latents holds no waveforms. Give "
                "--waveforms a folder of the same clips made by preprocess_audio_vocoder_dataset.py"
            )
        # New sentences are English: those speak them who speak English in some clip.
        clips = [clip for rows in dataset.manifest["entries"].values() for clip in rows]
        speakers = {clip["speaker"] for clip in clips if is_english(self.tokenizer, dataset.language_of(clip))}
        self.english_speakers = [name for name in self.model.config.speakers if name in speakers]
        return dataset

    # ---- Waveforms.

    def voice_inputs(self, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """Places of speakers and languages among those the model knows; {} where it knows none.

        Raises: ValueError: the model does not know one.
        """
        config, inputs = self.model.config, {}
        names = {
            "speakers": [utterance.speaker for utterance in utterances],
            "languages": [self.tokenizer.language_of(utterance.language) for utterance in utterances],
        }
        for kind, known in (("speakers", config.speakers), ("languages", config.languages)):
            unknown = [name for name in names[kind] if name not in known] if known else []
            if unknown:
                raise ValueError(f"the model knows none of its {kind} as {unknown[0]!r}, only {', '.join(known)}")
            if known:
                inputs[kind] = torch.tensor([known.index(name) for name in names[kind]], device=self.device)
        return inputs

    def generate(
        self,
        inputs: dict[str, Tensor],
        utterances: Sequence[Utterance],
        settings: Any,
        durations: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-mel (M, F) and durations (T,) of every text, see `SpeechPipeline.latents`."""
        seeds = [seed_of(self.args.seed, utterance.key) for utterance in utterances]
        latents, durations = self.pipeline.latents(inputs, seeds, settings, durations=durations)
        mels = self.pipeline.decode(latents, durations.sum(1), [utterance.speaker for utterance in utterances])
        return list(zip(mels, durations.cpu()))

    def held_out(self, dataset: AudioLatentDataset, indices: Sequence[int], partners: Sequence[int | None]):
        """Utterances of a batch of clips in all rows.

        Args: partners: the clip whose text each one has in the row `shuffled`; None where all texts are equal.
        """
        entries = [dataset.entries[index] for index in indices]
        utterances = [
            Utterance(entry["key"], entry["caption"], entry["speaker"], dataset.language_of(entry))
            for entry in entries
        ]
        batch = collate_audio_latents([dataset[index] for index in indices])
        batch = {name: value.to(self.device) for name, value in batch.items()}
        voices = self.voice_inputs(utterances)
        inputs = {**{name: batch[name] for name in ("tokens", "n_tokens")}, **voices}
        # Log-mels of the rows that go through the VAE.
        durations, wanted = batch["durations"], self.args.rows
        mels = self.pipeline.decode(batch["latents"], durations.sum(1), [entry["speaker"] for entry in entries])
        rows = {"vae": list(zip(mels, durations.cpu()))}
        if "teacher" in wanted:
            rows["teacher"] = self.generate(inputs, utterances, self.args, durations)
        rows["model"] = self.generate(inputs, utterances, self.args)
        if "prior" in wanted:
            rows["prior"] = self.generate(inputs, utterances, dataclasses.replace(self.args, n_steps=0))
        if "shuffled" in wanted and None not in partners:
            others = collate_audio_latents([dataset[index] for index in partners])
            text = {name: others[name].to(self.device) for name in ("tokens", "n_tokens")}
            rows["shuffled"] = self.generate({**text, **voices}, utterances, self.args)
        # Waveforms, the recordings first.
        for position, (utterance, entry) in enumerate(zip(utterances, entries)):
            if self.recordings is not None:
                sample = self.recordings.find(entry)
                utterance.rows["recording"] = sample["waveform"]
                if "vocoder" in wanted:
                    utterance.rows["vocoder"] = self.pipeline.vocode(sample["mel"])
            for name, spoken in rows.items():
                utterance.rows[name] = self.pipeline.vocode(spoken[position][0])
                utterance.mels[name] = spoken[position]
        return utterances

    def new_sentences(self) -> list[Utterance]:
        """The sentences in the row `sentences`, spoken by the speakers in turn."""
        if self.english is None:
            return []
        texts = [SENTENCES[i] for i in evenly_spaced(len(SENTENCES), self.args.sentences)]
        # The voice of those who trained a model without speakers is that of the clips.
        names = self.english_speakers or [next(iter(self.scorer.voices), "")]
        utterances = [
            Utterance(f"sentence_{number:02d}", text, names[number % len(names)], self.english)
            for number, text in enumerate(texts)
        ]
        for start in range(0, len(utterances), self.args.batch_size):
            batch = utterances[start : start + self.args.batch_size]
            for utterance, (mel, _) in zip(batch, self.generate(self.text_inputs(batch), batch, self.args)):
                utterance.rows["sentences"] = self.pipeline.vocode(mel)
        return utterances

    def text_inputs(self, utterances: Sequence[Utterance]) -> dict[str, Tensor]:
        """The model's inputs for texts without aligned tokens."""
        rows = [self.tokenizer.encode(utterance.text, utterance.language, nearest=True) for utterance in utterances]
        return {**self.pipeline.token_inputs(rows), **self.voice_inputs(utterances)}

    def time_speech(self, name: str, utterances: Sequence[Utterance], settings: Any) -> None:
        """Measure text to waveform at batch size 1 on the first utterances, under a name."""

        def speak(utterance: Utterance) -> Tensor:
            ((mel, _),) = self.generate(self.text_inputs([utterance]), [utterance], settings)
            return self.pipeline.vocode(mel)

        timed = utterances[:N_TIMED]
        for utterance in reported(timed, f"speed of {name}", len(timed), "clips"):
            seconds = lambda waveform: len(waveform) / self.settings.sample_rate  # noqa: E731
            self.speed.run(name, seconds, lambda utterance=utterance: speak(utterance))

    # ---- Scores.

    def recognize(self, waveform: Tensor) -> str:
        """The recognised text of a waveform (S,)."""
        return self.scorer.recognizer.transcribe(waveform, self.settings.sample_rate)

    def measure(self, dataset, indices):
        reference = "vae" if self.recordings is None else "recording"
        texts = [dataset.entries[index]["caption"] for index in indices]
        if self.args.curve and not any(len(normalize_text(text)) >= MIN_WORDS for text in texts):
            raise ValueError(f"--curve needs clips whose text has {MIN_WORDS} words or more; these samples have none")
        languages = [dataset.language_of(dataset.entries[index]) for index in indices]
        partners = [None if i is None else indices[i] for i in next_texts(texts, languages)]
        on_sheet = {indices[i] for i in evenly_spaced(len(indices), self.args.contact_sheet)}
        values: dict[str, list[Scores]] = {}
        seconds: dict[str, float] = {}
        transcripts: list[dict[str, str]] = []
        examples: list[Utterance] = []
        spoken: list[Utterance] = []  # texts without their waveforms, for speed and curve

        def score(utterance: Utterance, compared_with: str) -> None:
            for name, row in self.scorer.score_speech(utterance, compared_with).items():
                values.setdefault(name, []).append(row)
                seconds[name] = seconds.get(name, 0.0) + len(utterance.rows[name]) / self.settings.sample_rate
            if "wer" in self.scorer.metrics and is_english(self.tokenizer, utterance.language):
                recognized = {name: self.recognize(waveform) for name, waveform in utterance.rows.items()}
                speaker = {"speaker": utterance.speaker} if self.model.config.speakers else {}
                transcripts.append({"key": utterance.key, "text": utterance.text, **speaker, **recognized})

        # Held-out clips, batch by batch, so that few waveforms are held at once; then the new sentences.
        batches = [
            slice(start, start + self.args.batch_size) for start in range(0, len(indices), self.args.batch_size)
        ]
        clips = (
            clip
            for batch in batches
            for clip in zip(indices[batch], self.held_out(dataset, indices[batch], partners[batch]))
        )
        for index, utterance in reported(clips, "rows of held-out clips", len(indices), "clips"):
            score(utterance, reference)
            spoken.append(Utterance(utterance.key, utterance.text, utterance.speaker, utterance.language))
            examples += [utterance] if index in on_sheet else []
        sentences = self.new_sentences()
        for utterance in reported(sentences, "row of new sentences", len(sentences), "sentences"):
            score(utterance, "")
        self.time_speech("model", spoken, self.args)
        if "prior" in self.args.rows:
            self.time_speech("prior", spoken, dataclasses.replace(self.args, n_steps=0))
        self.time_speech("sentences", sentences, self.args)

        scores = {name: self.row_scores(name, rows, transcripts) for name, rows in values.items()}
        for name, row in scores.items():
            row["length_ratio"] = None if name == "sentences" else seconds[name] / seconds[reference]
            recognized = list(itertools.chain.from_iterable(self.scorer.recognized_voices(name).values()))
            row["voice_accuracy"] = statistics.mean(recognized) if recognized else None
        counts = {name: counts_of(rows) for name, rows in values.items()}
        evaluation = self.report(scores, counts, transcripts, reference=reference, n_clips=len(indices))
        if len(self.model.config.speakers) > 1:
            self.add_voices(evaluation, transcripts)
        self.add_examples(evaluation, [*examples, *sentences[: self.args.contact_sheet]], len(indices))
        if self.args.curve:
            self.measure_curve(evaluation, spoken)
        return evaluation

    def row_scores(self, name: str, rows: Sequence[Scores], transcripts: Sequence[dict[str, str]]) -> dict[str, Any]:
        """Means over clips, error rates and speed of one row."""
        pairs = [(transcript[name], transcript["text"]) for transcript in transcripts if name in transcript]
        recognized = recognition_scores(*map(list, zip(*pairs)), self.args.seed) if pairs else {}
        return {**means(rows), **recognized, "real_time_factor": self.speed.factor(name)}

    def report(self, scores, counts, transcripts, *, reference: str, n_clips: int) -> Evaluation:
        """Metrics, scalars of the model's rows, and tables."""
        sampling = {field.name: getattr(self.args, field.name) for field in dataclasses.fields(AudioSamplingArguments)}
        sampling |= {"seed": self.args.seed, "temperature": self.pipeline.temperature_of(self.args)}
        model = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "mel": self.settings.as_dict(),
            "vocoder": self.vocoder_name,
            "real_time_factor": scores["model"]["real_time_factor"],
        }
        metrics = {
            "scores": scores,
            "n_clips_defined": counts,
            "reference": reference,
            "sampling": sampling,
            "model": model,
            "transcripts": transcripts,
            "not_measured": self.scorer.not_measured,
        }
        # In TensorBoard: all numbers of the model, and the error rates of the other rows.
        scalars = {name: value for name, value in scores["model"].items() if isinstance(value, int | float)}
        for name, row in scores.items():
            scalars |= {f"{name}_{key}": row[key] for key in ("wer", "wer_all") if name != "model" and key in row}
        notes = self.scorer.not_measured.values()
        tables = [
            speech_table(scores, reference, n_clips=n_clips, notes=list(notes)),
            model_table(model, sampling),
        ]
        return Evaluation(metrics, scalars, tables)

    def add_voices(self, evaluation: Evaluation, transcripts: Sequence[dict[str, str]]) -> None:
        """One row per speaker: error rates and recognised voice of what the model spoke, held-out clips and new
        sentences."""
        voices: dict[str, Any] = {}
        for name in ("model", "sentences"):
            recognized = self.scorer.recognized_voices(name)
            for speaker in self.model.config.speakers:
                rows = [row for row in transcripts if row["speaker"] == speaker and name in row]
                pairs = [(row[name], row["text"]) for row in rows]
                errors = recognition_scores(*map(list, zip(*pairs)), self.args.seed) if pairs else {}
                own = recognized.get(speaker, [])
                accuracy = {"voice_accuracy": statistics.mean(own), "n_voices": len(own)} if own else {}
                voices.setdefault(speaker, {})[name] = {**errors, **accuracy}
        evaluation.metrics["voices"] = voices
        evaluation.tables = [*evaluation.tables, voice_table(voices)]

    def add_examples(self, evaluation: Evaluation, examples: Sequence[Utterance], n_clips: int) -> None:
        """Waveforms of all rows, and the sheet of log-mels with the ends of tokens."""
        for utterance in examples:
            for name, waveform in utterance.rows.items():
                evaluation.audio[f"{utterance.key}_{name}"] = (waveform, self.settings.sample_rate)
        with_mels = [utterance for utterance in examples if utterance.mels]
        if with_mels:
            evaluation.images["contact_sheet.png"] = self.contact_sheet(with_mels, n_clips)

    def contact_sheet(self, examples: Sequence[Utterance], n_clips: int) -> Image.Image:
        """One row per clip, see `SHEET`."""
        names = [name for name in SHEET if name in examples[0].mels]
        longest = max(utterance.mels[name][0].shape[1] for utterance in examples for name in names)
        mel = self.settings
        groups = [
            Group([aligned_mel(*utterance.mels[name], mel, max_frames=longest) for name in names], utterance.text)
            for utterance in examples
        ]
        run = home_of(self.checkpoint).name
        title = f"{run}, step {self.step}: log-mels of {len(examples)} of {n_clips} clips; {MARKS}"
        return strip_sheet(groups, [ROW_NAMES[name] for name in names], title=title)

    def measure_curve(self, evaluation: Evaluation, spoken: Sequence[Utterance]) -> None:
        """Add every combination of guidance scale and steps, on clips of enough words."""
        args, points = self.args, []
        usable = [utterance for utterance in spoken if len(normalize_text(utterance.text)) >= MIN_WORDS]
        usable = [usable[i] for i in evenly_spaced(len(usable), args.curve_samples)]
        for scale in args.curve_scales:
            for n_steps in args.curve_steps:
                settings = dataclasses.replace(args, n_steps=n_steps, guidance_scale=scale)
                rows, transcripts = [], []
                starts, title = range(0, len(usable), args.batch_size), f"curve, guidance {scale:g}, {n_steps} steps"
                for start in reported(starts, title, len(starts), "batches"):
                    batch = usable[start : start + args.batch_size]
                    for utterance, (mel, _) in zip(batch, self.generate(self.text_inputs(batch), batch, settings)):
                        waveform = self.pipeline.vocode(mel)
                        is_voiced = "pitch" in self.scorer.metrics
                        rows.append(
                            pitch_statistics(track_pitch(waveform, self.settings.sample_rate)) if is_voiced else {}
                        )
                        if "wer" in self.scorer.metrics and is_english(self.tokenizer, utterance.language):
                            transcripts.append({"text": utterance.text, "curve": self.recognize(waveform)})
                name = f"curve {scale} {n_steps}"
                self.time_speech(name, usable, settings)
                point = {"guidance_scale": scale, "n_steps": n_steps, **self.row_scores("curve", rows, transcripts)}
                points.append({**point, "real_time_factor": self.speed.factor(name)})
        evaluation.metrics["curve"] = {"n_samples": len(usable), "points": points}
        evaluation.tables = [*evaluation.tables, curve_table(points, len(usable))]
        evaluation.curves |= curves_by_steps(points)
