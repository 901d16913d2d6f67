"""Evaluation of captions to sound: sounds for held-out captions, compared with the real ones and with their captions.

N sounds, D features, L latent frames, Z latent channels, M mel bins, F mel frames.
"""

import dataclasses
import logging
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from dataset_loading.audio.latents import AudioLatentDataset, collate_audio_latents
from dataset_loading.cached import evenly_spaced
from utils.console.progress import reported
from utils.drawing.alignment import aligned_mel
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group
from utils.evaluation.arguments.audio import CaptionEvaluationArguments
from utils.evaluation.audio_pipeline import AudioPipelineEvaluator
from utils.evaluation.captioned_sounds_report import DEFINITIONS, ROW_NAMES, curve_table, sound_table
from utils.evaluation.evaluator import Evaluation
from utils.evaluation.generated_images import agreement_scores
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments
from utils.generation.captions import CaptionPipeline
from utils.generation.exported import home_of
from utils.metrics.caption_agreement import (
    TextProbe,
    UnusableCaptionsError,
    chance_of,
    describe_few,
    other_captions,
)
from utils.metrics.feature_sets import compare_sets, memorisation
from utils.metrics.sounds import sound_blocks, sound_features
from utils.metrics.timing import Stopwatch
from utils.seeds import seed_of

logger = logging.getLogger(__name__)

N_PERMUTATIONS = 20  # of captions, for the row `shuffled`


class CaptionEvaluator(AudioPipelineEvaluator):
    """Makes one sound per held-out caption, as long as the real one. Noise depends on --seed and the clip's key."""

    arguments_class = CaptionEvaluationArguments
    pipeline_class = CaptionPipeline
    definitions: ClassVar[dict[str, str]] = DEFINITIONS

    def load_model(self):
        return super().load_model(text_encoder=self.args.text_encoder)

    def build_dataset(self):
        """The held-out clips; also opens the training clips."""
        folder, split = self.cache()
        names = ("conditioning", "vae_fingerprint", "text_encoder_fingerprint")
        expected = {name: self.record["latents"][name] for name in names}
        self.training, dataset = (
            AudioLatentDataset(folder, name).expect(vae_checkpoint=self.args.vae_checkpoint, **expected)
            for name in ("train", split)
        )
        return dataset

    # ---- Sounds.

    def decoded(self, dataset: AudioLatentDataset, indices: Sequence[int]) -> Iterator[Tensor]:
        """Log-mels (M, F) of real clips: their latents, decoded."""
        starts = range(0, len(indices), self.args.batch_size)
        name = "training sounds" if dataset is self.training else "held-out sounds"
        for start in reported(starts, f"decoded {name}", len(starts), "batches"):
            batch = collate_audio_latents([dataset[index] for index in indices[start : start + self.args.batch_size]])
            yield from self.pipeline.decode(batch["latents"].to(self.device), batch["n_mel_frames"].to(self.device))

    def generated(self, entries: Sequence[dict[str, Any]], settings: Any, watch: Stopwatch) -> Iterator[Tensor]:
        """Log-mels (M, F) made for the captions of clips, each as long as its clip."""
        starts, name = range(0, len(entries), self.args.batch_size), f"generated sounds, {settings.n_steps} steps"
        for start in reported(starts, name, len(starts), "batches"):
            batch = entries[start : start + self.args.batch_size]
            inputs = self.pipeline.text_inputs([entry["caption"] for entry in batch])
            n_frames = torch.tensor([entry["mel_frames"] for entry in batch], device=self.device)
            seeds = [seed_of(self.args.seed, entry["key"]) for entry in batch]

            def sample(seeds, inputs=inputs, n_frames=n_frames):
                latents = self.pipeline.latents(inputs, n_frames, seeds, settings)
                return self.pipeline.decode(latents, n_frames)

            yield from watch.time(sample, seeds)

    # ---- Scores.

    def measure(self, dataset, indices):
        entries = [dataset.entries[index] for index in indices]
        captions, on_sheet = (
            [entry["caption"] for entry in entries],
            evenly_spaced(len(indices), self.args.contact_sheet),
        )
        # The probe is fitted to training clips as the VAE decodes them.
        chosen = evenly_spaced(len(self.training), self.args.training_samples or len(self.training))
        training = torch.stack([sound_features(mel) for mel in self.decoded(self.training, chosen)])
        problem = ""
        try:
            texts = [self.training.entries[index]["caption"] for index in chosen]
            self.probe = TextProbe(training, texts, sound_blocks(self.settings.n_mels))
        except UnusableCaptionsError as error:
            self.probe, problem = None, f"{self.training.folder}: {error}"
            logger.warning("agreement with the captions cannot be measured: %s", problem)
        if self.probe and (remark := describe_few(captions)):
            logger.warning("%s", remark)
        # Features are standardised for distances, so that no block outweighs the others.
        self.center, self.scale = training.mean(0), training.std(0).clamp_min(1e-6)
        watch = Stopwatch(self.device)
        mels = {
            "reconstruction": list(self.decoded(dataset, indices)),
            "generated": list(self.generated(entries, self.args, watch)),
        }
        features = {name: torch.stack([sound_features(mel) for mel in rows]) for name, rows in mels.items()}
        metrics = {
            "scores": self.scores(features, training, captions),
            "memorisation": memorisation(
                *(self.standardise(rows) for rows in (features["generated"], features["reconstruction"], training))
            ),
            "captions": self.describe_captions(captions, problem),
            "sampling": {**self.sampling(self.args), "seed": self.args.seed},
            "model": {
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "mel": self.settings.as_dict(),
                "vocoder": self.vocoder_name,
                "seconds_per_sound": 1 / watch.per_second(),
                "batch_size": self.args.batch_size,
            },
        }
        evaluation = Evaluation(metrics, self.scalars(metrics), [sound_table(metrics, len(entries))])
        self.add_examples(evaluation, mels, entries, on_sheet)
        if self.args.curve:
            self.measure_curve(evaluation, entries, features["reconstruction"])
        return evaluation

    def standardise(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D) with the mean and std of the training clips."""
        return (features - self.center) / self.scale

    def sampling(self, settings: Any) -> dict[str, Any]:
        """The sampling flags as JSON values."""
        return {field.name: getattr(settings, field.name) for field in dataclasses.fields(AudioSamplingArguments)}

    def describe_captions(self, captions: Sequence[str], problem: str) -> dict[str, Any]:
        """How many captions were evaluated, and what the probe knows."""
        known = {"n_words": len(self.probe.words), "explained": self.probe.explained} if self.probe else {}
        remark = describe_few(captions) if self.probe else ""
        return {"n_distinct": len(set(captions)), **known, "problem": problem, "remark": remark}

    def scores(
        self, features: dict[str, Tensor], training: Tensor, captions: Sequence[str]
    ) -> dict[str, dict[str, float | None]]:
        """The rows of the table.

        Args:
            features: of the held-out clips by row, (N, D).
            training: of training clips, (T, D).
        """
        target, scores = self.standardise(features["reconstruction"]), {}
        # As many training clips as held-out ones: the scores of another sample of real sounds.
        same_size = training[evenly_spaced(len(training), len(captions))]
        if len(same_size) == len(target):
            scores["training"] = compare_sets(self.standardise(same_size), target)
        for name, rows in features.items():
            distances = {} if name == "reconstruction" else compare_sets(self.standardise(rows), target)
            scores[name] = {**distances, **agreement_scores(self.probe, rows, captions)}
        # Baselines of the agreement: wrong captions, and random guessing.
        n_distinct = len(set(captions))
        if self.probe and n_distinct > 1:
            # Of several permutations, since a single one of few captions is hardly more than chance.
            shuffled = [other_captions(captions, self.args.seed + number) for number in range(N_PERMUTATIONS)]
            rows = [agreement_scores(self.probe, features["generated"], others) for others in shuffled]
            means = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
            scores["shuffled"] = {name: statistics.mean(values) for name, values in means.items() if values}
            scores["chance"] = {"agreement": chance_of(captions), "words": 0.5}
        return scores

    def scalars(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Numbers for TensorBoard."""
        scores = metrics["scores"]
        scalars = dict(scores["generated"])
        scalars["agreement_shuffled"] = scores.get("shuffled", {}).get("agreement")
        scalars |= {f"memorisation_{name}": value for name, value in metrics["memorisation"].items()}
        scalars["seconds_per_sound"] = metrics["model"]["seconds_per_sound"]
        return {name: value for name, value in scalars.items() if value is not None}

    def add_examples(self, evaluation: Evaluation, mels: dict[str, list[Tensor]], entries, on_sheet) -> None:
        """Waveforms of some clips, real and generated, and the sheet of their log-mels."""
        for position in on_sheet:
            for name, rows in mels.items():
                waveform = self.pipeline.vocode(rows[position])
                evaluation.audio[f"{entries[position]['key']}_{name}"] = (waveform, self.settings.sample_rate)
        if on_sheet:
            evaluation.images["contact_sheet.png"] = self.contact_sheet(mels, entries, on_sheet)

    def contact_sheet(self, mels: dict[str, list[Tensor]], entries, on_sheet: Sequence[int]) -> Image.Image:
        """One row per clip: the real log-mel beside the generated one."""
        longest = max(entries[position]["mel_frames"] for position in on_sheet)
        nothing = torch.zeros(0, dtype=torch.long)
        groups = [
            Group(
                [aligned_mel(rows[position], nothing, self.settings, max_frames=longest) for rows in mels.values()],
                entries[position]["caption"],
            )
            for position in on_sheet
        ]
        title = f"{home_of(self.checkpoint).name}, step {self.step}: sounds of {len(on_sheet)} held-out captions"
        return strip_sheet(groups, [ROW_NAMES[name] for name in mels], title=title)

    def measure_curve(self, evaluation: Evaluation, entries: Sequence[dict[str, Any]], target: Tensor) -> None:
        """Add every combination of guidance scale and steps.

        Args: target: features of the real clips, (N, D).
        """
        points, captions = [], [entry["caption"] for entry in entries]
        for scale in self.args.curve_scales:
            for n_steps in self.args.curve_steps:
                settings = dataclasses.replace(self.args, n_steps=n_steps, guidance_scale=scale)
                watch = Stopwatch(self.device)
                rows = torch.stack([sound_features(mel) for mel in self.generated(entries, settings, watch)])
                distances = compare_sets(self.standardise(rows), self.standardise(target))
                point = {**distances, **agreement_scores(self.probe, rows, captions)}
                seconds = {"seconds_per_sound": 1 / watch.per_second()}
                points.append({"guidance_scale": scale, "n_steps": n_steps, **point, **seconds})
                for name in ("agreement", "kid"):
                    if point[name] is not None:
                        curve = evaluation.curves.setdefault(f"curve_{name}/guidance_{scale:g}", {})
                        curve[n_steps] = point[name]
        evaluation.metrics["curve"] = {"n_samples": len(entries), "points": points}
        evaluation.tables = [*evaluation.tables, curve_table(points, len(entries))]
