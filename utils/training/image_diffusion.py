"""Text to image: flags, images of prompts in TensorBoard, and metrics of generated images during training."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset_loading.cached import evenly_spaced
from dataset_loading.image.latents import ImageLatentDataset
from model.diffusion_process import TimeSampling, Weighting
from model.text.feature_extractors import FrozenTextEncoder
from model.vae import VAE
from utils.checkpoints import read_stage, resolve_checkpoint
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.generated_images import generation_metrics, train_probe
from utils.generation.latents import PINNED, checkpoints_at, latents_script
from utils.generation.text_to_image import SamplingArguments, TextToImagePipeline
from utils.megatransformer_utils import StageArguments
from utils.metrics.caption_agreement import TextProbe, UnusableCaptionsError
from utils.options import option
from utils.training.callbacks import EvaluationCallback

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ImageDiffusionArguments(SamplingArguments, StageArguments):
    """Flags of the text-to-image stage."""

    # VAE of the latents.
    vae_checkpoint: str = option(
        "", "run or checkpoint folder of the latents' VAE; default: its copy in the run or the cache"
    )
    vae_config: str = option("", "preset of that VAE, checked against its checkpoint")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as in preprocessing")

    # Objective.
    caption_dropout: float = option(0.1, "probability that a caption is replaced by the null condition", ge=0, lt=1)
    time_sampling: TimeSampling = option("logit_normal", "distribution of training times")
    time_mean: float = option(0.0, "mean of the logit-normal times", only_with=("time_sampling", "logit_normal"))
    time_std: float = option(1.0, "std of the logit-normal times", gt=0, only_with=("time_sampling", "logit_normal"))
    loss_weighting: Weighting = option("none", "weighting of the loss over times")
    min_snr_gamma: float = option(
        5.0,
        "maximum signal-to-noise ratio of the min_snr weighting (arXiv 2303.09556)",
        gt=0,
        only_with=("loss_weighting", "min_snr"),
    )
    channel_weight_power: float = option(
        0.0, "exponent p of the loss weight std^p of a latent channel, by its std in the VAE; 0: equal weights", ge=0
    )

    # Evaluation and logs during training.
    n_time_buckets: int = option(5, "intervals of [0, 1] whose validation loss is logged", gt=0, le=100)
    prompts: list[str] = option([], "captions of the logged image grids; default: validation captions")
    n_prompts: int = option(
        8, "validation captions of the logged image grids; 0: no grids", ge=0, only_with=("prompts", [])
    )
    eval_images: int = option(
        64,
        "images generated from validation captions for the metrics of each evaluation; 0: none",
        ge=0,
        aliases=("eval_pictures",),
    )
    grid_scales: list[float] = option([1.0, 3.0], "guidance scales of the logged image grids", ge=0)


def check_init_from(path: str, latents: Mapping[str, Any], cache: Path) -> None:
    """Check that a run on latents can start from the weights of another one.

    Args:
        path: run or checkpoint folder to start from.
        latents: settings of the cache's manifest.
        cache: its folder, for messages.
    Raises: ValueError: that run's latents come from another VAE, or its captions from another text encoder.
    """
    record = read_stage(path, "image_diffusion")
    fields = {"vae_fingerprint": "vae_checkpoint", "text_encoder_fingerprint": "text_encoder"}
    for name, flag in fields.items():
        other, expected = record["latents"][name], latents[name]
        if other != expected:
            # The copy of the VAE that the run keeps, else the recorded path or name.
            pinned = checkpoints_at(resolve_checkpoint(path).parent / PINNED) if flag == "vae_checkpoint" else []
            value = next(map(str, pinned), record["latents"][flag]) or '""'
            raise ValueError(
                f"--init_from {path} was trained on {name}={other!r}, the latents in {cache} have {expected!r}, which "
                f"mean nothing to its weights. Make latents for it with {latents_script('image')} --{flag} {value} and another "
                "--output_dir, or train a new model without --init_from"
            )


class PromptGridCallback(EvaluationCallback):
    """Logs images of the same prompts at several guidance scales, from the same seeds: one row per prompt and one
    column per scale.

    Args:
        vae, text_encoder: see `TextToImagePipeline`.
        prompts: captions.
        args: sampling flags, and `grid_scales`.
    """

    def __init__(self, trainer, writer, *, vae: VAE, text_encoder, prompts: Sequence[str], args: Any):
        super().__init__(trainer, writer)
        self.vae, self.text_encoder = vae, text_encoder
        self.prompts, self.args = prompts, args

    def compute(self, model):
        model, vae = self.trainer.accelerator.unwrap_model(model), self.vae.to(self.trainer.args.device)
        pipeline = TextToImagePipeline(model, vae, self.text_encoder)
        # The same seeds at every step and scale: only model and guidance change.
        seeds = list(range(len(self.prompts)))
        try:
            return [
                pipeline.images(self.prompts, seeds, dataclasses.replace(self.args, guidance_scale=scale))
                for scale in self.args.grid_scales
            ]
        except ValueError as error:  # Images are not finite; those of later steps may be.
            logger.warning("no grid of prompts at step %d: %s", self.trainer.state.global_step, error)
            return None

    def write(self, content, step):
        # From a batch of images per scale to a row of images per prompt.
        groups = [Group([to_image(image) for image in row], prompt) for prompt, *row in zip(self.prompts, *content)]
        sheet = draw_sheet(groups, [f"guidance {scale:g}" for scale in self.args.grid_scales], n_across=2)
        self.add_image("prompts", sheet, step)


class SampleMetrics:
    """Metrics of images sampled for validation captions with the run's flags: frechet, kid, and agreement where
    captions allow it.

    The probe for the agreement is trained on the training latents at the first call.

    Args:
        vae, text_encoder: see `TextToImagePipeline`.
        folder: preprocessed latents.
        args: sampling flags, `eval_batch_size`, and `eval_images`: captions, spread evenly over the validation set.
    """

    def __init__(self, vae: VAE, text_encoder: FrozenTextEncoder | None, folder: Path, *, args: Any):
        self.vae, self.text_encoder, self.args = vae, text_encoder, args
        self.training, self.held_out = (ImageLatentDataset(folder, split) for split in ("train", "validation"))
        self.indices = evenly_spaced(len(self.held_out), args.eval_images)
        self.probe: TextProbe | None = None
        self.has_probe = False  # whether fitting was tried; captions may not allow it

    def __call__(self, model) -> dict[str, float]:
        """Metrics by name of an `ImageDiffusion` in eval mode."""
        pipeline = TextToImagePipeline(model, self.vae.to(model.device), self.text_encoder)
        # The probe is fitted once; it does not depend on the model.
        if not self.has_probe:
            self.has_probe = True
            try:
                self.probe = train_probe(pipeline, self.training)
            except UnusableCaptionsError as error:
                logger.warning("agreement with the captions is not measured: %s", error)
        # Generated images compared with the decoded latents of the same captions.
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
        except ValueError as error:  # Images are not finite; those of later steps may be.
            logger.warning("no metrics of generated images: %s", error)
            return {}
