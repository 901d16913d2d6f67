# The scenes' captions, spoken -> log-mels -> vocoder -> audio VAE-GAN -> metrics, audio files, plots of log-mels;
# latents, phonemes and their durations -> text to speech -> metrics, three sentences that are in no recording.
vocoder=runs/vocoder/demo
audio_vae=runs/audio_vae/demo
speech=runs/audio_diffusion/demo

heading "Speech to log-mels"
step data/speech python -m dataset_loading.embedded.speech data/speech --limit 400
step cached_datasets/speech python preprocess_audio_vocoder_dataset.py --dataset_name data/speech/train \
    --validation_dataset data/speech/test --output_dir cached_datasets/speech

heading "Vocoder"
step "$vocoder" torchrun --standalone --nproc_per_node=2 pretrain_vocoder.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/speech --batch_size 8 --learning_rate 1e-3 --max_steps 400 --warmup_ratio 0.04 \
    --gan_start_step 240 --gan_warmup_steps 10 --gan_ramp_steps 80 --discriminator_every 2 --n_logged_samples 2 \
    --logging_steps 40 --eval_steps 200 --save_steps 200 --resume_from_checkpoint latest
beside "$vocoder/metrics.json" python evaluate.py --checkpoint "$vocoder" --metrics pesq stoi mel --max_samples 16 \
    --contact_sheet 4

heading "Audio VAE-GAN"
step "$audio_vae" torchrun --standalone --nproc_per_node=2 pretrain_audio_vae.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/speech --batch_size 8 --learning_rate 2e-3 --max_steps 240 --warmup_ratio 0.04 \
    --gan_start_step 160 --gan_warmup_steps 10 --gan_ramp_steps 40 --gan_weight 0.05 --n_logged_samples 2 \
    --vocoder_checkpoint "$vocoder" --logging_steps 40 --eval_steps 120 --save_steps 120 \
    --resume_from_checkpoint latest
beside "$audio_vae/metrics.json" python evaluate.py --checkpoint "$audio_vae" --vocoder_checkpoint "$vocoder" \
    --metrics pesq stoi mel --max_samples 16 --contact_sheet 4
step "$audio_vae/reconstruction" python inference/reconstruct_audio.py --vae_checkpoint "$audio_vae" \
    --vocoder_checkpoint "$vocoder" --output_dir "$audio_vae/reconstruction" \
    --input "$(find data/speech/test -name '*.flac' | sort | head -n 1)"

heading "Text to speech"
step cached_datasets/speech_latents python preprocess_audio_diffusion_dataset.py \
    --audio_cache cached_datasets/speech --vae_checkpoint "$audio_vae" --output_dir cached_datasets/speech_latents
step "$speech" torchrun --standalone --nproc_per_node=2 pretrain_audio_diffusion.py --config tiny --run_name demo \
    --cached_dataset cached_datasets/speech_latents --vae_checkpoint "$audio_vae" --batch_frames 400 --max_steps 500 \
    --lr_scheduler_type linear --caption_dropout 0 --n_logged_samples 2 --vocoder_checkpoint "$vocoder" \
    --sentences "A small penguin at the right on white." \
    --logging_steps 50 --eval_steps 250 --save_steps 250 --resume_from_checkpoint latest
beside "$speech/metrics.json" python evaluate.py --checkpoint "$speech" --vocoder_checkpoint "$vocoder" \
    --waveforms cached_datasets/speech --metrics wer pitch --rows shuffled --max_samples 12 --sentences 0
step "$speech/sentences" python inference/text_to_speech.py --checkpoint "$speech" \
    --vocoder_checkpoint "$vocoder" --speaker en-us+f3 --output_dir "$speech/sentences" \
    --text "A small penguin at the right on white." "A small apple at the left on white." "A large pig on yellow."

next "python inference/text_to_speech.py --checkpoint $speech --vocoder_checkpoint $vocoder --text 'A large pig.'"
