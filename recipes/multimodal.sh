#!/usr/bin/env bash
# One transformer over text, images and audio, on the latents of recipes/image.sh and recipes/audio.sh.
#
#   bash recipes/multimodal.sh                     # 8 GPUs, after recipes/image.sh and recipes/audio.sh
#   GPUS=1 bash recipes/multimodal.sh              # one GPU
#   NODES=hostfile bash recipes/multimodal.sh      # all GPUs of the machines in DeepSpeed's hostfile
#
#   GPUS=0 SIZE=tiny IMAGES=cached_datasets/scenes_latents AUDIO=cached_datasets/captions_latents \
#       VOCODER=runs/vocoder/demo STEPS=3000 EVERY=1000 BATCH=72 RATE=1.5e-3 WARMUP=0.03 EMA=0.995 \
#       bash recipes/multimodal.sh                 # a CPU, after recipes/demo.sh, half an hour on one core
#
# Captions and transcripts are the texts. An image and a clip whose files have the same name are one item; others have one
# modality beside their text. On several nodes the repository and the caches lie in a folder that all of them see.
# Costs on GPUs have not been measured. A second call resumes where the first one stopped.
set -euo pipefail
. "$(dirname "$0")/heading.sh"
GPUS=${GPUS:-8}
NODES=${NODES:-}
RUN=${RUN:-streams}
SIZE=${SIZE:-small}
IMAGES=${IMAGES:-cached_datasets/hub_latents}
AUDIO=${AUDIO:-cached_datasets/voice_latents}
VOCODER=${VOCODER:-runs/vocoder/voice_through_vae}
to_repository IMAGES AUDIO VOCODER NODES
STEPS=${STEPS:-100000}
EVERY=${EVERY:-5000}
# Rows per process and step; peak learning rate, its warm-up, decay of the weight average.
BATCH=${BATCH:-32}
RATE=${RATE:-4e-4}
WARMUP=${WARMUP:-0.02}
EMA=${EMA:-0.9999}
# What is drawn and spoken in the end.
DRAW=${DRAW:-a small penguin on red}
SPEAK=${SPEAK:-a small penguin on red}

# A stage under DeepSpeed on several machines or GPUs, on one GPU, or on the CPU.
train() {
    if [ -n "$NODES" ]; then
        deepspeed --hostfile="$NODES" "$@" --use_deepspeed --deepspeed_config ds_config_zero-2.json --num_workers 4
    elif [ "$GPUS" -gt 1 ]; then
        deepspeed --num_gpus="$GPUS" "$@" --use_deepspeed --deepspeed_config ds_config_zero-2.json --num_workers 4
    else
        python "$@"
    fi
}

heading "Text, images and audio in one stream"
# 1. Understanding is learnt long before generation, which gets most of the rows.
train pretrain_multimodal.py --config "multimodal-$SIZE" --run_name "$RUN" --include_modes text image audio \
    --image_latents "$IMAGES" --audio_latents "$AUDIO" --vocoder_checkpoint "$VOCODER" \
    --tasks image-text:1 text-image:6 audio-text:1 text-audio:8 --bf16 --batch_size "$BATCH" \
    --learning_rate "$RATE" --warmup_ratio "$WARMUP" --adam_beta2 0.95 --ema_decay "$EMA" --max_steps "$STEPS" \
    --eval_steps "$EVERY" --save_steps "$EVERY" --resume_from_checkpoint latest

heading "Metrics of every direction"
# 2. Every direction beside its control, images and wav files.
once "runs/multimodal/$RUN" python evaluate.py --checkpoint "runs/multimodal/$RUN" --vocoder_checkpoint "$VOCODER" \
    --contact_sheet 16

heading "Answers"
# 3. Answers.
python inference/chat.py --checkpoint "runs/multimodal/$RUN" --vocoder_checkpoint "$VOCODER" \
    --draw "$DRAW" --speak "$SPEAK" --output_dir "runs/multimodal/$RUN/answers"

heading "Done: runs/multimodal/$RUN/answers, metrics.json; curves by make tensorboard"
next "python inference/chat.py --checkpoint runs/multimodal/$RUN --vocoder_checkpoint $VOCODER --draw '...'"
