"""Images generated for captions, their features and metrics, for the evaluation and during training.

N images, D features, B batch, Z latent channels, y x latent rows and columns, Y X rows and columns of an
image.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import batches_of, collate_by_shape, collate_stack, in_order
from dataset_loading.image.buckets import Size
from dataset_loading.image.latents import ImageLatentDataset
from utils.console.progress import reported
from utils.evaluation.source_images import SourceImageDataset
from utils.generation.arguments.image import SamplingArguments
from utils.generation.text_to_image import TextToImagePipeline
from utils.metrics.caption_agreement import (
    N_FEATURES,
    N_POOLED,
    ImageFeatures,
    TextProbe,
    UnusableCaptionsError,
    chance_of,
)
from utils.metrics.feature_sets import compare_sets
from utils.metrics.given_features import given_scores
from utils.metrics.images import to_square
from utils.metrics.timing import Stopwatch
from utils.seeds import seed_of


class PairedLatentDataset(Dataset):
    """Cached latents paired with their raw images, if these can be read.

    Item: `mean` (Z, y, x), `image` (3, Y, X) if there is a source, `index`.
    """

    def __init__(self, latents: ImageLatentDataset, source: SourceImageDataset | None = None):
        self.latents, self.source = latents, source
        self.entries, self.fingerprint = latents.entries, latents.fingerprint

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.latents[index]
        item = {"mean": sample["mean"], "index": sample["index"]}
        return item if self.source is None else {**item, "image": self.source[index]}


class BatchedGenerator:
    """Generates and reconstructs images in batches, and extracts their features.

    The seed of an image depends on the key of its sample, not on the batch.

    Args:
        pipeline: diffusion model and VAE.
        extractor: images -> features.
        seed: of the evaluation.
    """

    def __init__(
        self, pipeline: TextToImagePipeline, extractor: ImageFeatures, *, seed: int, batch_size: int, bf16=False
    ):
        self.pipeline, self.extractor = pipeline, extractor
        self.seed, self.batch_size, self.bf16 = seed, batch_size, bf16

    def generate(
        self, samples: Sequence[dict], settings: SamplingArguments, *, copy: int = 0, watch: Stopwatch | None = None
    ) -> Iterator[list[Tensor]]:
        """Batches of images (3, Y, X) in [-1, 1], one per sample.

        Args:
            samples: dicts with `key`, `caption` and, where the image is no square, `size`.
            copy: index of the image, where there are several per caption.
            watch: measures the time of the pipeline.
        """
        device = self.pipeline.device
        watch = watch or Stopwatch(device)
        starts = range(0, len(samples), self.batch_size)
        for start in reported(starts, f"generated images, {settings.n_steps} steps", len(starts), "batches"):
            # One seed per image, from the seed of the evaluation, the key of the sample and the number of the copy.
            batch = samples[start : start + self.batch_size]
            prompts = [sample["caption"] for sample in batch]
            seeds = [seed_of(self.seed, f"{sample['key']} {copy}") for sample in batch]
            sizes = [sample.get("size", self.pipeline.size) for sample in batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                images = watch.time(
                    lambda seeds, prompts=prompts, sizes=sizes: self.pipeline.images_of_sizes(
                        prompts, seeds, settings, sizes
                    ),
                    seeds,
                )
            yield [image.float() for image in images]

    def features(self, samples: Sequence[dict], settings: SamplingArguments, watch: Stopwatch | None = None) -> Tensor:
        """Features (N, D) of generated images, one per sample."""
        return torch.cat([self.features_of(images) for images in self.generate(samples, settings, watch=watch)])

    def features_of(self, images: Sequence[Tensor]) -> Tensor:
        """Features (B, D) of images (3, Y, X), at the size of the square, see `to_square`."""
        side = self.pipeline.side
        return self.extractor(torch.cat([to_square(image[None], side) for image in images]))

    def reconstruct(self, batch: dict[str, Any]) -> list[Tensor]:
        """Images (3, Y, X) in [-1, 1] that the VAE decodes from cached latents, or reconstructs from images; one per
        sample of a batch of `collate_images`."""
        parts = [self.reconstruct_size(part) for part in batches_of(batch)]
        return in_order(batch, [image for part in parts for image in part])

    def reconstruct_size(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, 3, Y, X): `reconstruct` of samples of one size."""
        vae, device = self.pipeline.vae, self.pipeline.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            if "mean" in batch:  # cached latents, standardised: (B, Z, y, x)
                latents = vae.denormalize_latents(batch["mean"].to(device))
            else:  # images: the posterior mean
                latents = vae.encode(batch["image"].to(device))[0]
            return vae.decode(latents).float().clamp(-1, 1)


def collate_images(samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Latents, images, or both, as a batch or as batches of one size each, see `collate_by_shape`."""
    return collate_by_shape(samples, collate_stack, "mean" if "mean" in samples[0] else "image")


def size_of_image(image: Tensor) -> Size:
    """(width, height) of (3, Y, X)."""
    return image.shape[-1], image.shape[-2]


def agreement_scores(probe: TextProbe | None, features: Tensor, captions: Sequence[str]) -> dict[str, float | None]:
    """`agreement` and `words`, see `TextProbe.agreement`; None without probe or where all captions are equal."""
    try:
        # Captions that are all equal cannot be told apart.
        agreement = probe.agreement(features, captions) if probe else {}
    except UnusableCaptionsError:
        agreement = {}
    return {"agreement": agreement.get("top1"), "words": agreement.get("words")}


def image_set_scores(generated: Tensor, target: Tensor) -> dict[str, float | None]:
    """`compare_sets` of the pooled features of `ImageFeatures`, and `given_scores` where the user gives a network.

    Args: generated, target: (N, D).
    """
    scores = compare_sets(generated[:, :N_POOLED], target[:, :N_POOLED])
    if generated.shape[1] > N_FEATURES:
        scores |= given_scores(generated[:, N_FEATURES:], target[:, N_FEATURES:])
    return scores


@torch.no_grad()
def train_probe(pipeline: TextToImagePipeline, dataset: ImageLatentDataset, n_samples: int = 2000) -> TextProbe:
    """A probe fitted to decoded training latents, evenly spaced over the data set.

    Raises: UnusableCaptionsError: no probe can be fitted to the captions.
    """
    # Decoded latents, not raw images: the probe learns from what the VAE can show.
    indices = evenly_spaced(len(dataset), n_samples)
    generator = BatchedGenerator(pipeline, ImageFeatures().to(pipeline.device), seed=0, batch_size=32)
    captions = [dataset.entries[i]["caption"] for i in indices]
    features, _ = reconstruction_features(generator, dataset, indices)
    return TextProbe(features, captions)


def reconstruction_features(
    generator: BatchedGenerator, dataset: ImageLatentDataset, indices: Sequence[int]
) -> tuple[Tensor, list[Size]]:
    """Features (N, D) of images decoded from cached latents, and the sizes of the images."""
    features, sizes = [], []
    loader = DataLoader(Subset(PairedLatentDataset(dataset), indices), generator.batch_size, collate_fn=collate_images)
    for batch in loader:
        images = generator.reconstruct(batch)
        features.append(generator.features_of(images))
        sizes += map(size_of_image, images)
    return torch.cat(features), sizes


@torch.no_grad()
def generation_metrics(
    pipeline: TextToImagePipeline,
    dataset: ImageLatentDataset,
    indices: Sequence[int],
    *,
    settings: SamplingArguments,
    probe: TextProbe | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, float]:
    """Metrics of generated images compared with images decoded from the cached latents; fast enough during training.

    Args:
        dataset, indices: the samples whose captions are used.
        settings: of the sampler.
        probe: see `train_probe`; None: no agreement with captions.
    Returns:
        frechet, kid: of pooled features, see `ImageDiffusionEvaluator.definitions`.
        agreement, agreement_chance, words: if there is a probe and the captions differ.
    """
    generator = BatchedGenerator(pipeline, ImageFeatures().to(pipeline.device), seed=seed, batch_size=batch_size)
    target, sizes = reconstruction_features(generator, dataset, indices)  # (N, D)
    samples = [{**dataset.entries[i], "size": size} for i, size in zip(indices, sizes)]
    generated = generator.features(samples, settings)  # (N, D)
    sets = image_set_scores(generated, target)
    scores = {"frechet": sets["frechet"], "kid": sets["kid"]}
    captions = [sample["caption"] for sample in samples]
    scores |= agreement_scores(probe, generated, captions)
    scores["agreement_chance"] = None if scores["agreement"] is None else chance_of(captions)
    return {name: value for name, value in scores.items() if value is not None}  # only what can be logged
