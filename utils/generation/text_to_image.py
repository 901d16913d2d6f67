"""Captions to images: text encoder and UNet, sampler, VAE decoder.

B batch, Z latent channels, y x latent rows and columns, S side of an image, T text tokens.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.samplers import SAMPLERS, SamplerKind, guided_denoiser, initial_noise, sample
from model.text.feature_extractors import FrozenTextEncoder
from model.text.tokenizer import TOKENS_MULTIPLE, encode_caption, pad_tokens
from model.vae import VAE
from utils.checkpoints import load_model, read_stage
from utils.generation.latents import check_vae, load_vae
from utils.generation.text_encoder import text_encoder_fingerprint
from utils.options import option, other_than_one

logger = logging.getLogger(__name__)

BYTES_ONLY = ("n_text_layers", "text_head_width", "n_gram_sizes", "n_gram_buckets")


@dataclasses.dataclass
class SamplingArguments:
    """Flags of sampling images from a diffusion model."""

    sampler: SamplerKind = option("dpmpp_2m", "sampler; euler and ddim take the same steps")
    n_steps: int = option(20, "sampling steps", gt=0)
    guidance_scale: float = option(3.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: list[float] = option(
        [0.0, 1.0],
        "interval of times in which guidance is applied; 0: data, 1: noise",
        only_with=("guidance_scale", other_than_one),
    )
    guidance_rescale: float = option(
        0.0,
        "fraction of the std of the guided prediction that is rescaled (arXiv 2305.08891)",
        ge=0,
        le=1,
        only_with=("guidance_scale", other_than_one),
    )

    def validate_sampling(self):
        bounds = self.guidance_interval
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
            raise ValueError(f"--guidance_interval={bounds} must be two times with 0 <= first < second <= 1")

    def settings(self) -> dict[str, Any]:
        """Names and values of the sampling flags, for reports."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingArguments)}


class TextToImage:
    """A diffusion model and the VAE of its latents, ready to draw.

    Args:
        model, vae: on one device, in eval mode.
        text_encoder: the frozen encoder of the captions where the model was trained on one.
    """

    def __init__(self, model: ImageDiffusion, vae: VAE, text_encoder: FrozenTextEncoder | None = None):
        self.model, self.vae, self.text_encoder = model, vae, text_encoder

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        vae_checkpoint: str = "",
        weights: Literal["ema", "raw"] = "ema",
        device: torch.device | str = "cpu",
    ) -> Self:
        """From a run or checkpoint folder of the diffusion stage.

        Args:
            vae_checkpoint: where the VAE lies now; by default where it lay in training.
        Raises:
            FileNotFoundError: a checkpoint is missing.
            ValueError: the checkpoint is of another stage, or the VAE is not the one of its latents.
        """
        record = read_stage(checkpoint)
        if record["stage"] != "image_diffusion":
            raise ValueError(f"{checkpoint} is of stage {record['stage']!r}; text to image needs image_diffusion")
        path = vae_checkpoint or record["latents"]["vae_checkpoint"]
        check_vae(path, record["latents"]["vae_fingerprint"], f"the latents that {checkpoint} was trained on")
        model = load_model(ImageDiffusion, checkpoint, weights).requires_grad_(False).to(device)
        text_encoder = load_text_encoder(record["latents"])
        if text_encoder is not None:
            text_encoder.model.to(device)
        return cls(model, load_vae(path).requires_grad_(False).to(device), text_encoder)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.model.device

    def text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The model's text inputs for captions: tokens or frozen states, and their mask."""
        if self.text_encoder is not None:
            states, mask = self.text_encoder(list(prompts), self.model.config.max_tokens)
            return {"text_states": states.to(self.device), "mask": mask.to(self.device)}
        ids = [encode_caption(prompt, self.model.config.max_tokens) for prompt in prompts]
        tokens, mask = pad_tokens(ids)
        return {"tokens": tokens.to(self.device), "mask": mask.to(self.device)}

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingArguments) -> Tensor:
        """Sample latents, one per prompt and seed.

        The random numbers of an image depend on its seed alone, whatever else is in the batch and on which device.
        Returns: (B, Z, y, x) standardised, fp32.
        """
        assert settings.sampler in SAMPLERS and len(prompts) == len(seeds)
        process = self.model.process
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = initial_noise(self.model.latent_shape(), generators, process).to(self.device)
        condition = self.model.encode_text(**self.text(prompts))
        low, high = settings.guidance_interval
        denoiser = guided_denoiser(
            process,
            self.model.network,
            condition,
            null_condition=self.model.null_condition(len(seeds)),
            scale=settings.guidance_scale,
            interval=(low, high),
            rescale=settings.guidance_rescale,
        )
        times = process.sampling_times(settings.n_steps).to(self.device)
        return sample(settings.sampler, denoiser, noise, process=process, times=times, generators=generators)

    @torch.no_grad()
    def images(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingArguments) -> Tensor:
        """Sample and decode images, one per prompt and seed.

        Returns: (B, 3, S, S) in [-1, 1], fp32.
        Raises: ValueError: an image is not finite.
        """
        latents = self.latents(prompts, seeds, settings)
        images = self.vae.decode(self.vae.denormalize_latents(latents))
        finite = images.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ValueError(
                f"the image of {prompts[finite.index(False)]!r} is not finite ({settings.sampler}, "
                f"{settings.n_steps} steps, guidance {settings.guidance_scale:g}): the weights are broken"
            )
        return images.clamp(-1, 1)


def load_text_encoder(latents: dict) -> FrozenTextEncoder | None:
    """The frozen text encoder of cached latents, None where captions are bytes.

    Args: latents: settings of the cache's manifest.
    Raises: ValueError: the encoder of that name has other weights or another vocabulary by now.
    """
    if not latents["text_encoder"]:
        return None
    encoder = FrozenTextEncoder(latents["text_encoder"])
    found, wanted = text_encoder_fingerprint(encoder), latents["text_encoder_fingerprint"]
    if found != wanted:
        raise ValueError(
            f"the text encoder {encoder.name} has fingerprint {found}, but the captions were encoded by {wanted}; "
            "put that one back, or make the latents anew"
        )
    return encoder


def fit_to_latents(config: ImageDiffusionConfig, latents: dict, overrides: Sequence[str], folder: Path):
    """The configuration with the fields that cached latents determine.

    Args:
        latents: settings of the cache's manifest.
        overrides: the `key=value` that the user gave.
        folder: of the cache.
    Returns: a new `ImageDiffusionConfig`.
    Raises: ValueError: an override contradicts the latents.
    """
    channels, side, _ = latents["latent_shape"]
    n_tokens = -(-latents["max_tokens"] // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    found = {"latent_channels": channels, "latent_size": side, "max_tokens": n_tokens}
    if latents["text_encoder"]:
        found |= {"text_encoder": "frozen", "text_embedding_width": latents["text_embedding_width"]}
    elif config.text_encoder == "frozen":
        raise ValueError(
            f"text_encoder='frozen' takes the states of a text encoder, which {folder} lacks; make latents with "
            "preprocess_image_diffusion_dataset.py --text_encoder, or give --override text_encoder=bytes"
        )
    for pair in overrides:
        name = pair.partition("=")[0]
        if name in found and getattr(config, name) != found[name]:
            raise ValueError(f"--override {pair} does not fit the latents in {folder}: they need {name}={found[name]}")
        if name in BYTES_ONLY and latents["text_encoder"]:
            raise ValueError(f"--override {pair} has no effect: the captions in {folder} are encoded already")
    return config.replace(**found)
