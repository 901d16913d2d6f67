r"""Image VAE-GAN: images to latents and back.

Before: preprocess_image_vae_dataset.py. After: preprocess_image_diffusion_dataset.py reads the checkpoint by its path.

    python pretrain_image_vae.py --run_name demo --config tiny --batch_size 32 --learning_rate 1e-3 --max_steps 2000 \
        --gan_start_step 1000
    deepspeed --num_gpus=8 pretrain_image_vae.py --use_deepspeed --bf16 --run_name base --config small \
        --num_train_epochs 100 --batch_size 64 --learning_rate 1e-4 --deepspeed_config ds_config_zero-2.json
"""

from utils.command_line import check_flags
from utils.training.arguments.image_vae import ImageVAEGANArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ImageVAEGANArguments, __doc__)

from model.image.vae import ImageVAE, ImageVAEConfig
from model.presets import IMAGE_VAE
from utils.training.image_vae import ImageVAEGANStage, ImageVAEGANTrainer


class ImageVAEStage(ImageVAEGANStage):
    name = "image_vae"  # runs are in runs/image_vae
    config_class = ImageVAEConfig
    model_class = ImageVAE
    presets = IMAGE_VAE  # --config names a row
    trainer_class = ImageVAEGANTrainer  # its docstring states the loss


if __name__ == "__main__":
    ImageVAEStage.main()
