#!/usr/bin/env bash
# One transformer over text, images and audio, on the latents of recipes/image.sh and recipes/audio.sh.
#
#   bash recipes/multimodal.sh                                # 8 GPUs, after recipes/image.sh and recipes/audio.sh
#   GPUS=1 bash recipes/multimodal.sh                         # one GPU
#   NODES=hostfile bash recipes/multimodal.sh                 # all GPUs of the machines in DeepSpeed's hostfile
#   IMAGES= AUDIO=cached_datasets/voice_latents bash recipes/multimodal.sh   # text and audio only
#   GPUS=0 SIZE=tiny STEPS=3000 BATCH=72 RATE=1.5e-3 WARMUP=0.03 BETA2=0.95 EMA=0.995 EVERY=1000 \
#       IMAGES=cached_datasets/scenes_latents AUDIO=cached_datasets/speech_latents \
#       VOCODER=runs/vocoder/demo bash recipes/multimodal.sh  # a CPU, the data of recipes/demo.sh
#
# Captions and transcripts are the texts. Items of the two sets that have the same file name belong together; others have
# one modality beside their text. On several nodes the repository and the caches lie in a folder that all of them see.
# Costs are not measured on GPUs. A second call resumes where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-8}
NODES=${NODES:-}
RUN=${RUN:-streams}
SIZE=${SIZE:-small}
IMAGES=${IMAGES-cached_datasets/hub_latents}
AUDIO=${AUDIO-cached_datasets/voice_latents}
VOCODER=${VOCODER-runs/vocoder/voice_through_vae}
STEPS=${STEPS:-100000}
EVERY=${EVERY:-5000}
# Rows per process and step; learning rate, its warm-up, AdamW's beta2, decay of the weight average.
BATCH=${BATCH:-32}
RATE=${RATE:-4e-4}
WARMUP=${WARMUP:-0.02}
BETA2=${BETA2:-0.95}
EMA=${EMA:-0.9999}
run=runs/multimodal/$RUN

# What is included; rows per item and epoch: generation takes longer to learn than understanding.
modes=(text) tasks=() latents=() vocoder=()
if [ -n "$IMAGES" ]; then
    modes+=(image) tasks+=(image-text:1 text-image:6) latents+=(--image_latents "$IMAGES")
fi
if [ -n "$AUDIO" ]; then
    modes+=(audio) tasks+=(audio-text:1 text-audio:8) latents+=(--audio_latents "$AUDIO")
    [ -z "$VOCODER" ] || vocoder=(--vocoder_checkpoint "$VOCODER")
fi

# A run under DeepSpeed on several machines or GPUs, on one GPU, or on the CPU.
train() {
    if [ -n "$NODES" ]; then
        deepspeed --hostfile="$NODES" "$@" --use_deepspeed --deepspeed_config ds_config_zero-2.json --num_workers 4
    elif [ "$GPUS" -gt 1 ]; then
        deepspeed --num_gpus="$GPUS" "$@" --use_deepspeed --deepspeed_config ds_config_zero-2.json --num_workers 4
    else
        python "$@"
    fi
}

train pretrain_multimodal.py --config "multimodal-$SIZE" --run_name "$RUN" --include_modes "${modes[@]}" "${latents[@]}" \
    --tasks "${tasks[@]}" --bf16 --batch_size "$BATCH" --learning_rate "$RATE" --warmup_ratio "$WARMUP" \
    --adam_beta2 "$BETA2" --ema_decay "$EMA" --max_steps "$STEPS" --eval_steps "$EVERY" --save_steps "$EVERY" \
    --resume_from_checkpoint latest
python evaluate.py --checkpoint "$run" "${vocoder[@]}"

answers=(--checkpoint "$run" --output_dir "$run/answers")
[ -z "$IMAGES" ] || python inference/chat.py "${answers[@]}" --draw "a small penguin on red"
[ -z "$AUDIO" ] || python inference/chat.py "${answers[@]}" "${vocoder[@]}" --speak "The lamp is behind the door."
