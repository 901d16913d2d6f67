r"""Recurrent image VAE-GAN: pictures to latents, and back in any number of decoder steps.

Before: preprocess_image_vae_dataset.py. After: preprocess_image_diffusion_dataset.py reads the checkpoint by its path.

    python pretrain_recurrent_vae.py --run_name demo --config tiny --batch_size 8 --learning_rate 2e-3 \
        --max_steps 3000 --gan_start_step 2000
    deepspeed --num_gpus=8 pretrain_recurrent_vae.py --use_deepspeed --bf16 --run_name base --config small \
        --num_train_epochs 100 --batch_size 64 --learning_rate 1e-4 --deepspeed_config ds_config_zero-2.json
"""

import dataclasses
from pathlib import Path

from model.image.recurrent_vae import RecurrentVAE, RecurrentVAEConfig
from model.presets import RECURRENT_VAE
from utils.configuration import option
from utils.picture_vae_stage import PictureVAEArguments, PictureVAEStage
from utils.recurrent_vae_trainer import RecurrentVAEGANTrainer


@dataclasses.dataclass
class RecurrentVAEArguments(PictureVAEArguments):
    """Flags of the recurrent VAE-GAN stage."""

    # Decoder steps of an optimizer step: truncated log-normal Poisson.
    mean_decoder_steps: float = option(6.0, "mean number of decoder steps in training, before truncation", ge=1)
    decoder_steps_sigma: float = option(0.5, "spread of the logarithm of the Poisson rate; 0: plain Poisson", ge=0)
    min_decoder_steps: int = option(2, "fewest decoder steps in training", gt=0)
    max_decoder_steps: int = option(12, "most decoder steps in training", gt=0)
    n_backprop_steps: int = option(
        4, "last decoder steps that gradients flow through; earlier ones keep no graph", gt=0
    )

    # Losses on the pictures of these last steps, except the deepest, which has all the others.
    intermediate_weight: float = option(0.1, "weight of the mean absolute error of intermediate pictures", ge=0)
    distillation_weight: float = option(0.1, "weight of their distance to the deepest picture", ge=0)

    needs = {
        **PictureVAEArguments.needs,
        "intermediate_weight": ("n_backprop_steps", lambda n_steps: n_steps > 1),
        "distillation_weight": ("n_backprop_steps", lambda n_steps: n_steps > 1),
    }

    def validate_decoder_steps(self):
        if not self.min_decoder_steps <= self.mean_decoder_steps <= self.max_decoder_steps:
            raise ValueError(
                f"--mean_decoder_steps={self.mean_decoder_steps} must lie between "
                f"--min_decoder_steps={self.min_decoder_steps} and --max_decoder_steps={self.max_decoder_steps}"
            )
        if self.n_backprop_steps > self.max_decoder_steps:
            raise ValueError(
                f"--n_backprop_steps={self.n_backprop_steps} has no effect beyond "
                f"--max_decoder_steps={self.max_decoder_steps}"
            )


class RecurrentVAEStage(PictureVAEStage):
    name = "recurrent_vae"
    arguments_class = RecurrentVAEArguments
    config_class = RecurrentVAEConfig
    model_class = RecurrentVAE
    presets = RECURRENT_VAE
    trainer_class = RecurrentVAEGANTrainer

    def __init__(self, args):
        super().__init__(args)
        self.cache_dir = Path(args.cached_dataset or "cached_datasets/image_vae")


if __name__ == "__main__":
    RecurrentVAEStage.main()
