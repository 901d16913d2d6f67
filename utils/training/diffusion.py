"""Trainer and stage of latent diffusion, for images and audio.  B batch, Z latent channels, K time buckets."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataset_loading.files import read_manifest
from model.layers import to_device
from model.text.feature_extractors import FrozenTextEncoder
from utils.checkpoints import checkpoints_in, lasting_name, read_stage, resolve_checkpoint
from utils.distributed import from_main, launched_rank, rank
from utils.generation.exported import home_of
from utils.generation.foreign_weights import format_of
from utils.generation.latents import PINNED, Media, checkpoints_at, find_vae, latents_script, load_vae, pin_vae
from utils.generation.text_encoder import load_text_encoder
from utils.seeds import sample_normal, sample_uniform
from utils.training.budget_batches import bucket_dataloader
from utils.training.stage import Stage
from utils.training_utils import StageTrainer

logger = logging.getLogger(__name__)

TEXT_INPUTS = ("tokens", "text_states", "mask")


class DiffusionTrainer(StageTrainer):
    """Trains a denoiser on cached latents with captions.

        loss = mean over samples of loss_weight(t) * mean_z channel_weight_z * |prediction - target(x, noise, t)|_z^2

    `loss_weight` is that of `--loss_weighting`, and `channel_weight` a channel's std to the power of
    `--channel_weight_power`, over the mean of these; `target` is what the model's `prediction` names: noise, x or v.

    The model offers `process` (see `model.diffusion_process`) and `forward(latents, time, drop, <text inputs>)`.
    Times, noise, the choice of mirrored latents and dropped captions belong to (seed, step, sample).

    Args:
        channel_weights: weight of each latent channel in the training loss, (Z,), mean 1; None for 1 each.
        measure_samples: metrics by name of what a model generates, called at each evaluation; None to measure none.
    """

    def __init__(
        self,
        *,
        channel_weights: Tensor | None = None,
        measure_samples: Callable[..., dict[str, float]] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.channel_weights = None if channel_weights is None else channel_weights.to(self.args.device)
        self.measure_samples = measure_samples

    def get_train_dataloader(self):
        """Batches of latents of one size, where the cache has several."""
        return bucket_dataloader(self) or super().get_train_dataloader()

    def draw_latents(self, inputs: dict) -> Tensor:
        """Latents sampled from each posterior, or with probability 1/2 from that of the mirrored image where the cache
        holds it; (B, Z, ...)."""
        mean, std = inputs["mean"], inputs["std"]
        if "flipped_mean" in inputs:
            flip = self.sample_uniforms(inputs, "flip", (1,) * (mean.ndim - 1)) < 0.5  # (B, 1, ...)
            mean = torch.where(flip, inputs["flipped_mean"], mean)
            std = torch.where(flip, inputs["flipped_std"], std)
        return mean + std * self.sample_noise(inputs, "posterior", mean.shape[1:])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, process = self.stage_arguments, self.model.process
        # Everything random belongs to (seed, step, sample): latents, times (B,), dropped captions (B,), noise.
        latents = self.draw_latents(inputs)
        uniforms = self.sample_uniforms(inputs, "time", ())
        time = process.training_times(uniforms, args.time_sampling, mean=args.time_mean, std=args.time_std)
        drop = self.sample_uniforms(inputs, "drop", ()) < args.caption_dropout
        noise = self.sample_noise(inputs, "noise", latents.shape[1:])

        # Squared errors (B, Z), weighted by channel and by time.
        errors = self.squared_errors(model, inputs, latents=latents, noise=noise, time=time, drop=drop)
        self.record({"loss/mse": errors.mean()})
        if self.channel_weights is not None:
            errors = errors * self.channel_weights
        weight = process.loss_weight(time, args.loss_weighting, args.min_snr_gamma)
        return (weight * errors.mean(1)).mean()

    def squared_errors(
        self, model, inputs: dict, *, latents: Tensor, noise: Tensor, time: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of the prediction per sample and channel, (B, Z) fp32."""
        process = self.model.process
        text = {name: inputs[name] for name in TEXT_INPUTS if name in inputs}
        # The noisy latents (B, Z, ...), and the prediction of the same shape.
        output = model(latents=process.add_noise(latents, noise, time), time=time, drop=drop, **text)
        target = process.target(latents, noise, time)
        # The mean is taken over positions: (B, Z, ...) -> (B, Z).
        return (output.prediction.float() - target).square().flatten(2).mean(2)

    def evaluation_terms(self, model, inputs):
        """The error at one time in each of K equal parts of [0, 1]; time and noise belong to the sample alone, so that
        evaluations are comparable. Channels and times have equal weights; `loss` is the mean over the parts."""
        latents = inputs["mean"]
        terms: dict[str, Tensor] = {}
        for name, time, noise in self.evaluation_points(inputs["index"], latents.shape[1:]):
            terms[name] = self.squared_errors(model, inputs, latents=latents, noise=noise, time=time).mean(1)
        return {**terms, "loss": torch.stack(list(terms.values())).mean(0)}

    def evaluation_points(self, index: Tensor, shape: Sequence[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name of the loss, times (B,) and noise (B, *shape) in each of K equal parts of [0, 1], by sample alone."""
        n_buckets, device = self.stage_arguments.n_time_buckets, self.args.device
        for bucket in range(n_buckets):
            # Step 0 stands for every evaluation: the same sample has the same times and noise in all of them.
            within = sample_uniform(self.args.seed, 0, index, stream=f"evaluation time {bucket}", shape=())
            noise = sample_normal(self.args.seed, 0, index, stream=f"evaluation noise {bucket}", shape=shape)
            time = (bucket + to_device(within, device)) / n_buckets  # (B,)
            yield f"loss_t{bucket / n_buckets:.2f}-{(bucket + 1) / n_buckets:.2f}", time, to_device(noise, device)

    def evaluation_extras(self, model):
        if self.measure_samples is None:
            return {}
        # A plain copy with averaged weights is sampled by one process, weights that may be sharded by all.
        takes_part = model is not self.ema_model or rank() == 0
        return from_main(self.measure_samples(self.accelerator.unwrap_model(model)) if takes_part else {})


def check_init_from(path: str, latents: Mapping[str, Any], cache: Path, *, media: Media = "image") -> None:
    """Check that a run on latents can start from the weights of another one.

    Args:
        path: run or checkpoint folder to start from; of another library's folder nothing can be checked.
        latents: settings of the cache's manifest.
        cache: its folder, for messages.
        media: what the latents encode.
    Raises: ValueError: that run's latents come from another VAE, or its captions from another text encoder.
    """
    if format_of(path):  # of diffusers, whose files name no VAE
        logger.warning("--init_from %s: %s must be latents of the VAE that it was trained with", path, cache)
        return
    record = read_stage(path, f"{media}_diffusion")
    fields = {"vae_fingerprint": "vae_checkpoint", "text_encoder_fingerprint": "text_encoder"}
    for name, flag in fields.items():
        other, expected = record["latents"][name], latents[name]
        if other != expected:
            # The copy of the VAE that the run keeps, else the recorded path or name.
            pinned = checkpoints_at(home_of(resolve_checkpoint(path)) / PINNED) if flag == "vae_checkpoint" else []
            value = next(map(str, pinned), record["latents"][flag]) or '""'
            raise ValueError(
                f"--init_from {path} was trained on {name}={other!r}, the latents in {cache} have {expected!r}, which "
                f"mean nothing to its weights. Make latents for it with {latents_script(media)} --{flag} {value} and "
                "another --output_dir, or train a new model without --init_from"
            )


class DiffusionStage(Stage):
    """Base of the stages of diffusion: the latents of the cache, and the frozen networks that they come from."""

    media: ClassVar[Media] = "image"

    @cached_property
    def latents(self) -> dict[str, Any]:
        """How the latents of the cache were made, and the folder of their VAE."""
        settings = self.latent_settings()
        return {**settings, "vae_checkpoint": lasting_name(self.args.vae_checkpoint) or settings["vae_checkpoint"]}

    def latent_settings(self) -> dict[str, Any]:
        """The settings in the manifest of the cache."""
        return read_manifest(self.cache_dir, self.name)["settings"]

    @cached_property
    def vae_checkpoint(self) -> Path:
        """The VAE that encoded the latents; those of another one would decode to noise."""
        # A resumed run goes on with its copy, whatever has become of the folder that its command names.
        given = "" if self.args.resume_from_checkpoint else self.args.vae_checkpoint
        folders = (self.run_dir, self.cache_dir)
        return find_vae(
            self.latents, f"the latents in {self.cache_dir}", given=given, folders=folders, media=self.media
        )

    @cached_property
    def vae(self) -> Any:
        """The frozen VAE of the latents."""
        return load_vae(self.vae_checkpoint, self.args.vae_config, media=self.media).requires_grad_(False)

    @cached_property
    def text_encoder(self) -> FrozenTextEncoder | None:
        """The frozen text encoder where captions are its states."""
        return load_text_encoder(self.latents, self.args.text_encoder, near=self.cache_dir)

    def prepare(self):
        """Keep a copy of the VAE, without which the run's model says nothing: in place of another one only where no
        checkpoint of the run needs that."""
        if launched_rank() == 0:
            pin_vae(self.vae_checkpoint, self.run_dir, may_replace=not checkpoints_in(self.run_dir))
