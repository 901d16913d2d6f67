"""Images generated for captions, their features and metrics, for the evaluation and during training.

N images, D features, B batch, Z latent channels, y x latent rows and columns, S side of an image.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import collate_stack
from dataset_loading.image.latents import ImageLatentDataset
from utils.evaluation.source_images import SourceImageDataset
from utils.generation.arguments.image import SamplingArguments
from utils.generation.text_to_image import TextToImagePipeline
from utils.metrics.caption_agreement import N_FEATURES, N_POOLED, ImageFeatures, TextProbe, UnusableCaptionsError
from utils.metrics.feature_sets import compare_sets
from utils.metrics.given_features import given_scores
from utils.metrics.timing import Stopwatch
from utils.seeds import seed_of


class PairedLatentDataset(Dataset):
    """Cached latents paired with their raw images, if these can be read.

    Item: `mean` (Z, y, x), `image` (3, S, S) if there is a source, `index`.
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
    ) -> Iterator[Tensor]:
        """Batches (B, 3, S, S) in [-1, 1], one image per sample.

        Args:
            samples: dicts with `key` and `caption`.
            copy: index of the image, where there are several per caption.
            watch: measures the time of the pipeline.
        """
        device = self.pipeline.device
        watch = watch or Stopwatch(device)
        for start in range(0, len(samples), self.batch_size):
            # One seed per image, from the seed of the evaluation, the key of the sample and the number of the copy.
            batch = samples[start : start + self.batch_size]
            prompts = [sample["caption"] for sample in batch]
            seeds = [seed_of(self.seed, f"{sample['key']} {copy}") for sample in batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                images = watch.time(
                    lambda seeds, prompts=prompts: self.pipeline.images(prompts, seeds, settings), seeds
                )
            yield images.float()

    def features(self, samples: Sequence[dict], settings: SamplingArguments, watch: Stopwatch | None = None) -> Tensor:
        """Features (N, D) of generated images, one per sample."""
        return torch.cat([self.extractor(images) for images in self.generate(samples, settings, watch=watch)])

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] that the VAE decodes from cached latents, or reconstructs from images."""
        vae, device = self.pipeline.vae, self.pipeline.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            if "mean" in batch:  # cached latents, standardised: (B, Z, y, x)
                latents = vae.denormalize_latents(batch["mean"].to(device))
            else:  # images: the posterior mean
                latents = vae.encode(batch["image"].to(device))[0]
            return vae.decode(latents).float().clamp(-1, 1)


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
    return TextProbe(reconstruction_features(generator, dataset, indices), captions)


def reconstruction_features(
    generator: BatchedGenerator, dataset: ImageLatentDataset, indices: Sequence[int]
) -> Tensor:
    """Features (N, D) of images decoded from cached latents."""
    loader = DataLoader(Subset(PairedLatentDataset(dataset), indices), generator.batch_size, collate_fn=collate_stack)
    return torch.cat([generator.extractor(generator.reconstruct(batch)) for batch in loader])


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
        agreement, words: if there is a probe and the captions differ.
    """
    generator = BatchedGenerator(pipeline, ImageFeatures().to(pipeline.device), seed=seed, batch_size=batch_size)
    samples = [dataset.entries[i] for i in indices]
    target = reconstruction_features(generator, dataset, indices)  # (N, D)
    generated = generator.features(samples, settings)  # (N, D)
    sets = image_set_scores(generated, target)
    scores = {"frechet": sets["frechet"], "kid": sets["kid"]}
    scores |= agreement_scores(probe, generated, [sample["caption"] for sample in samples])
    return {name: value for name, value in scores.items() if value is not None}  # only what can be logged
