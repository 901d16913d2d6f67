"""Text-to-image pipeline: text encoder and UNet, sampler, VAE decoder.

B batch, Z latent channels, y x latent rows and columns, Y X rows and columns of an image, T text tokens.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dataset_loading.image.buckets import Size, describe_sizes, nearest_size, parse_ratio, round_to, sizes_of
from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.samplers import SAMPLERS, SamplerKind, guided_denoiser, initial_noise, sample
from model.text.feature_extractors import FrozenTextEncoder
from model.text.tokenizer import TOKENS_MULTIPLE, encode_caption, pad_tokens
from model.vae import VAE
from utils.checkpoints import WeightsKind, data_of, load_model, read_stage, resolve_checkpoint
from utils.generation.exported import home_of
from utils.generation.files import check_unicode
from utils.generation.latents import find_vae, load_vae
from utils.generation.sampling import check_interval, interval_option
from utils.generation.text_encoder import load_text_encoder, lost_by_cut
from utils.options import option, other_than_one

logger = logging.getLogger(__name__)

RATIO_TOLERANCE = 0.15  # Of the logarithm of a ratio: sides are multiples, so that few ratios are met exactly.
BYTES_ONLY = ("n_text_layers", "text_head_width", "n_gram_sizes", "n_gram_buckets")


@dataclasses.dataclass
class SamplingArguments:
    """Flags of everything that samples images."""

    sampler: SamplerKind = option("dpmpp_2m", "sampler; euler and ddim take the same steps")
    n_steps: int = option(20, "sampling steps", gt=0)
    guidance_scale: float = option(3.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: list[float] = interval_option()
    guidance_rescale: float = option(
        0.0,
        "fraction of the std of the guided prediction that is rescaled (arXiv 2305.08891)",
        ge=0,
        le=1,
        only_with=("guidance_scale", other_than_one),
    )

    def validate_interval(self):
        check_interval(self.guidance_interval)

    def settings(self) -> dict[str, Any]:
        """Names and values of the sampling flags, for reports."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingArguments)}


@dataclasses.dataclass
class PipelineArguments(SamplingArguments):
    """Flags of what loads a pipeline: the frozen networks that a diffusion model was trained with."""

    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run, or as recorded")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as recorded")


class TextToImagePipeline:
    """Generates images for captions with a diffusion model and the VAE of its latents.

    Args:
        model, vae: on the same device, in eval mode.
        text_encoder: the frozen encoder of the captions, if the model was trained on one.
        sizes: of the training images, (width, height) in pixels; by default a square.
    """

    def __init__(
        self,
        model: ImageDiffusion,
        vae: VAE,
        text_encoder: FrozenTextEncoder | None = None,
        sizes: Sequence[Size] = (),
    ):
        self.model, self.vae, self.text_encoder = model, vae, text_encoder
        side = model.config.latent_size * vae.config.compression
        self.sizes = list(sizes) or [(side, side)]
        # The square, or the first size where there is none.
        self.size = (side, side) if (side, side) in self.sizes else self.sizes[0]

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        vae_checkpoint: str = "",
        text_encoder: str = "",
        *,
        weights: WeightsKind = "ema",
        device: torch.device | str = "cpu",
    ) -> Self:
        """From a run or checkpoint folder of the diffusion stage.

        Args:
            vae_checkpoint: path of the VAE; empty: its copy in the run or the cache, or the recorded path.
            text_encoder: folder or hub name of the frozen encoder of the captions; empty: the recorded one.
        Raises:
            FileNotFoundError: a checkpoint is missing.
            ValueError: the checkpoint is of another stage, or its latents come from another VAE.
        """
        folder, record = resolve_checkpoint(checkpoint), read_stage(checkpoint)
        if record["stage"] != "image_diffusion":
            raise ValueError(f"{checkpoint} is of stage {record['stage']!r}; text to image needs image_diffusion")
        # Latents of another VAE would decode to noise, so the VAE is identified by its fingerprint.
        latents, cache = record["latents"], data_of(folder)
        name = f"the latents that {checkpoint} was trained on"
        path = find_vae(latents, name, given=vae_checkpoint, folders=(home_of(folder), cache))
        logger.info("the VAE of the latents is %s", path)
        # The frozen networks, on the device.
        model = load_model(ImageDiffusion, checkpoint, weights).requires_grad_(False).to(device)
        encoder = load_text_encoder(latents, text_encoder, near=folder)
        if encoder is not None:
            encoder.model.to(device)
        return cls(model, load_vae(path).requires_grad_(False).to(device), encoder, sizes_of(latents))

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.model.device

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Warn of captions whose end is not read. Raises: ValueError: one is not UTF-8."""
        check_unicode(*prompts)
        limit = self.model.config.max_tokens
        for prompt in prompts:
            if lost_by_cut(prompt, limit, self.text_encoder):
                logger.warning("%.60r has more tokens than the %d of the model; the rest is not read", prompt, limit)

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The model's text inputs for captions: tokens (B, T) or frozen states (B, T, E), and their mask (B, T)."""
        if self.text_encoder is not None:
            states, mask = self.text_encoder(list(prompts), self.model.config.max_tokens)
            return {"text_states": states.to(self.device), "mask": mask.to(self.device)}
        # Captions as bytes, padded to the same length.
        ids = [encode_caption(prompt, self.model.config.max_tokens) for prompt in prompts]
        tokens, mask = pad_tokens(ids)
        return {"tokens": tokens.to(self.device), "mask": mask.to(self.device)}

    def chosen_size(self, width: int = 0, height: int = 0, aspect: str = "") -> Size:
        """The size of images for flags: width and height in pixels, or a ratio such as `16:9`; without any the square.

        A size that the model was not trained on is a warning.

        Raises: ValueError: a side that VAE and UNet cannot halve, or a ratio that no training image
            has; names the nearest sizes.
        """
        trained = f"the sizes of the training images are {describe_sizes(self.sizes)}"
        if aspect:
            ratio = parse_ratio(aspect, "aspect")
            width, height = self.sizes[nearest_size((ratio, 1.0), self.sizes)]
            if abs(math.log(width / height / ratio)) > RATIO_TOLERANCE:
                raise ValueError(
                    f"--aspect {aspect}: {trained}, of which {width}x{height} is the nearest; --width and --height "
                    "give others"
                )
        width, height = (width or height or self.size[0]), (height or width or self.size[1])
        # Strides of the VAE, and of the UNet on its latents.
        multiple = self.vae.config.compression * 2 ** (len(self.model.config.widths) - 1)
        if width % multiple or height % multiple:
            near = (round_to(width, multiple), round_to(height, multiple))
            raise ValueError(
                f"--width {width} --height {height}: sides must be multiples of {multiple}; the nearest are "
                f"{describe_sizes([near])}, and {trained}"
            )
        if (width, height) not in self.sizes:
            nearest = self.sizes[nearest_size((width, height), self.sizes)]
            logger.warning(
                "%dx%d pixels were not trained on, images may be worse: %s; the nearest is %s",
                *(width, height, trained, describe_sizes([nearest])),
            )
        return width, height

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingArguments, size: Size | None = None
    ) -> Tensor:
        """Sample latents, one per prompt and seed.

        The random numbers of an image depend on its seed and size alone, not on the batch or the device.

        Args: size: of the images, (width, height) in pixels; None: `self.size`.
        Returns: (B, Z, y, x) standardised, fp32.
        """
        assert settings.sampler in SAMPLERS and len(prompts) == len(seeds)
        # Noise from one generator per image, on the CPU so that every device sees the same numbers.
        process = self.model.process
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        width, height = size or self.size
        noise = initial_noise(self.vae.latent_shape(height, width), generators, process).to(self.device)
        # Classifier-free guidance: the denoiser combines predictions with captions and without.
        condition = self.model.encode_text(**self.text_inputs(prompts))
        low, high = settings.guidance_interval  # times between which guidance acts
        denoiser = guided_denoiser(
            process,
            self.model.network,
            condition,
            null_condition=self.model.null_condition(len(seeds)),
            scale=settings.guidance_scale,
            interval=(low, high),
            rescale=settings.guidance_rescale,
        )
        times = process.sampling_times(settings.n_steps)  # from noise to data
        return sample(settings.sampler, denoiser, noise, process=process, times=times, generators=generators)

    @torch.no_grad()
    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingArguments, size: Size | None = None
    ) -> Tensor:
        """Sample and decode images, one per prompt and seed.

        Args: size: (width, height) in pixels; None: `self.size`.
        Returns: (B, 3, Y, X) in [-1, 1], fp32.
        Raises: ValueError: an image is not finite.
        """
        # Latents in the units of the VAE, then images; one that is not finite is named by its prompt.
        latents = self.latents(prompts, seeds, settings, size)
        images = self.vae.decode(self.vae.denormalize_latents(latents))
        finite = images.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ValueError(
                f"the image of {prompts[finite.index(False)]!r} is not finite ({settings.sampler}, "
                f"{settings.n_steps} steps, guidance {settings.guidance_scale:g}): the weights are broken"
            )
        return images.clamp(-1, 1)


def fit_to_latents(
    config: ImageDiffusionConfig, latents: Mapping[str, Any], overrides: Sequence[str], *, folder: Path
):
    """The configuration with the fields that cached latents determine.

    Args:
        latents: settings of the cache's manifest.
        overrides: the `key=value` that the user gave.
        folder: of the cache.
    Returns: a new `ImageDiffusionConfig`.
    Raises: ValueError: an override contradicts the latents.
    """
    # Shapes and the kind of captions follow from the cache.
    channels, side, _ = latents["latent_shape"]
    # The number of tokens is rounded up, as tensors of captions are padded to this multiple.
    n_tokens = -(-latents["max_tokens"] // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    fields = {"latent_channels": channels, "latent_size": side, "max_tokens": n_tokens}
    if latents["text_encoder"]:
        fields |= {"text_encoder": "frozen", "text_embedding_width": latents["text_embedding_width"]}
    elif config.text_encoder == "frozen":
        raise ValueError(
            f"text_encoder='frozen' needs the states of a text encoder, which {folder} lacks; make latents with "
            "preprocess_image_diffusion_dataset.py --text_encoder, or give --override text_encoder=bytes"
        )
    # Overrides may repeat these fields, but not contradict them.
    for pair in overrides:
        name = pair.partition("=")[0]
        if name in fields and getattr(config, name) != fields[name]:
            raise ValueError(
                f"--override {pair} does not fit the latents in {folder}: they need {name}={fields[name]}"
            )
        if name in BYTES_ONLY and latents["text_encoder"]:
            raise ValueError(f"--override {pair} has no effect: the captions in {folder} are already encoded")
    return config.replace(**fields)
