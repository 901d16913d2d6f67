#!/usr/bin/env bash
# The whole audio line, from a folder of recordings with transcripts to speech: vocoder -> audio VAE-GAN -> vocoder
# fine-tuned on the VAE's log-mels -> text to speech -> tables, audio files, three spoken sentences, ONNX.
#
#   DATASET=my_speech bash recipes/audio.sh   # 8 GPUs, MEL=22k, from 10 hours of recordings on
#
#   DATASET=my_speech GPUS=1 SIZE=small VOCODER_STEPS=50000 VAE_STEPS=20000 VAE_GAN_START=10000 TUNING_STEPS=5000 \
#       SPEECH_STEPS=20000 EVERY=2000 bash recipes/audio.sh   # one GPU, an hour or more
#
#   DATASET=my_speech GPUS=0 SIZE=tiny MEL=16k DISCRIMINATOR=thin SEGMENT=32 FRAMES=800 CLIPS=24 EVERY=500 \
#       VOCODER_STEPS=1000 GAN_START=600 GAN_RAMP=200 VAE_STEPS=400 VAE_GAN_START=300 VAE_RATE=2e-3 \
#       TUNING_STEPS=350 SPEECH_STEPS=1100 SPEECH_RATE=2e-3 bash recipes/audio.sh   # a CPU, 20 minutes or more
#
# The data set is a folder with metadata.csv (file_name, text, and speaker where there are several), or a hub data set
# of parquet files: MikhailT/lj-speech with SPLIT=full (24 hours, one speaker), mythicinfinity/libritts_r with
# CONFIG=clean SPLIT=train.clean.100 MEL=24k (54 hours, 247 speakers). Clips should be sentences of up to 15 seconds: a
# transcript belongs to a whole clip. Costs below are estimates from parameter and step counts for 8 GPUs, not
# measurements. A second call resumes where the first one stopped. docs/training.md says what each step does.
set -euo pipefail
. "$(dirname "$0")/heading.sh"
DATASET=${DATASET:-my_speech}
CONFIG=${CONFIG:-}
SPLIT=${SPLIT:-train}
to_repository DATASET
GPUS=${GPUS:-8}
RUN=${RUN:-voice}
MEL=${MEL:-22k}
SIZE=${SIZE:-medium}
SPOKEN=${SPOKEN:-en-us}
SPEAKER=${SPEAKER:-}
# Steps of the stages and between evaluations; when the adversaries of vocoder and VAE join, and over how many steps.
VOCODER_STEPS=${VOCODER_STEPS:-200000}
VAE_STEPS=${VAE_STEPS:-100000}
TUNING_STEPS=${TUNING_STEPS:-20000}
SPEECH_STEPS=${SPEECH_STEPS:-100000}
EVERY=${EVERY:-5000}
GAN_START=${GAN_START:-5000}
VAE_GAN_START=${VAE_GAN_START:-50000}
GAN_RAMP=${GAN_RAMP:-1000}
# Learning rates; per process and step: crops, frames of a vocoder's crop, latent frames of speech.
VAE_RATE=${VAE_RATE:-5e-4}
SPEECH_RATE=${SPEECH_RATE:-1e-3}
BATCH=${BATCH:-16}
SEGMENT=${SEGMENT:-64}
FRAMES=${FRAMES:-4000}
# The vocoder's discriminators, and how many held-out clips are measured.
DISCRIMINATOR=${DISCRIMINATOR:-full}
CLIPS=${CLIPS:-100}

audio=cached_datasets/${RUN}_audio
reconstructed=cached_datasets/${RUN}_through_vae
latents=cached_datasets/${RUN}_latents
vocoder=runs/vocoder/$RUN
audio_vae=runs/audio_vae/$RUN
tuned=runs/vocoder/${RUN}_through_vae
speech=runs/audio_diffusion/$RUN

# A stage on several GPUs under DeepSpeed, on one GPU, or on the CPU.
train() {
    if [ "$GPUS" -gt 1 ]; then
        deepspeed --num_gpus="$GPUS" "$@" --use_deepspeed --deepspeed_config ds_config_zero-1.json --bf16 --num_workers 4
    elif [ "$GPUS" -eq 1 ]; then
        python "$@" --bf16 --num_workers 4
    else
        python "$@"
    fi
}

heading "Log-mels and waveforms"
# 1. Log-mels and waveforms: an hour for 50 hours of sound on 16 cores, 26 GB.
python preprocess_audio_vocoder_dataset.py --dataset_name "$DATASET" --dataset_config "$CONFIG" \
    --dataset_split "$SPLIT" --mel "$MEL" --trim_db 40 --output_dir "$audio"

heading "Vocoder"
# 2. Vocoder, medium: 14 M parameters, discriminators of published size, about 12 hours.
train pretrain_vocoder.py --config "$SIZE" --run_name "$RUN" --cached_dataset "$audio" --resume_from_checkpoint latest \
    --batch_size "$BATCH" --segment_frames "$SEGMENT" --discriminator "$DISCRIMINATOR" --max_steps "$VOCODER_STEPS" \
    --gan_start_step "$GAN_START" --gan_ramp_steps "$GAN_RAMP" --eval_steps "$EVERY" --save_steps "$EVERY"
once "$vocoder" python evaluate.py --checkpoint "$vocoder" --contact_sheet 8 --max_samples "$CLIPS"

heading "Audio VAE-GAN"
# 3. Audio VAE-GAN, medium: 11 M parameters, 20 latent channels at half the frame rate, about 3 hours. In the table, the
#    row of VAE and vocoder is the best that speech can reach.
train pretrain_audio_vae.py --config "$SIZE" --run_name "$RUN" --cached_dataset "$audio" \
    --resume_from_checkpoint latest --batch_size "$BATCH" --learning_rate "$VAE_RATE" --max_steps "$VAE_STEPS" \
    --gan_start_step "$VAE_GAN_START" --eval_steps "$EVERY" --save_steps "$EVERY" --vocoder_checkpoint "$vocoder"
once "$audio_vae" python evaluate.py --checkpoint "$audio_vae" --vocoder_checkpoint "$vocoder" \
    --contact_sheet 8 --max_samples "$CLIPS"

heading "Vocoder, fine-tuned on the log-mels of the VAE"
# 4. The vocoder again, on the VAE's log-mels beside the recorded waveforms: about an hour. Its table is that of step 3
#    with the new vocoder.
python preprocess_audio_vocoder_dataset.py --dataset_name "$DATASET" --dataset_config "$CONFIG" \
    --dataset_split "$SPLIT" --trim_db 40 --through_vae "$audio_vae" --output_dir "$reconstructed"
train pretrain_vocoder.py --config "$SIZE" --run_name "${RUN}_through_vae" --cached_dataset "$reconstructed" \
    --init_from "$vocoder" --resume_from_checkpoint latest --batch_size "$BATCH" --segment_frames "$SEGMENT" \
    --discriminator "$DISCRIMINATOR" --learning_rate 5e-4 --max_steps "$TUNING_STEPS" --gan_start_step 0 \
    --gan_ramp_steps "$GAN_RAMP" --eval_steps "$EVERY" --save_steps "$EVERY"
once "$tuned/after_vae" python evaluate.py --checkpoint "$audio_vae" --vocoder_checkpoint "$tuned" \
    --max_samples "$CLIPS" --cached_dataset "$audio" --output_dir "$tuned/after_vae"

heading "Text to speech"
# 5. Latents, phonemes and their durations; then speech, medium: 58 M parameters, about 5 hours.
python preprocess_audio_diffusion_dataset.py --audio_cache "$audio" --vae_checkpoint "$audio_vae" \
    --language "$SPOKEN" --output_dir "$latents"
train pretrain_audio_diffusion.py --config "$SIZE" --run_name "$RUN" --cached_dataset "$latents" \
    --vae_checkpoint "$audio_vae" --vocoder_checkpoint "$tuned" --resume_from_checkpoint latest \
    --batch_frames "$FRAMES" --learning_rate "$SPEECH_RATE" --max_steps "$SPEECH_STEPS" --eval_steps "$EVERY" \
    --save_steps "$EVERY"
once "$speech" python evaluate.py --checkpoint "$speech" --vocoder_checkpoint "$tuned" \
    --waveforms "$audio" --contact_sheet 8 --max_samples "$CLIPS"

heading "Three sentences"
# 6. Three sentences, of several speakers by SPEAKER or the first one, and the vocoder as ONNX.
names='import json, sys; rows = json.load(open(sys.argv[1]))["entries"]["train"]; s = {r["speaker"] for r in rows} - {""}'
SPEAKER=${SPEAKER:-$(python -c "$names; print(min(s) if len(s) > 1 else '')" "$latents/manifest.json")}
python inference/text_to_speech.py --checkpoint "$speech" --vocoder_checkpoint "$tuned" --speaker "$SPEAKER" \
    --output_dir "$speech/sentences" --text "The train to the coast leaves at half past nine." \
    "Who left the window open?" "I would rather walk home."
python inference/export_vocoder.py --checkpoint "$tuned" --output "$tuned/vocoder.onnx"

heading "Done"
echo "tables       $vocoder, $audio_vae, $tuned/after_vae, $speech: metrics.json"
echo "sentences    $speech/sentences"
echo "vocoder      $tuned/vocoder.onnx"
echo "TensorBoard  make tensorboard"
next "python inference/text_to_speech.py --checkpoint $speech --vocoder_checkpoint $tuned --text '...'"
