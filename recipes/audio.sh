#!/usr/bin/env bash
# The whole audio pipeline on several GPUs: speech from the hub -> vocoder -> audio VAE-GAN -> audio files and ONNX.
#
#   bash recipes/audio.sh                         # 8 GPUs, 24 kHz, mythicinfinity/libritts_r (54 hours, 247 speakers)
#   DATASET=my_speech CONFIG= SPLIT=train MEL=22k GPUS=2 bash recipes/audio.sh
#
# Any data set with an audio column works if it consists of parquet files (loading scripts are no longer supported).
# MikhailT/lj-speech (split full) has 24 hours of one speaker, for MEL=22k. The costs below are estimates from
# parameter and step counts, not measurements. A second call resumes where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
DATASET=${DATASET:-mythicinfinity/libritts_r}
CONFIG=${CONFIG-clean}
SPLIT=${SPLIT:-train.clean.100}
GPUS=${GPUS:-8}
RUN=${RUN:-hub}
MEL=${MEL:-24k}

# 1. Log-mels and waveforms of clips up to 10 s: about an hour on 16 cores, 26 GB.
python preprocess_audio_vocoder_dataset.py --dataset_name "$DATASET" --dataset_config "$CONFIG" --dataset_split "$SPLIT" \
    --mel "$MEL" --segment_seconds 10 --validation_fraction 0.01 --output_dir "cached_datasets/${RUN}_audio"

# 2. Vocoder of 14 M parameters with discriminators of published size, 200,000 steps of 16 crops per GPU: about 12
#    hours on 8 GPUs.
deepspeed --num_gpus="$GPUS" pretrain_vocoder.py --use_deepspeed --deepspeed_config ds_config_zero-1.json --bf16 \
    --config medium --run_name "$RUN" --cached_dataset "cached_datasets/${RUN}_audio" --resume_from_checkpoint latest \
    --batch_size 16 --segment_frames 64 --num_workers 4 --discriminator full --max_steps 200000 \
    --gan_start_step 5000 --gan_ramp_steps 1000 --ema_decay 0.9999 --eval_steps 5000 --save_steps 5000
python evaluate.py --checkpoint "runs/vocoder/$RUN" --contact_sheet 8 --max_samples 200

# 3. Audio VAE-GAN of 11 M parameters, 20 latent channels at half the frame rate, 100,000 steps of 32 segments per GPU:
#    about 3 hours on 8 GPUs. It reads the vocoder's cache.
deepspeed --num_gpus="$GPUS" pretrain_audio_vae.py --use_deepspeed --deepspeed_config ds_config_zero-1.json --bf16 \
    --config medium --run_name "$RUN" --cached_dataset "cached_datasets/${RUN}_audio" --resume_from_checkpoint latest \
    --batch_size 32 --num_workers 4 --learning_rate 5e-4 --max_steps 100000 --gan_start_step 50000 \
    --ema_decay 0.9999 --eval_steps 5000 --save_steps 5000 --vocoder_checkpoint "runs/vocoder/$RUN"
python evaluate.py --checkpoint "runs/audio_vae/$RUN" --vocoder_checkpoint "runs/vocoder/$RUN" --contact_sheet 8 \
    --max_samples 200

# 4. Held-out log-mels to audio, with the vocoder alone and with the audio VAE; export of the vocoder to ONNX.
python inference/vocode.py --checkpoint "runs/vocoder/$RUN" --input "cached_datasets/${RUN}_audio/validation"
python inference/reconstruct_audio.py --vae_checkpoint "runs/audio_vae/$RUN" --vocoder_checkpoint "runs/vocoder/$RUN" \
    --input "cached_datasets/${RUN}_audio/validation"
python inference/export_vocoder.py --checkpoint "runs/vocoder/$RUN"
