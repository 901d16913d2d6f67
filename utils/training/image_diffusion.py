"""Text to image: flags, images of prompts in TensorBoard, and metrics of generated images during training."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from dataset_loading.cached import spread
from dataset_loading.image.latents import ImageLatentDataset
from model.text.feature_extractors import FrozenTextEncoder
from model.vae import VAE
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.generated_images import generation_metrics, train_probe
from utils.generation.text_to_image import SamplingArguments, TextToImagePipeline
from utils.megatransformer_utils import StageArguments
from utils.metrics.caption_agreement import TextProbe, UnusableCaptionsError
from utils.options import option

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ImageDiffusionArguments(SamplingArguments, StageArguments):
    """Flags of the text-to-image stage."""

    # What the latents are of.
    vae_checkpoint: str = option(
        "", "run or checkpoint folder of the latents' VAE; default: where it lay for the cache"
    )
    vae_config: str = option("", "preset name of that VAE, checked against its checkpoint")

    # What is learned.
    caption_dropout: float = option(0.1, "share of captions replaced by the null condition", ge=0, lt=1)
    time_sampling: Literal["logit_normal", "uniform"] = option("logit_normal", "distribution of training times")
    time_mean: float = option(0.0, "mean of the logit-normal times")
    time_std: float = option(1.0, "deviation of the logit-normal times", gt=0)
    loss_weighting: Literal["none", "min_snr"] = option("none", "weight of the loss over times")
    min_snr_gamma: float = option(5.0, "largest signal-to-noise ratio that weighs in min_snr (arXiv 2303.09556)", gt=0)
    channel_weight_power: float = option(
        0.0, "weight of a latent channel in the loss: this power of its deviation in the VAE; 0: all alike", ge=0
    )

    # What is looked at during training.
    n_time_buckets: int = option(5, "parts of [0, 1] whose validation loss is shown", gt=0, le=100)
    prompts: list[str] = option([], "captions of the image grids; default: validation captions")
    n_prompts: int = option(8, "validation captions of the image grids; 0: no grids", ge=0)
    eval_images: int = option(64, "validation captions drawn for the metrics of each evaluation; 0: none", ge=0)
    grid_scales: list[float] = option([1.0, 3.0], "guidance scales of the image grids", ge=0)

    needs = {
        "n_prompts": ("prompts", []),
        "time_mean": ("time_sampling", "logit_normal"),
        "time_std": ("time_sampling", "logit_normal"),
        "min_snr_gamma": ("loss_weighting", "min_snr"),
    }


class PromptGrids(TrainerCallback):
    """Before the first step and after each evaluation: images of the same prompts at several guidance scales, from
    the same seeds, one row per prompt and one column per scale.

    Args:
        writer: None except on rank 0.
        vae, text_encoder: see `TextToImagePipeline`.
        prompts: captions.
        args: sampling flags, and `grid_scales`.
    """

    trainer: Any

    def __init__(self, writer: SummaryWriter | None, vae: VAE, text_encoder, prompts: Sequence[str], args: Any):
        self.writer, self.vae, self.text_encoder = writer, vae, text_encoder
        self.prompts, self.args = prompts, args

    def on_train_begin(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    def show(self, device: torch.device, step: int) -> None:
        """Draw; where there is no average yet every process does, since the weights may be sharded."""
        model = self.trainer.evaluation_model()
        if self.writer is None and model is self.trainer.ema_model:
            return
        pipeline = TextToImagePipeline(
            self.trainer.accelerator.unwrap_model(model), self.vae.to(device), self.text_encoder
        )
        seeds = list(range(len(self.prompts)))
        try:
            columns = [
                pipeline.images(self.prompts, seeds, dataclasses.replace(self.args, guidance_scale=scale))
                for scale in self.args.grid_scales
            ]
        except ValueError as error:  # A run may recover from what a look at it finds.
            logger.warning("no grid of prompts at step %d: %s", step, error)
            return
        if self.writer is None:
            return
        groups = [Group([to_image(one) for one in row], prompt) for prompt, *row in zip(self.prompts, *columns)]
        sheet = draw_sheet(groups, [f"guidance {scale:g}" for scale in self.args.grid_scales], n_across=2)
        self.writer.add_image("images/prompts", np.asarray(sheet), step, dataformats="HWC")
        self.writer.flush()


class SampleMetrics:
    """Draws validation captions with the run's sampling flags: frechet, kid, and agreement where captions allow it.

    The probe for the agreement is trained on the training latents at the first call.

    Args:
        vae, text_encoder: see `TextToImagePipeline`.
        folder: preprocessed latents.
        n_images: captions, spread evenly over the validation set.
        args: sampling flags and `eval_batch_size`.
    """

    def __init__(self, vae: VAE, text_encoder: FrozenTextEncoder | None, folder: Path, n_images: int, args: Any):
        self.vae, self.text_encoder, self.args = vae, text_encoder, args
        self.training, self.held_out = (ImageLatentDataset(folder, split) for split in ("train", "validation"))
        self.indices = spread(len(self.held_out), n_images)
        self.probe: TextProbe | None = None
        self.has_probe = False

    def __call__(self, model) -> dict[str, float]:
        """Metrics by name of an `ImageDiffusion` in eval mode."""
        pipeline = TextToImagePipeline(model, self.vae.to(model.device), self.text_encoder)
        if not self.has_probe:
            self.has_probe = True
            try:
                self.probe = train_probe(pipeline, self.training)
            except UnusableCaptionsError as error:
                logger.warning("agreement with the captions is not measured: %s", error)
        batch_size = self.args.eval_batch_size
        try:
            return generation_metrics(
                pipeline,
                self.held_out,
                self.indices,
                settings=self.args,
                probe=self.probe,
                batch_size=batch_size,
            )
        except ValueError as error:  # A run may recover from what a look at it finds.
            logger.warning("no metrics of generated images: %s", error)
            return {}
