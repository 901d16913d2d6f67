# Embedded scenes -> cache -> image VAE-GAN -> latents -> text-to-image diffusion -> metrics, contact sheets, images.
vae=runs/image_vae/demo
diffusion=runs/image_diffusion/demo

heading "Images to tensors"
step data/scenes python -m dataset_loading.embedded.scenes data/scenes --image_size 64
step cached_datasets/scenes python preprocess_image_vae_dataset.py --dataset_name data/scenes/train \
    --validation_dataset data/scenes/test --image_size 64 --output_dir cached_datasets/scenes

heading "Image VAE-GAN"
step "$vae" torchrun --standalone --nproc_per_node=2 pretrain_image_vae.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/scenes --batch_size 8 --learning_rate 2e-3 --kl_weight 1e-2 --latent_noise 0.25 \
    --max_steps 2000 --perceptual_weight 0.5 --perceptual_start_step 1500 \
    --gan_start_step 1650 --gan_warmup_steps 50 --gan_ramp_steps 100 --gan_weight 0.05 \
    --discriminator_channels 16 --discriminator_learning_rate 5e-4 --diff_augment translation \
    --logging_steps 100 --eval_steps 500 --save_steps 500 --resume_from_checkpoint latest
beside "$vae/metrics.json" python evaluate.py --checkpoint "$vae" --max_samples 288 --contact_sheet 16

heading "Text to image"
step cached_datasets/scenes_latents python preprocess_image_diffusion_dataset.py --dataset_name data/scenes/train \
    --validation_dataset data/scenes/test --vae_checkpoint "$vae" --output_dir cached_datasets/scenes_latents
step "$diffusion" torchrun --standalone --nproc_per_node=2 pretrain_image_diffusion.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/scenes_latents --vae_checkpoint "$vae" --batch_size 16 --learning_rate 4e-3 \
    --channel_weight_power 1 --time_mean 0.8 --time_std 1.2 --max_steps 1600 --warmup_ratio 0.01 --eval_images 0 \
    --logging_steps 100 --eval_steps 800 --save_steps 800 --resume_from_checkpoint latest
beside "$diffusion/metrics.json" python evaluate.py --checkpoint "$diffusion" --contact_sheet 16 \
    --max_samples 288 --training_samples 2016 --sampler ddpm --n_steps 40 --guidance_interval 0.4 1
step "$diffusion/images" python inference/text_to_image.py --checkpoint "$diffusion" --n_images 4 \
    --output_dir "$diffusion/images" --sampler ddpm --n_steps 40 --guidance_interval 0.4 1 \
    --prompts "a large frog on red" "a small house at the right on red" "a large umbrella on gray"

next "python inference/text_to_image.py --checkpoint $diffusion --prompts 'a large frog on red'"
