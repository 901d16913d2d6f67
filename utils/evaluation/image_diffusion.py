"""Evaluation of text-to-image diffusion: images generated for held-out captions are compared with the real ones, also
over sampling settings.

N images, D features. Features of all images are held in memory, images are not.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import batches_of, in_order
from dataset_loading.image.buckets import Size
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion
from model.samplers import n_evaluations
from utils.console.progress import reported
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.arguments.image import ImageDiffusionEvaluationArguments
from utils.evaluation.evaluator import Evaluation, ImageEvaluator
from utils.evaluation.generated_images import (
    BatchedGenerator,
    PairedLatentDataset,
    agreement_scores,
    collate_images,
    image_set_scores,
    size_of_image,
)
from utils.evaluation.image_diffusion_report import (
    curve_sheet,
    curve_table,
    curves_by_steps,
    detail_table,
    generation_table,
)
from utils.evaluation.source_images import SourceImageDataset
from utils.evaluation.tables import FEATURE_COLUMNS
from utils.generation.arguments.image import SamplingArguments
from utils.generation.exported import home_of
from utils.generation.text_to_image import TextToImagePipeline
from utils.metrics.caption_agreement import (
    N_FEATURES,
    N_POOLED,
    ImageFeatures,
    TextProbe,
    UnusableCaptionsError,
    chance_of,
    describe_few,
    other_captions,
    words_of,
)
from utils.metrics.feature_sets import memorisation
from utils.metrics.timing import Stopwatch

logger = logging.getLogger(__name__)

N_COPIES = 3  # generated images per caption on the contact sheet


class ImageDiffusionEvaluator(ImageEvaluator):
    """Generates one image per held-out caption. Random numbers depend on --seed and the sample's key alone."""

    arguments_class = ImageDiffusionEvaluationArguments
    model_class = ImageDiffusion
    definitions: ClassVar[dict[str, str]] = {
        "reference": "The images with which the rows are compared. real: the raw images of the held-out samples, "
        "cropped or padded as in preprocessing, or those of --dataset. reconstruction: images decoded from the cached "
        "latents; used with --compare_with reconstruction, or if raw images cannot be read.",
        "rows": "real: the held-out images. training: the same number of training images, an upper bound. "
        "reconstruction: the held-out images after the VAE, an upper bound for this VAE. generated: images for the "
        "held-out captions. shuffled: the generated images with captions of other samples. chance: random guessing.",
        "frechet": f"Frechet distance of {N_POOLED} pooled EfficientNet-Lite0 features, of sets of equal size. "
        "Not comparable with FID, which uses Inception features. Biased upwards below "
        f"{2 * N_POOLED} images.",
        "sizes": "Images of aspect-ratio buckets are generated at the sizes of the held-out ones; for features they "
        "are resized to image_size x image_size pixels, as clean-fid does (arXiv 2104.11222).",
        "kid": "Squared maximum mean discrepancy of the same features with the kernel (x.y / 1280 + 1)^3, as "
        "U-statistic. Unbiased, may be negative. kid_error: its jackknife standard error.",
        "precision": "Improved precision (arXiv 1904.06991) of the same features with k = 3: share of images on the "
        "manifold of the reference images. Measures realism.",
        "recall": "Improved recall: share of reference images on the manifold of the images. Measures diversity.",
        "to_reconstruction": "frechet and kid of generated images compared with reconstructions, which excludes the "
        "error of the VAE.",
        "memorisation": "Distances to the nearest training image, all images decoded by the VAE. median_ratio: median "
        "over generated images divided by the median over held-out images. share_closer: share of generated images "
        "that are closer than 95 % of the held-out images; 0.05 is expected without memorisation.",
        "agreement": "Retrieval accuracy: share of images whose own caption is the most similar among all distinct "
        "evaluated captions, of which chance is one over their number. "
        "Similarity is the cosine of standardised word vectors; those of images are predicted by "
        "a probe, ridge regression on image features fitted to the training images and the words of at least 5 of "
        "their captions. captions: n_distinct evaluated captions, n_words in the probe's vocabulary, "
        "n_without_words evaluated captions without such a word, explained: share of the words' variance (R^2) that "
        "the probe predicts for held-out training captions, remark: where few distinct captions say little.",
        "words": "Area under the ROC curve of predicting whether a caption contains a word, mean over words; chance: "
        "0.5.",
        "seconds_per_image": "Time of text encoder, sampler and decoder. The first batch is excluded if there are "
        "several.",
    }

    def load_model(self):
        args = self.args
        pipeline = TextToImagePipeline.load(
            self.checkpoint, args.vae_checkpoint, args.text_encoder, weights=self.weights, device=self.device
        )
        extractor = ImageFeatures(self.features).to(self.device)
        self.generator = BatchedGenerator(
            pipeline, extractor, seed=args.seed, batch_size=args.batch_size, bf16=args.bf16
        )
        return pipeline.model

    def build_dataset(self):
        """The held-out samples. Also opens the training samples, for the probe and the nearest neighbours."""
        folder, split = self.cache()
        fingerprint = self.record["latents"]["vae_fingerprint"]
        splits = ["train"] if self.args.dataset else ["train", split]
        latents = {name: ImageLatentDataset(folder, name).expect(vae_fingerprint=fingerprint) for name in splits}
        # Compare with the raw images where both splits have them, otherwise with decoded latents.
        sources = self.open_sources(latents)
        self.reference = "real" if sources else "reconstruction"
        self.training = PairedLatentDataset(latents["train"], sources.get("train"))
        # Other captioned images, at the size of the training images; or the held-out split of the cache.
        if self.args.dataset:
            return self.open_images(latents["train"].manifest["settings"]["image_size"])
        return PairedLatentDataset(latents[split], sources.get(split))

    def open_sources(self, latents: dict[str, ImageLatentDataset]) -> dict[str, SourceImageDataset]:
        """The raw images of each split; empty where they cannot be read, or with --compare_with reconstruction."""
        if self.args.compare_with == "reconstruction":
            return {}
        try:
            return {name: SourceImageDataset(dataset) for name, dataset in latents.items()}
        except (OSError, ValueError) as error:
            if "compare_with" in self.args.given:  # Raw images were asked for.
                raise
            logger.warning("raw images cannot be read, comparing with reconstructions instead: %s", error)
            return {}

    def extract_features(self, dataset: Any, indices: Sequence[int], on_sheet: Sequence[int] = ()):
        """Features of real and reconstructed images, (N, D) by row, the images at the positions `on_sheet`, and the
        sizes of all."""
        features: dict[str, list[Tensor]] = {}
        examples: dict[int, list[Image.Image]] = {}
        sizes: list[Size] = []
        options = {"num_workers": self.args.num_workers, "collate_fn": collate_images}
        loader = DataLoader(Subset(dataset, indices), self.args.batch_size, **options)
        name = "training images" if dataset is self.training else "held-out images"
        for batch in reported(loader, f"features of {name}", len(loader), "batches"):
            # The rows of this batch, lists of images (3, Y, X).
            rows = {"reconstruction": self.generator.reconstruct(batch)}
            if self.reference == "real":
                real = [image.to(self.device) for part in batches_of(batch) for image in part["image"]]
                rows = {"real": in_order(batch, real), **rows}
            for name, images in rows.items():
                features.setdefault(name, []).append(self.generator.features_of(images))
            # Rows of the batch are transposed: the images of one sample, in the order of the rows.
            for images in zip(*rows.values()):
                if len(sizes) in on_sheet:
                    examples[len(sizes)] = [to_image(image) for image in images]
                sizes.append(size_of_image(images[0]))
        return {name: torch.cat(batches) for name, batches in features.items()}, examples, sizes

    def measure(self, dataset, indices):
        samples = [dataset.entries[index] for index in indices]  # dicts with `key` and `caption`
        on_sheet = distinct_captions(samples, self.args.contact_sheet)
        # The probe is fitted to training images and their captions.
        chosen = evenly_spaced(len(self.training), self.args.training_samples or len(self.training))
        training, *_ = self.extract_features(self.training, chosen)
        problem = ""
        try:
            self.probe = TextProbe(training[self.reference], [self.training.entries[i]["caption"] for i in chosen])
        except UnusableCaptionsError as error:
            self.probe, problem = None, f"{self.training.latents.folder}: {error}"
            logger.warning("agreement with the captions cannot be measured: %s", problem)
        # Features of the held-out images, of their reconstructions, and of images generated for their captions.
        rows, examples, sizes = self.extract_features(dataset, indices, on_sheet)
        samples = [{**sample, "size": size} for sample, size in zip(samples, sizes)]
        watch = Stopwatch(self.device)
        rows["generated"] = self.generator.features(samples, self.args, watch)
        captions = [sample["caption"] for sample in samples]
        if self.probe and (remark := describe_few(captions)):
            logger.warning("%s", remark)
        scores = self.scores(rows, training[self.reference], captions)
        pooled = {name: features[:, :N_POOLED] for name, features in rows.items()}  # (N, 1280)
        # The report: scores, memorisation, the captions, settings, size and speed.
        metrics = {
            "scores": scores,
            "reference": self.reference,
            "memorisation": {
                **memorisation(
                    pooled["generated"], pooled["reconstruction"], training["reconstruction"][:, :N_POOLED]
                ),
                "n_training": len(chosen),
            },
            "captions": {**self.describe_captions(captions), "problem": problem},
            # How the images were sampled, and at what cost.
            "sampling": {**self.args.settings(), "seed": self.args.seed},
            "model": {
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "latent_shape": list(self.model.latent_shape()),
                "n_evaluations": n_evaluations(self.args.sampler, self.args.n_steps),
                "seconds_per_image": 1 / watch.per_second(),
                "batch_size": self.args.batch_size,
            },
        }
        # Tables, the sheet, and the curve over sampling settings.
        tables = [generation_table(metrics, len(samples)), detail_table(metrics)]
        evaluation = Evaluation(metrics, self.scalars(metrics), tables)
        if on_sheet:
            evaluation.images["contact_sheet.png"] = self.contact_sheet(samples, on_sheet, examples)
        if self.args.curve:
            self.measure_curve(evaluation, samples, rows[self.reference])
        return evaluation

    def describe_captions(self, captions: Sequence[str]) -> dict[str, Any]:
        """How many captions were evaluated, and how well the probe knows their words."""
        words = set(self.probe.words) if self.probe else set()
        return {
            "n_distinct": len(set(captions)),
            "n_words": len(words),
            "n_without_words": sum(not words_of(caption) & words for caption in captions) if self.probe else 0,
            "explained": self.probe.explained if self.probe else None,
            "remark": describe_few(captions) if self.probe else "",
        }

    def scores(self, rows, training: Tensor, captions: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """The rows of the table.

        Args:
            rows: features of the held-out samples by row, (N, D).
            training: features of training images, (T, D).
        """
        target, reconstruction = rows[self.reference], rows["reconstruction"]
        scores: dict[str, dict[str, float | None]] = {}
        # As many training images as held-out ones: the scores of another sample of real images.
        same_size = training[evenly_spaced(len(training), len(captions))]
        if len(same_size) == len(target):
            scores["training"] = image_set_scores(same_size, target)
        for name, features in rows.items():
            distances = {} if name == self.reference else image_set_scores(features, target)
            scores[name] = {**distances, **self.caption_scores(features, captions)}
        # Distance from the reconstructions: the error of the diffusion model without that of the VAE.
        if self.reference == "real":
            without_vae = image_set_scores(rows["generated"], reconstruction)
            scores["generated"] |= {f"{name}_to_reconstruction": without_vae[name] for name in ("frechet", "kid")}
        n_distinct = len(set(captions))
        # Baselines of the agreement: wrong captions, and random guessing.
        if self.probe and n_distinct > 1:
            shuffled = other_captions(captions, self.args.seed)
            scores["shuffled"] = self.caption_scores(rows["generated"], shuffled)
            scores["chance"] = {"agreement": chance_of(captions), "words": 0.5}
        return scores

    def caption_scores(self, features: Tensor, captions: Sequence[str]) -> dict[str, float | None]:
        """Agreement of images with captions by the probe, and `clip_score` with a CLIP model in --features."""
        scores = agreement_scores(self.probe, features, captions)
        given = self.features.clip_score(features[:, N_FEATURES:], captions) if self.features else None
        return scores if given is None else {**scores, "clip_score": given}

    def scalars(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Numbers for TensorBoard."""
        names = ("frechet", "kid", "precision", "recall", "agreement", "words", *FEATURE_COLUMNS)
        scalars = {name: metrics["scores"]["generated"].get(name) for name in names}
        scalars["agreement_shuffled"] = metrics["scores"].get("shuffled", {}).get("agreement")
        scalars |= {f"memorisation_{name}": metrics["memorisation"][name] for name in ("median_ratio", "share_closer")}
        scalars["seconds_per_image"] = metrics["model"]["seconds_per_image"]
        return {name: value for name, value in scalars.items() if value is not None}

    def contact_sheet(self, samples, on_sheet, examples) -> Image.Image:
        """One row per caption: the real image, its reconstruction, and images generated with three seeds."""
        chosen = [samples[position] for position in on_sheet]
        # One list of images per copy, in the order of the captions.
        copies = [
            [to_image(image) for batch in self.generator.generate(chosen, self.args, copy=copy) for image in batch]
            for copy in range(N_COPIES)
        ]
        labels = (["real"] if self.reference == "real" else []) + ["reconstruction"] + ["generated"] * N_COPIES
        groups = [
            Group([*examples[position], *(images[row] for images in copies)], samples[position]["caption"])
            for row, position in enumerate(on_sheet)
        ]
        title = (
            f"{home_of(self.checkpoint).name}, step {self.step}: held-out captions; {self.args.sampler}, "
            f"{self.args.n_steps} steps, guidance {self.args.guidance_scale:g}"
        )
        return draw_sheet(groups, labels, n_across=min(2, len(groups)), title=title)

    def measure_curve(self, evaluation: Evaluation, samples, target: Tensor) -> None:
        """Add every combination of steps, guidance scale and sampler to the evaluation.

        Args: target: features of the reference images, (N, D).
        """
        args, points = self.args, []
        # A subset of the samples, the same for every point.
        chosen = evenly_spaced(len(samples), args.curve_samples)
        samples, target = [samples[i] for i in chosen], target[chosen]
        captions, shown = [sample["caption"] for sample in samples], {}
        for sampler in args.curve_samplers:
            for scale in args.curve_scales:
                for n_steps in args.curve_steps:
                    changes = {"sampler": sampler, "guidance_scale": scale, "n_steps": n_steps}
                    settings = SamplingArguments(**{**args.settings(), **changes})  # the other settings as given
                    watch = Stopwatch(self.device)
                    features = self.generator.features(samples, settings, watch)
                    point = {**changes, "n_evaluations": n_evaluations(sampler, n_steps)}
                    point |= image_set_scores(features, target)
                    point |= self.caption_scores(features, captions)
                    points.append({**point, "seconds_per_image": 1 / watch.per_second()})
                    # The first caption again, for the sheet.
                    images = next(self.generator.generate(samples[:1], settings))
                    shown[sampler, scale, n_steps] = to_image(images[0])
                    logger.info("curve: %s, guidance %g, %d steps", sampler, scale, n_steps)
        # The curve in metrics.json, as a table, as a sheet, and in TensorBoard.
        evaluation.metrics["curve"] = {"n_samples": len(samples), "points": points}
        evaluation.tables = [*evaluation.tables, curve_table(points, len(samples))]
        evaluation.images["curve.png"] = curve_sheet(shown, captions[0])
        evaluation.curves |= curves_by_steps(points)


def distinct_captions(samples: Sequence[dict], n: int) -> list[int]:
    """Positions of at most n samples with different captions, evenly spaced."""
    first: dict[str, int] = {}  # caption -> position of its first sample
    for position, sample in enumerate(samples):
        first.setdefault(sample["caption"], position)
    positions = list(first.values())
    return [positions[i] for i in evenly_spaced(len(positions), n)] if n else []
