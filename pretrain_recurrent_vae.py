r"""Recurrent image VAE-GAN: images to latents, and back in any number of decoder steps.

Before: preprocess_image_vae_dataset.py. After: preprocess_image_diffusion_dataset.py reads the checkpoint by its path.

    python pretrain_recurrent_vae.py --run_name demo --config tiny --batch_size 8 --learning_rate 2e-3 \
        --max_steps 3000 --gan_start_step 2000
    deepspeed --num_gpus=8 pretrain_recurrent_vae.py --use_deepspeed --bf16 --run_name base --config small \
        --num_train_epochs 100 --batch_size 64 --learning_rate 1e-4 --deepspeed_config ds_config_zero-2.json
"""

from utils.command_line import check_flags
from utils.training.arguments.image_vae import RecurrentVAEArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(RecurrentVAEArguments, __doc__)

from model.image.recurrent_vae import RecurrentVAE, RecurrentVAEConfig
from model.presets import RECURRENT_VAE
from utils.training.image_vae import ImageVAEGANStage
from utils.training.recurrent_vae import RecurrentVAEGANTrainer


class RecurrentVAEStage(ImageVAEGANStage):
    name = "recurrent_vae"  # runs are in runs/recurrent_vae
    cache_name = "image_vae"  # the data of the image VAE
    arguments_class = RecurrentVAEArguments
    config_class = RecurrentVAEConfig
    model_class = RecurrentVAE
    presets = RECURRENT_VAE  # --config names a row
    trainer_class = RecurrentVAEGANTrainer  # its docstring states the loss


if __name__ == "__main__":
    RecurrentVAEStage.main()
