#!/usr/bin/env bash
# The demo trains text to image, a vocoder, an audio VAE and text to speech from scratch on a CPU:
# embedded scenes -> cache -> image VAE-GAN -> latents -> text-to-image diffusion -> metrics and a contact sheet;
# the same captions spoken -> cache -> vocoder -> audio VAE-GAN -> metrics, audio files and plots of log-mels;
# latents and phonemes of the spoken captions -> text to speech -> three sentences that are in no recording;
# latents of the scenes and of all captions spoken -> one transformer -> drawn, described, spoken and transcribed captions.
# It takes 47 CPU minutes after the installation, about 25 by the clock on 2 cores. The VAE reaches 26 dB PSNR, 91 % of the
# generated images match their held-out caption (a probe ranks it first of 72), the vocoder has PESQ-wb 2.85, generated
# speech is understood about as well as the recordings are, and the transformer describes and transcribes every caption.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/heading.sh
cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) # macOS has no nproc
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}"
vae=runs/image_vae/demo
diffusion=runs/image_diffusion/demo

heading "Images to tensors"
python -m dataset_loading.embedded.scenes data/scenes --image_size 64
python preprocess_image_vae_dataset.py --dataset_name data/scenes/train --validation_dataset data/scenes/test \
    --image_size 64 --output_dir cached_datasets/scenes

heading "Image VAE-GAN"
# A second call resumes where an interrupted first one stopped.
torchrun --standalone --nproc_per_node=2 pretrain_image_vae.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/scenes --batch_size 8 --learning_rate 2e-3 --kl_weight 1e-2 --latent_noise 0.25 \
    --max_steps 2000 --perceptual_weight 0 --gan_start_step 1650 --gan_warmup_steps 50 --gan_ramp_steps 100 \
    --gan_weight 0.05 --discriminator_channels 16 --discriminator_learning_rate 5e-4 --diff_augment translation \
    --logging_steps 100 --eval_steps 500 --save_steps 500 --resume_from_checkpoint latest
python evaluate.py --checkpoint "$vae" --contact_sheet 16

heading "Text to image"
python preprocess_image_diffusion_dataset.py --dataset_name data/scenes/train --validation_dataset data/scenes/test \
    --vae_checkpoint "$vae" --output_dir cached_datasets/scenes_latents
torchrun --standalone --nproc_per_node=2 pretrain_image_diffusion.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/scenes_latents --vae_checkpoint "$vae" --batch_size 16 --learning_rate 4e-3 \
    --channel_weight_power 1 --time_mean 0.8 --time_std 1.2 --max_steps 1600 --warmup_ratio 0.01 --eval_images 0 \
    --logging_steps 100 --eval_steps 800 --save_steps 800 --resume_from_checkpoint latest
python evaluate.py --checkpoint "$diffusion" --contact_sheet 16
python inference/text_to_image.py --checkpoint "$diffusion" --n_images 4 \
    --prompts "a large frog on red" "a small house at the right on red" "a large umbrella on gray"

heading "Speech to log-mels"
# Audio: the same captions spoken -> log-mels -> vocoder and audio VAE-GAN -> metrics, audio files, plots of log-mels.
vocoder=runs/vocoder/demo
audio_vae=runs/audio_vae/demo
python -m dataset_loading.embedded.speech data/speech --limit 400
python preprocess_audio_vocoder_dataset.py --dataset_name data/speech/train --validation_dataset data/speech/test \
    --output_dir cached_datasets/speech
heading "Vocoder"
torchrun --standalone --nproc_per_node=2 pretrain_vocoder.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/speech --batch_size 8 --learning_rate 1e-3 --max_steps 400 --warmup_ratio 0.04 \
    --gan_start_step 240 --gan_warmup_steps 10 --gan_ramp_steps 80 --discriminator_every 2 --n_logged_samples 2 \
    --logging_steps 40 --eval_steps 200 --save_steps 200 --resume_from_checkpoint latest
python evaluate.py --checkpoint "$vocoder" --metrics pesq stoi mel --max_samples 16 --contact_sheet 4
heading "Audio VAE-GAN"
torchrun --standalone --nproc_per_node=2 pretrain_audio_vae.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/speech --batch_size 8 --learning_rate 2e-3 --max_steps 240 --warmup_ratio 0.04 \
    --gan_start_step 160 --gan_warmup_steps 10 --gan_ramp_steps 40 --gan_weight 0.05 --n_logged_samples 2 \
    --vocoder_checkpoint "$vocoder" --logging_steps 40 --eval_steps 120 --save_steps 120 \
    --resume_from_checkpoint latest
python evaluate.py --checkpoint "$audio_vae" --vocoder_checkpoint "$vocoder" --metrics pesq stoi mel \
    --max_samples 16 --contact_sheet 4
python inference/reconstruct_audio.py --vae_checkpoint "$audio_vae" --vocoder_checkpoint "$vocoder" \
    --input "$(find data/speech/test -name '*.flac' | sort | head -n 1)"

heading "Text to speech"
# Text to speech: latents of the audio VAE with phonemes and their durations -> diffusion -> metrics, three sentences.
speech=runs/audio_diffusion/demo
python preprocess_audio_diffusion_dataset.py --audio_cache cached_datasets/speech --vae_checkpoint "$audio_vae" \
    --output_dir cached_datasets/speech_latents
torchrun --standalone --nproc_per_node=2 pretrain_audio_diffusion.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/speech_latents --vae_checkpoint "$audio_vae" --batch_frames 400 --max_steps 500 \
    --lr_scheduler_type linear --caption_dropout 0 --n_logged_samples 2 --vocoder_checkpoint "$vocoder" \
    --sentences "A small penguin at the right on white." \
    --logging_steps 50 --eval_steps 250 --save_steps 250 --resume_from_checkpoint latest
python evaluate.py --checkpoint "$speech" --vocoder_checkpoint "$vocoder" --waveforms cached_datasets/speech \
    --metrics wer pitch --max_samples 12 --sentences 0
python inference/text_to_speech.py --checkpoint "$speech" --vocoder_checkpoint "$vocoder" --speaker en-us+f3 \
    --output_dir "$speech/sentences" --text "A small penguin at the right on white." \
    "A small apple at the left on white." "A large pig on yellow."

heading "Text, images and audio in one stream"
# One transformer for text, images and audio, on the latents of the scenes and of all captions spoken.
streams=runs/multimodal/demo
python -m dataset_loading.embedded.speech data/captions
python preprocess_audio_vae_dataset.py --dataset_name data/captions/train --validation_dataset data/captions/test \
    --output_dir cached_datasets/captions
python preprocess_audio_diffusion_dataset.py --audio_cache cached_datasets/captions --vae_checkpoint "$audio_vae" \
    --output_dir cached_datasets/captions_latents
torchrun --standalone --nproc_per_node=2 pretrain_multimodal.py --config multimodal-tiny --run_name demo --bf16 \
    --include_modes text image audio --image_latents cached_datasets/scenes_latents \
    --audio_latents cached_datasets/captions_latents --vocoder_checkpoint "$vocoder" \
    --tasks image-text:1 text-image:6 audio-text:1 text-audio:8 --batch_size 36 --learning_rate 1.5e-3 \
    --adam_beta2 0.95 --ema_decay 0.995 --max_steps 1000 --warmup_ratio 0.06 --n_logged_samples 2 \
    --logging_steps 100 --eval_steps 500 --save_steps 500 --resume_from_checkpoint latest
python evaluate.py --checkpoint "$streams" --vocoder_checkpoint "$vocoder" --metrics losses texts probe reader \
    --contact_sheet 16
python inference/chat.py --checkpoint "$streams" --vocoder_checkpoint "$vocoder" --output_dir "$streams/answers" \
    --draw "a large frog on red" --speak "a small umbrella at the right on gray" \
    --describe data/scenes/test/frog_red_0_0.png --transcribe data/captions/test/frog_red_0_0.flac

heading "Done"
echo "contact sheet    $diffusion/contact_sheet.png (real | reconstruction | generated)"
echo "metrics          $diffusion/metrics.json, $vae/metrics.json"
echo "images           inference/generated/image/"
echo "log-mels         $vocoder/contact_sheet.png, $audio_vae/contact_sheet.png (target | predicted | difference)"
echo "audio            $vocoder/, $audio_vae/, inference/generated/audio/"
echo "spoken           $speech/sentences/"
echo "metrics          $vocoder/metrics.json, $audio_vae/metrics.json, $speech/metrics.json"
echo "multimodal       $streams/metrics.json, $streams/contact_sheet_text-image.png, $streams/answers/"
echo "TensorBoard      make tensorboard"
next "python inference/text_to_image.py --checkpoint $diffusion --prompts 'a large frog on red'" \
    "python inference/text_to_speech.py --checkpoint $speech --vocoder_checkpoint $vocoder --speaker en-us+f3 --text '...'"
