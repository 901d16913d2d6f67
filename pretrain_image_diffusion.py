r"""Text to image: diffusion on the latents of an image VAE, conditioned on captions.

Before: preprocess_image_diffusion_dataset.py. After: evaluate.py, inference/text_to_image.py.

    python pretrain_image_diffusion.py --run_name demo --config tiny --vae_checkpoint runs/image_vae/demo
    deepspeed --num_gpus=8 pretrain_image_diffusion.py --use_deepspeed --bf16 --run_name base --config small \
        --vae_checkpoint runs/image_vae/base --vae_config small --deepspeed_config ds_config_zero-2.json
"""

import dataclasses
from typing import Literal

from dataset_loading.cached import read_manifest
from dataset_loading.collators import collate_captioned
from dataset_loading.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.presets import IMAGE_DIFFUSION
from utils.configuration import option
from utils.diffusion_trainer import DiffusionTrainer
from utils.megatransformer_utils import StageArguments
from utils.pictures import spread
from utils.sample_metrics import SampleMetrics
from utils.stage import Stage
from utils.text_to_image import PromptGrids, SamplingArguments, check_vae, fit_to_latents, load_text_encoder
from utils.vae_loading import load_vae


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
    prompts: list[str] = option([], "captions of the picture grids; default: validation captions")
    n_prompts: int = option(8, "validation captions of the picture grids; 0: no grids", ge=0)
    eval_pictures: int = option(64, "validation captions drawn for the metrics of each evaluation; 0: none", ge=0)
    grid_scales: list[float] = option([1.0, 3.0], "guidance scales of the picture grids", ge=0)

    needs = {
        "n_prompts": ("prompts", []),
        "time_mean": ("time_sampling", "logit_normal"),
        "time_std": ("time_sampling", "logit_normal"),
        "min_snr_gamma": ("loss_weighting", "min_snr"),
    }


class ImageDiffusionStage(Stage):
    name = "image_diffusion"
    arguments_class = ImageDiffusionArguments
    config_class = ImageDiffusionConfig
    model_class = ImageDiffusion
    presets = IMAGE_DIFFUSION
    trainer_class = DiffusionTrainer
    collator = staticmethod(collate_captioned)

    def __init__(self, args: ImageDiffusionArguments):
        super().__init__(args)
        self.latents = read_manifest(self.cache_dir, self.name)["settings"]
        self.latents["vae_checkpoint"] = args.vae_checkpoint or self.latents["vae_checkpoint"]

    def build_config(self):
        """The preset with what the latents determine; the VAE, or an override, that does not fit them is refused."""
        path, latents = self.latents["vae_checkpoint"], self.latents
        check_vae(path, latents["vae_fingerprint"], f"the latents in {self.cache_dir}")
        self.vae = load_vae(path, self.args.vae_config).requires_grad_(False)
        self.text_encoder = load_text_encoder(latents)
        return fit_to_latents(super().build_config(), latents, self.args.override, self.cache_dir)

    def build_dataset(self, split, config):
        return ImageLatentDataset(self.cache_dir, split)

    def build_trainer_parts(self, model):
        parts = {}
        if self.args.channel_weight_power:
            weights = self.vae.latent_std**self.args.channel_weight_power
            parts["channel_weights"] = weights / weights.mean()
        if self.args.eval_pictures:
            drawing = (self.vae, self.text_encoder, self.cache_dir, self.args.eval_pictures, self.args)
            parts["measure_samples"] = SampleMetrics(*drawing)
        return parts

    def build_callbacks(self, writer):
        prompts = self.args.prompts
        if not prompts:
            captions = [entry["caption"] for entry in ImageLatentDataset(self.cache_dir, "validation").entries]
            prompts = [captions[index] for index in spread(len(captions), self.args.n_prompts)]
        return [PromptGrids(writer, self.vae, self.text_encoder, prompts, self.args)] if prompts else []

    def extra_record(self):
        return {"latents": self.latents}


if __name__ == "__main__":
    ImageDiffusionStage.main()
