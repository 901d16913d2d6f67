"""Text to image: images of prompts in TensorBoard, and metrics of generated images during training."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset_loading.cached import evenly_spaced
from dataset_loading.image.buckets import Size
from dataset_loading.image.latents import ImageLatentDataset
from model.text.feature_extractors import FrozenTextEncoder
from model.vae import VAE
from utils.drawing.images import Group, draw_sheet, to_image
from utils.evaluation.generated_images import generation_metrics, train_probe
from utils.generation.text_to_image import TextToImagePipeline
from utils.metrics.caption_agreement import TextProbe, UnusableCaptionsError, describe_few
from utils.training.callbacks import EvaluationCallback

logger = logging.getLogger(__name__)


class PromptGridCallback(EvaluationCallback):
    """Logs images of the same prompts at several guidance scales, from the same seeds: one row per prompt and one
    column per scale.

    Args:
        vae, text_encoder: see `TextToImagePipeline`.
        prompts: captions.
        sizes: of the images in pixels, which the prompts get in turn.
        args: sampling flags, and `grid_scales`.
    """

    def __init__(
        self, trainer, writer, *, vae: VAE, text_encoder, prompts: Sequence[str], sizes: Sequence[Size], args: Any
    ):
        super().__init__(trainer, writer)
        self.vae, self.text_encoder = vae, text_encoder
        self.sizes = [sizes[number % len(sizes)] for number in range(len(prompts))]
        self.prompts, self.args = prompts, args

    def compute(self, model):
        model, vae = self.trainer.accelerator.unwrap_model(model), self.vae.to(self.trainer.args.device)
        pipeline = TextToImagePipeline(model, vae, self.text_encoder)
        # The same seeds at every step and scale: only model and guidance change.
        seeds = list(range(len(self.prompts)))
        try:
            return [
                pipeline.images_of_sizes(
                    self.prompts, seeds, dataclasses.replace(self.args, guidance_scale=scale), self.sizes
                )
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
                if remark := describe_few([self.held_out.entries[index]["caption"] for index in self.indices]):
                    logger.warning("%s", remark)
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
