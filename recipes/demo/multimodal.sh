# Latents of the scenes and of all captions, spoken -> one transformer for text, images and audio -> drawn, described,
# spoken and transcribed captions. It reads what image.sh and audio.sh make.
vocoder=runs/vocoder/demo
audio_vae=runs/audio_vae/demo
streams=runs/multimodal/demo
# Only where the processor has instructions for bf16: without them a step took 9 times as long as in fp32.
precision=$(grep -qswE 'avx512_bf16|amx_bf16|bf16' /proc/cpuinfo && echo --bf16 || true)

heading "Text, images and audio in one stream"
step data/captions python -m dataset_loading.embedded.speech data/captions --limit 2304
step cached_datasets/captions python preprocess_audio_vae_dataset.py --dataset_name data/captions/train \
    --validation_dataset data/captions/test --output_dir cached_datasets/captions
step cached_datasets/captions_latents python preprocess_audio_diffusion_dataset.py \
    --audio_cache cached_datasets/captions --vae_checkpoint "$audio_vae" --output_dir cached_datasets/captions_latents
step "$streams" torchrun --standalone --nproc_per_node=2 pretrain_multimodal.py --config multimodal-tiny \
    --run_name demo $precision --include_modes text image audio --image_latents cached_datasets/scenes_latents \
    --audio_latents cached_datasets/captions_latents --vocoder_checkpoint "$vocoder" \
    --tasks image-text:1 text-image:6 audio-text:1 text-audio:8 --batch_size 24 --learning_rate 1.5e-3 \
    --adam_beta2 0.95 --ema_decay 0.995 --max_steps 1200 --warmup_ratio 0.06 --n_logged_samples 2 \
    --logging_steps 100 --eval_steps 1200 --save_steps 600 --resume_from_checkpoint latest
step "$streams/metrics.json" python evaluate.py --checkpoint "$streams" --vocoder_checkpoint "$vocoder" \
    --metrics losses texts probe reader --training_samples 2016 --reader_steps 300 --contact_sheet 16
step "$streams/answers" python inference/chat.py --checkpoint "$streams" --vocoder_checkpoint "$vocoder" \
    --output_dir "$streams/answers" --draw "a large frog on red" --speak "a small umbrella at the right on gray" \
    --describe data/scenes/test/frog_red_0_0.png --transcribe data/captions/test/frog_red_0_0.flac

next "python inference/chat.py --checkpoint $streams --vocoder_checkpoint $vocoder --draw 'a large frog on red'"
