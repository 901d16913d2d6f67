"""Evaluation of an image VAE: reconstructions beside reference rows, health of the latents, speed.

B batch, Y X rows and columns, Z latent channels, y x latent rows and columns.
"""

import dataclasses
import io
import logging
import math
import statistics
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import collate_stack
from dataset_loading.image.folder import ImageFolderDataset
from dataset_loading.image.pixels import ImageDataset, to_float, to_uint8
from model.image.feature_extractors import PerceptualDistance
from model.image.vae import ImageVAE
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.evaluator import Evaluation, ImageEvaluationArguments, ImageEvaluator
from utils.evaluation.tables import latent_table
from utils.metrics.images import FeatureMoments, KernelDistance, SharedFeatures, frechet_distance, psnr, ssim
from utils.metrics.latents import LatentHealth
from utils.options import option
from utils.timing import Stopwatch

logger = logging.getLogger(__name__)

N_FEATURES = 1280
JPEG_QUALITY = 10


@dataclasses.dataclass
class ImageVAEEvaluationArguments(ImageEvaluationArguments):
    """Flags of the evaluation of image VAEs."""

    references: list[Literal["jpeg", "thumbnail"]] = option(
        ["jpeg", "thumbnail"], "baselines: JPEG at quality 10; bicubic upsampling from the latent's rows and columns"
    )


class ImageVAEEvaluator(ImageEvaluator):
    """Posterior means are decoded: nothing is random."""

    arguments_class = ImageVAEEvaluationArguments
    model_class = ImageVAE
    definitions: ClassVar[dict[str, str]] = {
        "psnr_db": "mean over images of 10 log10(2^2 / mean squared error), RGB clamped to [-1, 1]",
        "ssim": "mean over images, RGB channels and pixels; Gaussian window of 11 pixels, deviation 1.5",
        "perceptual": "squared distance of unit-length EfficientNet-Lite0 features, mean of 5 depths; in [0, 4]",
        "frechet": f"Frechet distance on {N_FEATURES} pooled EfficientNet-Lite0 features (not Inception: not the FID "
        f"of papers); biased upwards under {2 * N_FEATURES} images",
        "kid": "kernel distance on the same features, kernel (x.y / 1280 + 1)^3, U-statistic over pairs (image, "
        "reconstruction); unbiased, may be negative; its error is the jackknife's",
        "latents": "per channel over images and positions: mean and std of the posterior means, posterior_std the "
        "root mean posterior variance, normalized_std the std of samples over the stored one, "
        "kl to N(0, 1) in nats per position; dead: kl < 0.01 or std < 0.05",
        "compression": "input values per latent value (VAE, thumbnail), raw bytes per file byte (JPEG)",
        "speed": "images per second of the model alone, first batch left out where there are several",
    }

    def build_dataset(self):
        """The data set at the size of the model's training images."""
        size = self.model.config.image_size
        if self.args.dataset:
            return ImageFolderDataset(
                self.args.dataset, self.args.split, image_size=size, resize_mode=self.args.resize_mode
            )
        return ImageDataset(*self.cache()).expect(image_size=size)

    def measure(self, dataset, indices):
        features = SharedFeatures().to(self.device)
        distance = PerceptualDistance(features)
        references = {name: REFERENCES[name] for name in self.args.references}
        rows = {name: Scores() for name in ("model", *references)}
        ratios: dict[str, list[float]] = {name: [] for name in rows}
        real_moments, health, drawn = FeatureMoments(), LatentHealth(), {}
        encode_watch, decode_watch = Stopwatch(self.device), Stopwatch(self.device)
        on_sheet = {indices[i] for i in evenly_spaced(len(indices), self.args.contact_sheet)}
        loader = DataLoader(
            Subset(dataset, indices), self.args.batch_size, num_workers=self.args.num_workers, collate_fn=collate_stack
        )
        for batch in loader:
            image = batch["image"].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                mean, logvar = encode_watch.time(self.model.encode, image)
                reconstruction = decode_watch.time(self.model.decode, mean).float().clamp(-1, 1)
            self.check_finite(reconstruction, batch["index"], dataset)
            health.update(mean, logvar)
            ratios["model"] += [image[0].numel() / mean[0].numel()] * len(image)
            made = {"model": reconstruction}
            for name, reference in references.items():
                made[name], ratio = reference(image, mean.shape[-2:])
                ratios[name] += ratio
            features.clear()
            real_moments.update(features.pooled(image))
            for name, images in made.items():
                rows[name].update(image, images, features, distance)
            for index, real, fake in zip(batch["index"].tolist(), image, reconstruction):
                if index in on_sheet:
                    drawn[index] = (to_image(real), to_image(fake), psnr(real[None], fake[None]).item())
        scores = {name: row.compute(real_moments) for name, row in rows.items()}
        for name, score in scores.items():
            score["compression"] = statistics.fmean(ratios[name])
        speed = {"encode": encode_watch.per_second(), "decode": decode_watch.per_second()}
        latents = health.compute()
        stored = self.model.latent_std.tolist()
        spread_of_samples = map(math.hypot, latents["std"], latents["posterior_std"])
        latents["normalized_std"] = [found / std for found, std in zip(spread_of_samples, stored)]
        return self.report(scores, latents, speed, tuple(mean.shape[1:]), dataset, drawn)

    def check_finite(self, reconstruction: Tensor, index: Tensor, dataset: Any) -> None:
        """ValueError naming a sample whose reconstruction is not finite."""
        finite = torch.isfinite(reconstruction).flatten(1).all(1).cpu()
        if not finite.all():
            key = dataset.entries[index[~finite][0].item()]["key"]
            raise ValueError(
                f"{self.checkpoint} reconstructs {key} with values that are not finite; the weights are broken"
            )

    def report(self, scores, latents, speed, latent_shape, dataset, drawn) -> Evaluation:
        """Numbers as metrics, scalars, tables and the contact sheet."""
        size = self.model.config.image_size
        n_samples, score = scores["model"].pop("n_samples"), scores["model"]
        for reference in scores.values():
            reference.pop("n_samples", None)
        parameters = sum(p.numel() for p in self.model.parameters())
        model = {
            "image_size": size,
            "latent_shape": list(latent_shape),
            "compression": score["compression"],
            "parameters": parameters,
            "encode_per_second": speed["encode"],
            "decode_per_second": speed["decode"],
            "batch_size": self.args.batch_size,
        }
        names = ("psnr_db", "ssim", "perceptual", "frechet", "kid")
        scalars = {name: score[name] for name in names if score[name] is not None}
        scalars["dead_channels"] = float(sum(latents["dead"]))
        images = {}
        if drawn:
            title = (
                f"{self.checkpoint.parent.name}, step {self.step}: input and reconstruction of {len(drawn)} images "
                f"out of {n_samples}, mean PSNR {score['psnr_db']:.1f} dB"
            )
            groups = [
                Group((real, fake), f"{value:.1f} dB  {caption_of(dataset.entries[index])}")
                for index, (real, fake, value) in drawn.items()
            ]
            labels = ("input", "reconstruction")
            images["contact_sheet.png"] = draw_sheet(groups, labels, n_across=4, title=title)
        tables = [score_table(scores, n_samples, size), latent_table(latents), self.model_table(model)]
        return Evaluation({"scores": scores, "latents": latents, "model": model}, scalars, tables, images)

    def model_table(self, model: dict[str, Any]) -> Table:
        """Size and speed."""
        table = Table(title="Model", title_justify="left", show_header=False, box=SIMPLE_HEAD)
        values = 3 * model["image_size"] ** 2
        shape = "x".join(map(str, model["latent_shape"]))
        device = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        precision = "bf16 autocast" if self.args.bf16 else "fp32"
        table.add_row("parameters", f"{model['parameters']:,}")
        table.add_row("image", f"3x{model['image_size']}x{model['image_size']} = {values:,} values")
        table.add_row("latent", f"{shape} = {int(np.prod(model['latent_shape'])):,} values")
        table.add_row("compression", f"{model['compression']:.1f} times fewer values")
        table.add_row("encode", f"{model['encode_per_second']:.0f} images/s ({device}, {precision})")
        table.add_row("decode", f"{model['decode_per_second']:.0f} images/s")
        return table


class Scores:
    """Metrics of one row of the table, batch by batch."""

    def __init__(self):
        self.values: dict[str, list[float]] = {"psnr_db": [], "ssim": [], "perceptual": []}
        self.moments, self.kernel = FeatureMoments(), KernelDistance()

    def update(self, real: Tensor, fake: Tensor, features: SharedFeatures, distance: nn.Module) -> None:
        """Add a batch of images, each (B, 3, Y, X) in [-1, 1]."""
        self.values["psnr_db"] += psnr(fake, real).tolist()
        self.values["ssim"] += ssim(fake, real).tolist()
        self.values["perceptual"] += distance(fake, real).tolist()
        self.moments.update(features.pooled(fake))
        self.kernel.update(features.pooled(real), features.pooled(fake))

    def compute(self, real: FeatureMoments) -> dict[str, Any]:
        """Means, and the spread of the PSNR; distances of sets are None under 3 images."""
        n_samples = len(self.values["psnr_db"])
        scores: dict[str, Any] = {name: statistics.fmean(values) for name, values in self.values.items()}
        scores["psnr_db_lowest"] = min(self.values["psnr_db"])
        scores["psnr_db_std"] = statistics.pstdev(self.values["psnr_db"])
        enough = n_samples >= 3
        scores["frechet"] = frechet_distance(real, self.moments) if enough else None
        scores["kid"], scores["kid_error"] = self.kernel.compute() if enough else (None, None)
        scores["n_samples"] = n_samples
        return scores


def jpeg(image: Tensor, latent_size: tuple[int, int]) -> tuple[Tensor, list[float]]:
    """Images (B, 3, Y, X) through JPEG, and raw bytes per file byte."""
    decoded, ratios = [], []
    for pil_image in map(to_image, image):
        file = io.BytesIO()
        pil_image.save(file, "JPEG", quality=JPEG_QUALITY)
        decoded.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
        ratios.append(image[0].numel() / file.tell())
    return to_float(torch.stack(decoded)).to(image.device), ratios


def thumbnail(image: Tensor, latent_size: tuple[int, int]) -> tuple[Tensor, list[float]]:
    """Images (B, 3, Y, X) shrunk to the latent's rows and columns and enlarged, and values per value."""
    small = F.interpolate(image, size=tuple(latent_size), mode="bicubic", antialias=True).clamp(-1, 1)
    large = F.interpolate(to_float(to_uint8(small)), size=tuple(image.shape[-2:]), mode="bicubic").clamp(-1, 1)
    return large, [image[0].numel() / small[0].numel()] * len(image)


REFERENCES = {"jpeg": jpeg, "thumbnail": thumbnail}
ROW_NAMES = {"model": "this model", "jpeg": f"JPEG, quality {JPEG_QUALITY}", "thumbnail": "bicubic thumbnail"}


def caption_of(entry: dict[str, Any]) -> str:
    """The caption, or the key where there is none."""
    return entry["caption"] or entry["key"]


def score_table(scores: dict[str, dict[str, Any]], n_samples: int, size: int) -> Table:
    """One row per way of storing the images."""
    caption = (
        "PSNR, SSIM: equality of pixels. perceptual: difference of network features. Frechet, KID: difference of the\n"
        "two sets of images (0: none). compression: values per latent value, or bytes per byte of the JPEG file."
    )
    if n_samples < 2 * N_FEATURES:
        caption += (
            f"\nFrechet is biased upwards under {2 * N_FEATURES} images (here {n_samples}): read KID, which is not."
        )
    title = f"Reconstruction of {n_samples} images, {size}x{size} pixels"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("PSNR dB", "SSIM", "perceptual", f"Frechet (n={n_samples})", "KID", "compression"):
        good = "high" if name in ("PSNR dB", "SSIM", "compression") else "low"
        table.add_column(f"{name}\n({good}: good)", justify="right", no_wrap=True)
    for name, score in scores.items():
        sets = ("-", "-")
        if score["kid"] is not None:
            sets = (f"{score['frechet']:.1f}", f"{score['kid']:.3f} +- {score['kid_error']:.3f}")
        table.add_row(
            ROW_NAMES[name],
            f"{score['psnr_db']:.2f}",
            f"{score['ssim']:.4f}",
            f"{score['perceptual']:.4f}",
            *sets,
            f"{score['compression']:.1f} x",
            style="bold" if name == "model" else "",
        )
    return table
