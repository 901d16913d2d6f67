"""Evaluation of an image VAE: reconstruction quality next to simple codecs, statistics of the latents, speed.

B batch, Y X rows and columns, Z latent channels, y x latent rows and columns.
"""

import functools
import io
import logging
import statistics
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import batches_of, collate_by_shape, collate_stack
from dataset_loading.image.buckets import describe_sizes
from dataset_loading.image.pixels import ImageDataset, to_float, to_uint8
from model.image.feature_extractors import PerceptualDistance
from model.image.vae import ImageVAE
from utils.console.progress import reported
from utils.devices import describe_device
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.arguments.image import ImageVAEEvaluationArguments
from utils.evaluation.evaluator import Evaluation, ImageEvaluator
from utils.evaluation.tables import FEATURE_COLUMNS, Column, fact_table, latent_table, score_table
from utils.generation.exported import home_of
from utils.metrics.given_features import PREFIX
from utils.metrics.images import (
    FeatureMoments,
    KernelDistance,
    SharedFeatures,
    frechet_distance,
    psnr,
    ssim,
    to_square,
)
from utils.metrics.latents import LATENT_DEFINITION, LatentHealth, normalized_std
from utils.metrics.timing import Stopwatch

logger = logging.getLogger(__name__)

N_FEATURES = 1280  # of EfficientNet-Lite0, pooled
JPEG_QUALITY = 10
COLUMNS = {
    "psnr_db": Column("PSNR dB", "{:.2f}", "high"),
    "ssim": Column("SSIM", "{:.4f}", "high"),
    "perceptual": Column("perceptual", "{:.4f}", "low"),
    "frechet": Column("Frechet", "{:.1f}", "low"),
    "kid": Column("KID", "{:.3f}", "low", error="kid_error"),
    **FEATURE_COLUMNS,
    "compression": Column("compression", "{:.1f} x", "high"),
}


class ImageVAEEvaluator(ImageEvaluator):
    """Decodes posterior means, so nothing is random."""

    arguments_class = ImageVAEEvaluationArguments
    model_class = ImageVAE
    definitions: ClassVar[dict[str, str]] = {
        "psnr_db": "Peak signal-to-noise ratio, 10 log10(2^2 / mean squared error), of RGB values clamped to [-1, 1]; "
        "mean over images.",
        "ssim": "Structural similarity with a Gaussian window of 11 pixels and std 1.5; mean over images and pixels.",
        "perceptual": "Squared distance of unit-length EfficientNet-Lite0 features, mean over 5 depths, in [0, 4].",
        "frechet": f"Frechet distance of {N_FEATURES} pooled EfficientNet-Lite0 features. Not comparable with FID, "
        f"which uses Inception features. Biased upwards below {2 * N_FEATURES} images.",
        "kid": "Squared maximum mean discrepancy of the same features with the kernel (x.y / 1280 + 1)^3, "
        "as U-statistic over pairs (image, reconstruction). Unbiased, may be negative. kid_error: its "
        "jackknife standard error.",
        "sizes": "Images of aspect-ratio buckets are measured in their own sizes. For the distances of sets they are "
        "resized to image_size x image_size pixels, as clean-fid does (arXiv 2104.11222).",
        "latents": LATENT_DEFINITION,
        "compression": "Input values per latent value (VAE, thumbnail), or raw bytes per file byte (JPEG).",
        "speed": "Images per second of the model without data loading. The first batch is excluded if there are "
        "several.",
    }

    def build_dataset(self):
        """The held-out images at the size of the model's training images."""
        size = self.model.config.image_size
        if self.args.dataset:
            return self.open_images(size)
        return ImageDataset(*self.cache()).expect(image_size=size)

    def measure(self, dataset, indices):
        # The perceptual distance and the distances of sets use the same features.
        features = SharedFeatures().to(self.device)
        distance = PerceptualDistance(features)
        # One row of scores for the model and one per codec; they share the features of the input images.
        references = {name: REFERENCES[name] for name in self.args.references}
        # Networks whose features distances of sets use: prefix of the metrics -> images (B, 3, Y, X) to (B, D).
        extractors = {"": features.pooled, **({PREFIX: self.features} if self.features else {})}
        size = self.model.config.image_size
        rows = {name: ReconstructionScores(extractors, distance, size) for name in ("model", *references)}
        ratios: dict[str, list[float]] = {name: [] for name in rows}
        real_moments = {prefix: FeatureMoments() for prefix in extractors}
        health, examples = LatentHealth(), {}
        encode_watch, decode_watch = Stopwatch(self.device), Stopwatch(self.device)
        # Images of the contact sheet, evenly spaced.
        on_sheet = {indices[i] for i in evenly_spaced(len(indices), self.args.contact_sheet)}
        for batch in self.reported_batches(dataset, indices, "reconstructions and their metrics"):
            # Reconstruction from the posterior mean: (B, 3, Y, X) -> (B, Z, y, x) -> (B, 3, Y, X).
            image = batch["image"].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                mean, logvar = encode_watch.time(self.model.encode, image)
                reconstruction = decode_watch.time(self.model.decode, mean).float().clamp(-1, 1)
            self.check_finite(reconstruction, batch["index"], dataset)
            health.update(mean, logvar)
            ratios["model"] += [image[0].numel() / mean[0].numel()] * len(image)  # values per latent value
            # The codecs on the same batch, and the scores of all rows.
            reconstructions = {"model": reconstruction}
            for name, reference in references.items():
                reconstructions[name], ratio = reference(image, mean.shape[-2:])
                ratios[name] += ratio
            features.clear()  # those of the last batch
            square = to_square(image, size)
            real_features = {prefix: extract(square) for prefix, extract in extractors.items()}
            for prefix, values in real_features.items():
                real_moments[prefix].update(values)
            for name, images in reconstructions.items():
                rows[name].update(images, image, real_features)
            # Examples for the contact sheet, with their PSNR.
            for index, generated, target in zip(batch["index"].tolist(), reconstruction, image):
                if index in on_sheet:
                    value = psnr(generated[None], target[None]).item()
                    examples[index] = (to_image(target), to_image(generated), value)
        # Means over images, distances of sets, and the std of latents after normalization.
        scores = {name: row.compute(real_moments) for name, row in rows.items()}
        for name, score in scores.items():
            score["compression"] = statistics.fmean(ratios[name])
        latents = health.compute()
        latents["normalized_std"] = normalized_std(latents, self.model.latent_std)
        # Size and speed of the model.
        model = {
            "image_size": size,
            "sizes": describe_sizes(getattr(dataset, "sizes", [(size, size)])),
            "latent_shape": list(self.model.latent_shape(size)),
            "compression": scores["model"]["compression"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "encode_per_second": encode_watch.per_second(),
            "decode_per_second": decode_watch.per_second(),
            "batch_size": self.args.batch_size,
        }
        evaluation = self.report(scores, latents, model, n_samples=len(indices))
        if examples:
            evaluation.images["contact_sheet.png"] = self.contact_sheet(examples, dataset, evaluation)
        return evaluation

    def batches(self, dataset: Any, indices: list[int]) -> Iterator[dict[str, Tensor]]:
        """Batches of images of one size each."""
        collate = functools.partial(collate_by_shape, collate=collate_stack, name="image")
        options = {"num_workers": self.args.num_workers, "collate_fn": collate}
        for batch in DataLoader(Subset(dataset, indices), self.args.batch_size, **options):
            yield from batches_of(batch)

    def reported_batches(self, dataset: Any, indices: list[int], name: str) -> Iterator[dict[str, Tensor]]:
        """Those batches, whose progress is shown."""
        batches, n_samples = self.batches(dataset, indices), len(indices)
        return reported(batches, name, n_samples, "images", size=lambda batch: len(batch["image"]))

    def check_finite(self, reconstruction: Tensor, index: Tensor, dataset: Any) -> None:
        """Raises: ValueError: a reconstruction is not finite; names its sample."""
        finite = torch.isfinite(reconstruction).flatten(1).all(1).cpu()  # (B,)
        if not finite.all():
            key = dataset.entries[index[~finite][0].item()]["key"]
            raise ValueError(
                f"{self.checkpoint} reconstructs {key} with values that are not finite; the weights are broken"
            )

    def report(self, scores, latents, model, *, n_samples: int) -> Evaluation:
        """Scores of all rows, statistics of the latents, size and speed as metrics, scalars and tables."""
        # Scalars of the model for TensorBoard.
        names = ("psnr_db", "ssim", "perceptual", "frechet", "kid", *FEATURE_COLUMNS)
        scalars = {name: scores["model"][name] for name in names if scores["model"].get(name) is not None}
        scalars["dead_channels"] = float(sum(latents["dead"]))
        # Notes below the table.
        caption = (
            "PSNR, SSIM: similarity of pixels. perceptual: distance of network features. Frechet, KID: distance of\n"
            "both sets of images (0: none). compression: values per latent value, or raw bytes per byte of JPEG file."
        )
        if n_samples < 2 * N_FEATURES:
            limit = 2 * N_FEATURES
            caption += f"\nFrechet is biased upwards below {limit} images (here {n_samples}): read KID, which is not."
        # Tables: scores of all rows, latents, size and speed.
        title = f"Reconstruction of {n_samples} images, {model['sizes']} pixels"
        table = score_table(scores, COLUMNS, title=title, names=ROW_NAMES, caption=caption)
        tables = [table, latent_table(latents), self.model_table(model)]
        return Evaluation({"scores": scores, "latents": latents, "model": model}, scalars, tables)

    def contact_sheet(self, examples: dict[int, tuple], dataset: Any, evaluation: Evaluation) -> Image.Image:
        """Input and reconstruction of some images.

        Args: examples: index -> input, reconstruction, and its PSNR.
        """
        title = (
            f"{home_of(self.checkpoint).name}, step {self.step}: input and reconstruction of {len(examples)} images, "
            f"mean PSNR of all {evaluation.metrics['scores']['model']['psnr_db']:.1f} dB"
        )
        groups = [
            Group((target, generated), f"{value:.1f} dB  {caption_of(dataset.entries[index])}")
            for index, (target, generated, value) in sorted(examples.items())
        ]
        return draw_sheet(groups, ("input", "reconstruction"), n_across=4, title=title)

    def model_table(self, model: dict[str, Any]) -> Table:
        """Size and speed."""
        size, shape = model["image_size"], model["latent_shape"]
        # The speed belongs to a device and a precision, which the table names.
        is_cpu = self.device.type == "cpu"
        device = f"CPU, {torch.get_num_threads()} threads" if is_cpu else describe_device(self.device)
        precision = "bf16 autocast" if self.args.bf16 else "fp32"
        facts = {  # the numbers of values show where the compression comes from
            "parameters": f"{model['parameters']:,}",
            "image": f"3x{size}x{size} = {3 * size**2:,} values",
            "latent": f"{'x'.join(map(str, shape))} = {int(np.prod(shape)):,} values",
            "compression": f"{model['compression']:.1f} x fewer values",
            "encode": f"{model['encode_per_second']:.0f} images/s ({device}, {precision})",
            "decode": f"{model['decode_per_second']:.0f} images/s",
        }
        return fact_table("Model", facts)


class ReconstructionScores:
    """Metrics of one row of the table, accumulated over batches.

    Args:
        extractors: prefix of metrics -> function of images (B, 3, Y, X), whose features (B, D) are compared as sets.
        distance: perceptual distance.
        side: of the squares whose features are compared, in pixels.
    """

    def __init__(self, extractors: dict[str, Callable[[Tensor], Tensor]], distance: nn.Module, side: int):
        self.extractors, self.distance, self.side = extractors, distance, side
        self.values: dict[str, list[float]] = {"psnr_db": [], "ssim": [], "perceptual": []}
        self.sets = {prefix: (FeatureMoments(), KernelDistance()) for prefix in extractors}

    def update(self, generated: Tensor, target: Tensor, target_features: dict[str, Tensor]) -> None:
        """Add a batch of images, each (B, 3, Y, X) in [-1, 1], with the features of the targets by prefix, which are
        those of squares, see `to_square`."""
        self.values["psnr_db"] += psnr(generated, target).tolist()
        self.values["ssim"] += ssim(generated, target).tolist()
        self.values["perceptual"] += self.distance(generated, target).tolist()
        # The same features serve both distances of sets.
        square = to_square(generated, self.side)
        for prefix, (moments, kernel) in self.sets.items():
            moments.update(features := self.extractors[prefix](square))
            kernel.update(target_features[prefix], features)

    def compute(self, target: dict[str, FeatureMoments]) -> dict[str, Any]:
        """Means, minimum and std of the PSNR; distances of sets are None below 3 images."""
        n_samples = len(self.values["psnr_db"])
        scores: dict[str, Any] = {name: statistics.fmean(values) for name, values in self.values.items()}
        scores["psnr_db_lowest"] = min(self.values["psnr_db"])
        scores["psnr_db_std"] = statistics.pstdev(self.values["psnr_db"])
        enough = n_samples >= 3
        # The target goes first: its square root is computed once for all rows.
        for prefix, (moments, kernel) in self.sets.items():
            scores[f"{prefix}frechet"] = frechet_distance(target[prefix], moments) if enough else None
            scores[f"{prefix}kid"], scores[f"{prefix}kid_error"] = kernel.compute() if enough else (None, None)
        return scores


def jpeg(image: Tensor, latent_size: tuple[int, int]) -> tuple[Tensor, list[float]]:
    """JPEG compression of images (B, 3, Y, X): decoded images, and raw bytes per file byte."""
    decoded, ratios = [], []  # JPEG files differ in size, so each image has its own ratio
    for pil_image in map(to_image, image):
        file = io.BytesIO()
        pil_image.save(file, "JPEG", quality=JPEG_QUALITY)
        decoded.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))  # (3, Y, X)
        ratios.append(image[0].numel() / file.tell())
    return to_float(torch.stack(decoded)).to(image.device), ratios


def thumbnail(image: Tensor, latent_size: tuple[int, int]) -> tuple[Tensor, list[float]]:
    """Images (B, 3, Y, X) downsampled to the latent's rows and columns and upsampled, and the ratio of values."""
    # Down (B, 3, y, x), to 8 bits as a stored image would be, and up again (B, 3, Y, X).
    small = F.interpolate(image, size=tuple(latent_size), mode="bicubic", antialias=True).clamp(-1, 1)
    large = F.interpolate(to_float(to_uint8(small)), size=tuple(image.shape[-2:]), mode="bicubic").clamp(-1, 1)
    return large, [image[0].numel() / small[0].numel()] * len(image)


REFERENCES = {"jpeg": jpeg, "thumbnail": thumbnail}
ROW_NAMES = {"model": "this model", "jpeg": f"JPEG, quality {JPEG_QUALITY}", "thumbnail": "bicubic thumbnail"}


def caption_of(entry: dict[str, Any]) -> str:
    """The caption, or the key where there is none."""
    return entry["caption"] or entry["key"]
