"""Metrics of generated pictures while a diffusion model trains."""

import logging
from pathlib import Path
from typing import Any

from dataset_loading.latents import ImageLatentDataset
from model.text.feature_extractors import FrozenTextEncoder
from model.vae import VAE
from utils.image_diffusion_evaluator import generation_metrics, train_probe
from utils.pictures import spread
from utils.text_agreement import TextProbe, UnusableCaptionsError
from utils.text_to_image import TextToImage

logger = logging.getLogger(__name__)


class SampleMetrics:
    """Draws validation captions with the run's sampling flags: frechet, kid, and agreement where captions allow it.

    The probe for the agreement is trained on the training latents at the first call.

    Args:
        vae, text_encoder: see `TextToImage`.
        folder: preprocessed latents.
        n_pictures: captions, spread evenly over the validation set.
        args: sampling flags and `eval_batch_size`.
    """

    def __init__(self, vae: VAE, text_encoder: FrozenTextEncoder | None, folder: Path, n_pictures: int, args: Any):
        self.vae, self.text_encoder, self.args = vae, text_encoder, args
        self.training, self.held_out = (ImageLatentDataset(folder, split) for split in ("train", "validation"))
        self.indices = spread(len(self.held_out), n_pictures)
        self.probe: TextProbe | None = None
        self.has_probe = False

    def __call__(self, model) -> dict[str, float]:
        """Metrics by name of an `ImageDiffusion` in eval mode."""
        painter = TextToImage(model, self.vae.to(model.device), self.text_encoder)
        if not self.has_probe:
            self.has_probe = True
            try:
                self.probe = train_probe(painter, self.training)
            except UnusableCaptionsError as error:
                logger.warning("agreement with the captions is not measured: %s", error)
        batch_size = self.args.eval_batch_size
        try:
            return generation_metrics(
                painter, self.held_out, self.indices, self.args, self.probe, batch_size=batch_size
            )
        except ValueError as error:  # A run may recover from what a look at it finds.
            logger.warning("no metrics of generated pictures: %s", error)
            return {}
