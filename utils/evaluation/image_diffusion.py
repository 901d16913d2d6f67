"""Evaluation of text to image: images drawn for held-out captions beside the real ones, and curves over sampling.

N images, D features. Features are kept, images are not.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import collate_stack
from dataset_loading.image.folder import ImageFolderDataset
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion
from model.samplers import SamplerKind, n_evaluations
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.evaluator import Evaluation, ImageEvaluationArguments, ImageEvaluator
from utils.evaluation.image_diffusion_report import (
    curve_sheet,
    curve_table,
    curves_by_steps,
    detail_table,
    score_table,
)
from utils.evaluation.source_images import SourceImages
from utils.generation.text_to_image import SamplingArguments, TextToImage
from utils.metrics.caption_agreement import (
    N_POOLED,
    ImageFeatures,
    TextProbe,
    UnusableCaptionsError,
    other_captions,
    words_of,
)
from utils.metrics.feature_sets import compare_sets, memorisation
from utils.options import option
from utils.seeds import seed_of
from utils.timing import Stopwatch

logger = logging.getLogger(__name__)

N_DRAWN = 3  # images per caption on the contact sheet


@dataclasses.dataclass
class ImageDiffusionEvaluationArguments(SamplingArguments, ImageEvaluationArguments):
    """Flags of the evaluation of text to image."""

    vae_checkpoint: str = option("", "folder of the latents' VAE; default: the path recorded in training")
    seed: int = option(0, "seed of the generated images", ge=0)
    compare_with: Literal["real", "reconstruction"] = option(
        "real", "reference of generated images: raw images, if they can be read, or the VAE's reconstructions"
    )
    training_samples: int = option(
        5000, "training images, spread evenly, for the probe and the nearest neighbours; 0: all", ge=0
    )
    curve: bool = option(False, "measure every combination of steps, guidance scale and sampler")
    curve_steps: list[int] = option([5, 10, 20, 50], "sampling steps of the curve", gt=0, only_with=("curve", True))
    curve_scales: list[float] = option(
        [1.0, 2.0, 3.0, 5.0], "guidance scales of the curve", ge=0, only_with=("curve", True)
    )
    curve_samplers: list[SamplerKind] = option(["dpmpp_2m"], "samplers of the curve", only_with=("curve", True))
    curve_samples: int = option(64, "captions per point of the curve, spread evenly", gt=0, only_with=("curve", True))

    def validate_curve(self):
        for name in ("curve_steps", "curve_scales", "curve_samplers"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give one value or more")


class LatentImages(Dataset):
    """Cached latents, and the raw images where they can be read.

    Item: `mean` (Z, y, x), `image` (3, S, S) where there is a source, `index`.
    """

    def __init__(self, latents: ImageLatentDataset, source: SourceImages | None = None):
        self.latents, self.source = latents, source
        self.entries, self.fingerprint = latents.entries, latents.fingerprint

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.latents[index]
        item = {"mean": sample["mean"], "index": sample["index"]}
        return item if self.source is None else {**item, "image": self.source[index]}


class Painter:
    """Draws images for captions in batches and looks at them. Seeds belong to the sample's key, not to the batch.

    Args:
        seed: of the evaluation; `copy` tells several images of a caption apart.
    """

    def __init__(self, text_to_image: TextToImage, look: ImageFeatures, seed: int, batch_size: int, bf16=False):
        self.text_to_image, self.look = text_to_image, look
        self.seed, self.batch_size, self.bf16 = seed, batch_size, bf16

    def draw(
        self, samples: Sequence[dict], settings: SamplingArguments, copy: int = 0, watch: Stopwatch | None = None
    ) -> Iterator[Tensor]:
        """Batches (B, 3, S, S) in [-1, 1], one image per sample, a dict with `key` and `caption`."""
        device = self.text_to_image.device
        watch = watch or Stopwatch(device)
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            prompts = [sample["caption"] for sample in batch]
            seeds = [seed_of(self.seed, f"{sample['key']} {copy}") for sample in batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                images = watch.time(
                    lambda each, texts=prompts: self.text_to_image.images(texts, each, settings), seeds
                )
            yield images.float()

    def features(self, samples: Sequence[dict], settings: SamplingArguments, watch: Stopwatch | None = None) -> Tensor:
        """Features of the images, (N, D)."""
        return torch.cat([self.look(images) for images in self.draw(samples, settings, watch=watch)])

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor:
        """What the VAE makes of cached latents, or of images, (B, 3, S, S) in [-1, 1]."""
        vae, device = self.text_to_image.vae, self.text_to_image.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            if "mean" in batch:
                latents = vae.denormalize_latents(batch["mean"].to(device))
            else:
                latents = vae.encode(batch["image"].to(device))[0]
            return vae.decode(latents).float().clamp(-1, 1)


def agreement_scores(probe: TextProbe | None, features: Tensor, captions: Sequence[str]) -> dict[str, float | None]:
    """`agreement` and `words` of `TextProbe.agreement`; None where captions cannot be told apart."""
    try:
        found = probe.agreement(features, captions) if probe else {}
    except UnusableCaptionsError:
        found = {}
    return {"agreement": found.get("top1"), "words": found.get("words")}


@torch.no_grad()
def train_probe(text_to_image: TextToImage, dataset: ImageLatentDataset, n_samples: int = 2000) -> TextProbe:
    """A probe trained on reconstructions of the training latents, spread evenly.

    Raises: UnusableCaptionsError: nothing can be learned from the captions.
    """
    indices = evenly_spaced(len(dataset), n_samples)
    painter = Painter(text_to_image, ImageFeatures().to(text_to_image.device), 0, 32)
    captions = [dataset.entries[i]["caption"] for i in indices]
    return TextProbe(reconstruction_features(painter, dataset, indices), captions)


def reconstruction_features(painter: Painter, dataset: ImageLatentDataset, indices: Sequence[int]) -> Tensor:
    """Features of what the VAE makes of cached latents, (N, D)."""
    loader = DataLoader(Subset(LatentImages(dataset), indices), painter.batch_size, collate_fn=collate_stack)
    return torch.cat([painter.look(painter.reconstruct(batch)) for batch in loader])


@torch.no_grad()
def generation_metrics(
    text_to_image: TextToImage,
    dataset: ImageLatentDataset,
    indices: Sequence[int],
    settings: SamplingArguments,
    probe: TextProbe | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, float]:
    """Generated images against reconstructions of the same cached samples, quick enough for training.

    Returns:
        frechet, kid: on pooled features, see `ImageDiffusionEvaluator.definitions`.
        agreement, words: where a probe is given, see `train_probe`, and the captions differ.
    """
    painter = Painter(text_to_image, ImageFeatures().to(text_to_image.device), seed, batch_size)
    samples = [dataset.entries[i] for i in indices]
    real = reconstruction_features(painter, dataset, indices)
    drawn = painter.features(samples, settings)
    sets = compare_sets(real[:, :N_POOLED], drawn[:, :N_POOLED])
    scores = {"frechet": sets["frechet"], "kid": sets["kid"]}
    scores |= agreement_scores(probe, drawn, [sample["caption"] for sample in samples])
    return {name: value for name, value in scores.items() if value is not None}


class ImageDiffusionEvaluator(ImageEvaluator):
    """Everything random belongs to --seed and the samples' keys."""

    arguments_class = ImageDiffusionEvaluationArguments
    model_class = ImageDiffusion
    definitions: ClassVar[dict[str, str]] = {
        "reference": "what rows are compared with. real: the raw images of the held-out samples, fitted as "
        "preprocessing did, or those of --dataset; where they or the raw training images cannot be read, or with "
        "--compare_with reconstruction: what the VAE makes of the latents",
        "rows": "real: the held-out images. training: as many training images, spread evenly: what perfection "
        "reaches. reconstruction: the held-out images through the VAE: the best for this VAE. generated: drawn for "
        "the held-out captions. shuffled: the same, each held against another's caption. chance: guessing",
        "frechet": f"Frechet distance on {N_POOLED} pooled EfficientNet-Lite0 features (not Inception: not the FID of "
        f"papers), as many images on both sides; biased upwards under {2 * N_POOLED} images",
        "kid": "kernel distance on the same features, kernel (x.y / 1280 + 1)^3, U-statistic; unbiased, may be "
        "negative; its error is the jackknife's",
        "precision": "share of images within the reach of a reference image, which ends at its 3rd nearest other "
        "one (arXiv 1904.06991), on the same features: realism",
        "recall": "the same with the sides exchanged: variety",
        "to_reconstruction": "frechet and kid of generated images to reconstructions: without the VAE's part",
        "memorisation": "median_ratio: median distance of generated images to the nearest training image, over "
        "that of held-out ones, all as the VAE reconstructs them; share_closer: share of generated images nearer "
        "than 95 % of the held-out ones, 0.05 where nothing is copied",
        "agreement": "share of images whose own caption is the most similar of all distinct evaluated captions; a "
        "probe (ridge regression on features, trained on the reference's training images) reads the words that at "
        "least 5 training captions have; similarity is the cosine of word vectors with zero mean, unit variance. "
        "captions: n_distinct evaluated; n_words the probe knows; n_without_words evaluated ones with none of these; "
        "explained: share of the words' variance predicted for training captions left out",
        "words": "probability that a word is read more strongly in an image whose caption has it than in one whose "
        "caption has not, mean over words; chance is 0.5",
        "seconds_per_image": "text encoder, sampler and decoder, first batch left out where there are several",
    }

    def load_model(self):
        self.text_to_image = TextToImage.load(self.checkpoint, self.args.vae_checkpoint, self.weights, self.device)
        look = ImageFeatures().to(self.device)
        self.painter = Painter(self.text_to_image, look, self.args.seed, self.args.batch_size, self.args.bf16)
        return self.text_to_image.model

    def build_dataset(self):
        """The held-out samples; also finds the training ones."""
        folder, split = self.cache()
        wanted = {"vae_fingerprint": self.record["latents"]["vae_fingerprint"]}
        splits = ["train"] if self.args.dataset else ["train", split]
        latents = {name: ImageLatentDataset(folder, name).expect(**wanted) for name in splits}
        sources = self.open_sources(latents)
        self.reference = "real" if sources else "reconstruction"
        self.training = LatentImages(latents["train"], sources.get("train"))
        if self.args.dataset:
            size = latents["train"].manifest["settings"]["image_size"]
            return ImageFolderDataset(
                self.args.dataset, self.args.split, image_size=size, resize_mode=self.args.resize_mode
            )
        return LatentImages(latents[split], sources.get(split))

    def open_sources(self, latents: dict[str, ImageLatentDataset]) -> dict[str, SourceImages]:
        """The raw images of each split; none where they cannot be read or are not wanted."""
        if self.args.compare_with == "reconstruction":
            return {}
        try:
            return {name: SourceImages(each) for name, each in latents.items()}
        except (OSError, ValueError) as error:
            if "compare_with" in self.args.given:
                raise
            logger.warning("raw images cannot be read, reconstructions stand for them: %s", error)
            return {}

    def look_at(self, dataset: Any, indices: Sequence[int], on_sheet: Sequence[int] = ()):
        """Features by row (real, reconstruction) of existing samples, and their images at some positions."""
        features: dict[str, list[Tensor]] = {}
        drawn: dict[int, list[Image.Image]] = {}
        loader = DataLoader(
            Subset(dataset, indices), self.args.batch_size, num_workers=self.args.num_workers, collate_fn=collate_stack
        )
        position = 0
        for batch in loader:
            rows = {"reconstruction": self.painter.reconstruct(batch)}
            if self.reference == "real":
                rows = {"real": batch["image"].to(self.device), **rows}
            for name, images in rows.items():
                features.setdefault(name, []).append(self.painter.look(images))
            for images in zip(*rows.values()):
                if position in on_sheet:
                    drawn[position] = [to_image(image) for image in images]
                position += 1
        return {name: torch.cat(parts) for name, parts in features.items()}, drawn

    def measure(self, dataset, indices):
        samples = [dataset.entries[index] for index in indices]
        on_sheet = distinct_captions(samples, self.args.contact_sheet)
        chosen = evenly_spaced(len(self.training), self.args.training_samples or len(self.training))
        training, _ = self.look_at(self.training, chosen)
        probe, problem = None, ""
        try:
            probe = TextProbe(training[self.reference], [self.training.entries[i]["caption"] for i in chosen])
        except UnusableCaptionsError as error:
            problem = f"{self.training.latents.folder}: {error}"
            logger.warning("text agreement cannot be measured: %s", problem)
        rows, drawn = self.look_at(dataset, indices, on_sheet)
        watch = Stopwatch(self.device)
        rows["generated"] = self.painter.features(samples, self.args, watch)
        scores = self.scores(rows, training, probe, samples)
        pooled = {name: each[:, :N_POOLED] for name, each in rows.items()}
        metrics = {
            "scores": scores,
            "reference": self.reference,
            "memorisation": memorisation(
                pooled["generated"], pooled["reconstruction"], training["reconstruction"][:, :N_POOLED]
            )
            | {"n_training": len(chosen)},
            "captions": {
                "n_distinct": len({sample["caption"] for sample in samples}),
                "n_words": len(probe.words) if probe else 0,
                "n_without_words": sum(not words_of(one["caption"]) & set(probe.words) for one in samples)
                if probe
                else 0,
                "explained": probe.explained if probe else None,
                "problem": problem,
            },
            "sampling": {**self.args.settings(), "seed": self.args.seed},
            "model": {
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "latent_shape": list(self.model.latent_shape()),
                "n_evaluations": n_evaluations(self.args.sampler, self.args.n_steps),
                "seconds_per_image": 1 / watch.per_second(),
                "batch_size": self.args.batch_size,
            },
        }
        evaluation = Evaluation(metrics, self.scalars(metrics), [score_table(metrics, len(samples))], {})
        evaluation.tables = [*evaluation.tables, detail_table(metrics)]
        if on_sheet:
            evaluation.images["contact_sheet.png"] = self.contact_sheet(samples, on_sheet, drawn)
        if self.args.curve:
            self.measure_curve(evaluation, samples, rows[self.reference], probe)
        return evaluation

    def scores(self, rows, training, probe, samples) -> dict[str, dict[str, float | None]]:
        """The rows of the table."""
        captions = [sample["caption"] for sample in samples]
        pooled = {name: each[:, :N_POOLED] for name, each in rows.items()}
        real, reconstruction = pooled[self.reference], pooled["reconstruction"]
        same = training[self.reference][evenly_spaced(len(training[self.reference]), len(samples)), :N_POOLED]
        scores: dict[str, dict[str, float | None]] = {}
        if len(same) == len(real):
            scores["training"] = compare_sets(real, same)
        for name, features in rows.items():
            own = {} if name == self.reference else compare_sets(real, pooled[name])
            scores[name] = {**own, **agreement_scores(probe, features, captions)}
        if self.reference == "real":
            without_vae = compare_sets(reconstruction, pooled["generated"])
            scores["generated"] |= {f"{name}_to_reconstruction": without_vae[name] for name in ("frechet", "kid")}
        n_distinct = len(set(captions))
        if probe and n_distinct > 1:
            shuffled = other_captions(captions, self.args.seed)
            scores["shuffled"] = agreement_scores(probe, rows["generated"], shuffled)
            scores["chance"] = {"agreement": 1 / n_distinct, "words": 0.5}
        return scores

    def scalars(self, metrics: dict[str, Any]) -> dict[str, float]:
        """What goes to TensorBoard."""
        names = ("frechet", "kid", "precision", "recall", "agreement", "words")
        scalars = {name: metrics["scores"]["generated"][name] for name in names}
        scalars["agreement_shuffled"] = metrics["scores"].get("shuffled", {}).get("agreement")
        scalars |= {f"memorisation_{name}": metrics["memorisation"][name] for name in ("median_ratio", "share_closer")}
        scalars["seconds_per_image"] = metrics["model"]["seconds_per_image"]
        return {name: value for name, value in scalars.items() if value is not None}

    def contact_sheet(self, samples, on_sheet, drawn) -> Image.Image:
        """One row of images per caption: what exists, and what is generated with three seeds."""
        chosen = [samples[position] for position in on_sheet]
        copies = [
            [to_image(image) for batch in self.painter.draw(chosen, self.args, copy) for image in batch]
            for copy in range(N_DRAWN)
        ]
        labels = (["real"] if self.reference == "real" else []) + ["reconstruction"] + ["generated"] * N_DRAWN
        groups = [
            Group([*drawn[position], *(images[row] for images in copies)], samples[position]["caption"])
            for row, position in enumerate(on_sheet)
        ]
        title = (
            f"{self.checkpoint.parent.name}, step {self.step}: held-out captions; {self.args.sampler}, "
            f"{self.args.n_steps} steps, guidance {self.args.guidance_scale:g}"
        )
        return draw_sheet(groups, labels, n_across=min(2, len(groups)), title=title)

    def measure_curve(self, evaluation: Evaluation, samples, reference: Tensor, probe: TextProbe | None) -> None:
        """Add every combination of steps, guidance scale and sampler to the evaluation."""
        args, points = self.args, []
        chosen = evenly_spaced(len(samples), args.curve_samples)
        samples, real = [samples[i] for i in chosen], reference[chosen, :N_POOLED]
        captions, shown = [sample["caption"] for sample in samples], {}
        for sampler in args.curve_samplers:
            for scale in args.curve_scales:
                for n_steps in args.curve_steps:
                    changes = {"sampler": sampler, "guidance_scale": scale, "n_steps": n_steps}
                    settings = SamplingArguments(**{**args.settings(), **changes})
                    watch = Stopwatch(self.device)
                    features = self.painter.features(samples, settings, watch)
                    point = {**changes, "n_evaluations": n_evaluations(sampler, n_steps)}
                    point |= compare_sets(real, features[:, :N_POOLED])
                    point |= agreement_scores(probe, features, captions)
                    points.append({**point, "seconds_per_image": 1 / watch.per_second()})
                    shown[sampler, scale, n_steps] = to_image(next(self.painter.draw(samples[:1], settings))[0])
                    logger.info("curve: %s, guidance %g, %d steps", sampler, scale, n_steps)
        evaluation.metrics["curve"] = {"n_samples": len(samples), "points": points}
        evaluation.tables = [*evaluation.tables, curve_table(points, len(samples))]
        evaluation.images["curve.png"] = curve_sheet(shown, captions[0])
        evaluation.curves |= curves_by_steps(points)


def distinct_captions(samples: Sequence[dict], n: int) -> list[int]:
    """Positions of at most n samples with different captions, spread evenly."""
    first: dict[str, int] = {}
    for position, sample in enumerate(samples):
        first.setdefault(sample["caption"], position)
    positions = list(first.values())
    return [positions[i] for i in evenly_spaced(len(positions), n)] if n else []
