#!/usr/bin/env bash
# The whole image pipeline on several GPUs: images with captions from the hub -> image VAE-GAN -> text to image.
#
#   bash recipes/image.sh                         # 8 GPUs, 256 px, lambdalabs/naruto-blip-captions (1.2 k images)
#   DATASET=my_images GPUS=2 bash recipes/image.sh
#   DATASET=Norod78/cartoon-blip-captions bash recipes/image.sh
#
# Any data set with an image column and a caption column works. Small ones show that the pipeline runs, and give only
# images of their own domain. The costs below are estimates from parameter and step counts, not measurements;
# recipes/demo.sh has measured costs. A second call resumes where the first one stopped.
set -euo pipefail
. "$(dirname "$0")/heading.sh"
DATASET=${DATASET:-lambdalabs/naruto-blip-captions}
CAPTIONS=${CAPTIONS:-text}
to_repository DATASET
GPUS=${GPUS:-8}
RUN=${RUN:-hub}

heading "Images to tensors"
# 1. Images to tensors: minutes on the CPU.
python preprocess_image_vae_dataset.py --dataset_name "$DATASET" --image_size 256 --output_dir "cached_datasets/$RUN" \
    --num_augmented_copies 1 --horizontal_flip

heading "Image VAE-GAN"
# 2. VAE-GAN of 21 M parameters, f8 with 16 channels, 20,000 steps of 16 images per GPU: about 1 hour on 8 GPUs.
deepspeed --num_gpus="$GPUS" pretrain_image_vae.py --use_deepspeed --deepspeed_config ds_config_zero-1.json --bf16 \
    --config medium --run_name "$RUN" --cached_dataset "cached_datasets/$RUN" --resume_from_checkpoint latest \
    --batch_size 16 --learning_rate 2e-4 --kl_weight 1e-2 --latent_noise 0.25 --max_steps 20000 --gan_start_step 10000 \
    --gan_ramp_steps 1000 \
    --diff_augment color translation --lecam_weight 0.001 --eval_steps 2000 --save_steps 2000
once "runs/image_vae/$RUN" python evaluate.py --checkpoint "runs/image_vae/$RUN" --contact_sheet 32

heading "Latents and captions"
# 3. Latents of every image and its mirror image, and the captions: minutes on one GPU.
python preprocess_image_diffusion_dataset.py --dataset_name "$DATASET" --caption_column "$CAPTIONS" --bf16 --horizontal_flip \
    --vae_checkpoint "runs/image_vae/$RUN" --output_dir "cached_datasets/${RUN}_latents"

heading "Text to image"
# 4. UNet of 140 M parameters, 50,000 steps of 32 latents per GPU: about 3 hours on 8 GPUs.
deepspeed --num_gpus="$GPUS" pretrain_image_diffusion.py --use_deepspeed --deepspeed_config ds_config_zero-2.json --bf16 \
    --config medium --run_name "$RUN" --cached_dataset "cached_datasets/${RUN}_latents" --resume_from_checkpoint latest \
    --vae_checkpoint "runs/image_vae/$RUN" --vae_config medium \
    --batch_size 32 --learning_rate 2e-4 --max_steps 50000 --ema_decay 0.9999 --eval_steps 2500 --save_steps 2500

heading "Metrics and images"
# 5. Metrics, curves over steps and guidance scales, generated images.
once "runs/image_diffusion/$RUN" python evaluate.py --checkpoint "runs/image_diffusion/$RUN" --contact_sheet 16 --curve
python inference/text_to_image.py --checkpoint "runs/image_diffusion/$RUN" --prompts "a man with a blue headband" --seeds 1 2 3 4

heading "Done: runs/image_diffusion/$RUN/contact_sheet.png, metrics.json; curves by make tensorboard"
next "python inference/text_to_image.py --checkpoint runs/image_diffusion/$RUN --prompts '...'"
