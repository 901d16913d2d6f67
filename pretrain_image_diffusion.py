r"""Text to image: diffusion on the latents of an image VAE, conditioned on captions.

Before: preprocess_image_diffusion_dataset.py. After: evaluate.py, inference/text_to_image.py.

    python pretrain_image_diffusion.py --run_name demo --config tiny --vae_checkpoint runs/image_vae/demo
    deepspeed --num_gpus=8 pretrain_image_diffusion.py --use_deepspeed --bf16 --run_name base --config small \
        --vae_checkpoint runs/image_vae/base --vae_config small --deepspeed_config ds_config_zero-2.json
"""

from dataset_loading.cached import read_manifest, spread
from dataset_loading.collators import collate_captioned
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.presets import IMAGE_DIFFUSION
from utils.generation.latents import check_vae, load_vae
from utils.generation.text_to_image import fit_to_latents, load_text_encoder
from utils.training.diffusion import DiffusionTrainer
from utils.training.image_diffusion import ImageDiffusionArguments, PromptGrids, SampleMetrics
from utils.training.stage import Stage


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
        return fit_to_latents(super().build_config(), latents, self.args.override, folder=self.cache_dir)

    def build_dataset(self, split, config):
        return ImageLatentDataset(self.cache_dir, split)

    def build_trainer_parts(self, model):
        parts = {}
        if self.args.channel_weight_power:
            weights = self.vae.latent_std**self.args.channel_weight_power
            parts["channel_weights"] = weights / weights.mean()
        if self.args.eval_images:
            drawing = (self.vae, self.text_encoder, self.cache_dir, self.args.eval_images, self.args)
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
