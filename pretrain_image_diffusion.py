r"""Text to image: diffusion on the latents of an image VAE, conditioned on captions.

Before: preprocess_image_diffusion_dataset.py. After: evaluate.py, inference/text_to_image.py.

    python pretrain_image_diffusion.py --run_name demo --config tiny --vae_checkpoint runs/image_vae/demo
    deepspeed --num_gpus=8 pretrain_image_diffusion.py --use_deepspeed --bf16 --run_name base --config small \
        --vae_checkpoint runs/image_vae/base --vae_config small --deepspeed_config ds_config_zero-2.json
"""

from utils.command_line import check_flags
from utils.training.arguments.diffusion import ImageDiffusionArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ImageDiffusionArguments, __doc__)

import functools

from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import collate_by_shape, collate_captioned
from dataset_loading.image.buckets import sizes_of
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.presets import IMAGE_DIFFUSION
from utils.generation.text_to_image import fit_to_latents
from utils.training.budget_batches import count_bucket_steps
from utils.training.diffusion import DiffusionStage, DiffusionTrainer, check_init_from
from utils.training.image_diffusion import PromptGridCallback, SampleMetrics


class ImageDiffusionStage(DiffusionStage):
    name = "image_diffusion"  # runs are in runs/image_diffusion
    arguments_class = ImageDiffusionArguments
    config_class = ImageDiffusionConfig
    model_class = ImageDiffusion
    presets = IMAGE_DIFFUSION  # --config names a row
    trainer_class = DiffusionTrainer  # its docstring states the loss

    def build_config(self):
        """The preset with what the latents determine; a VAE, a text encoder, a checkpoint to start from, or an
        override that does not fit them is refused."""
        assert self.vae is not None  # Raises where there is none that fits, also in a dry run.
        assert self.text_encoder is not None or not self.latents["text_encoder"]
        if self.args.init_from:
            check_init_from(self.args.init_from, self.latents, self.cache_dir)
        return fit_to_latents(super().build_config(), self.latents, self.args.override, folder=self.cache_dir)

    def build_dataset(self, split, config):
        multiple = self.vae.config.compression * 2 ** (len(config.widths) - 1)
        dataset = ImageLatentDataset(self.cache_dir, split)
        dataset.expect_multiples(multiple, "the VAE's compression times 2 for each level after the first")
        return dataset.expect_captions() if split == "train" else dataset

    def build_collator(self, config):
        return functools.partial(collate_by_shape, collate=collate_captioned, name="mean")

    def count_steps(self, dataset, n_ranks):
        if dataset.buckets:
            return count_bucket_steps(dataset, self.args, n_ranks)
        return super().count_steps(dataset, n_ranks)

    def build_trainer_parts(self, model):
        if self.args.dry_run:  # All parts need the frozen networks, which `prepare` loads.
            return {}
        parts = {}
        # Weights std^p of the latent channels, divided by their mean.
        if self.args.channel_weight_power:
            weights = self.vae.latent_std**self.args.channel_weight_power
            parts["channel_weights"] = weights / weights.mean()
        # Metrics of generated images, measured at each evaluation.
        if self.args.eval_images:
            parts["measure_samples"] = SampleMetrics(self.vae, self.text_encoder, self.cache_dir, args=self.args)
        return parts

    def build_callbacks(self, trainer, writer):
        prompts = self.args.prompts
        if not prompts:
            # By default captions spread evenly over the validation set.
            captions = [entry["caption"] for entry in ImageLatentDataset(self.cache_dir, "validation").entries]
            prompts = [captions[index] for index in evenly_spaced(len(captions), self.args.n_prompts)]
        if not prompts:
            return []
        networks = {"vae": self.vae, "text_encoder": self.text_encoder}
        sizes = sizes_of(self.latents)
        return [PromptGridCallback(trainer, writer, **networks, prompts=prompts, sizes=sizes, args=self.args)]

    def extra_record(self):
        return {"latents": self.latents}


if __name__ == "__main__":
    ImageDiffusionStage.main()
