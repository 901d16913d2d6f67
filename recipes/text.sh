#!/usr/bin/env bash
# The whole text pipeline on several GPUs: texts from the hub -> BPE tokens -> flat and recurrent language models.
#
#   bash recipes/text.sh                          # 8 GPUs, TinyStories (2 GB, about half a billion tokens)
#   DATASET=Salesforce/wikitext SUBSET=wikitext-103-raw-v1 bash recipes/text.sh
#   DATASET=my_texts GPUS=2 bash recipes/text.sh
#
# Any folder of texts, table or hub data set with a text column works. Each file or row is one document, and attention
# does not cross documents: choose a data set with a whole document per row, such as TinyStories (wikitext's rows are
# single paragraphs). Validation uses the data set's own split, or 5 % of the documents if it has none. The costs below
# are estimates from parameter and token counts, not measurements. A second call resumes where the first one stopped.
set -euo pipefail
. "$(dirname "$0")/heading.sh"
DATASET=${DATASET:-roneneldan/TinyStories}
SUBSET=${SUBSET:-}
to_repository DATASET
GPUS=${GPUS:-8}
RUN=${RUN:-hub}

heading "Flat language model"
# 1. Train a BPE tokenizer of 32,000 ids and tokenise the texts: minutes on the CPU. Then train 12 layers of width 768,
#    100 M parameters, 6,000 steps of 256 windows of 1,024 tokens: half an hour on 8 H100.
deepspeed --num_gpus="$GPUS" pretrain_multimodal.py --use_deepspeed --deepspeed_config ds_config_zero-2.json --bf16 \
    --config medium --run_name "$RUN" --cached_dataset "cached_datasets/${RUN}_text" --resume_from_checkpoint latest \
    --text_dataset "$DATASET" --text_config "$SUBSET" --tokenizer bpe --tokenizer_vocab_size 32000 \
    --sequence_length 1024 --batch_size 32 --max_steps 6000 --learning_rate 6e-4 --adam_beta2 0.95 --weight_decay 0.1 \
    --override loss_chunk_size=4096 z_loss_weight=1e-4 --eval_steps 1000 --save_steps 1000
once "runs/multimodal/$RUN" python evaluate.py --checkpoint "runs/multimodal/$RUN"

heading "Language model with recurrent depth"
# 2. The same number of layers, 6 of them in a core that runs 8 times on average: about 4 times the compute of step 1.
deepspeed --num_gpus="$GPUS" pretrain_multimodal.py --use_deepspeed --deepspeed_config ds_config_zero-2.json --bf16 \
    --config recurrent-medium --run_name "${RUN}_recurrent" --cached_dataset "cached_datasets/${RUN}_text" \
    --resume_from_checkpoint latest \
    --sequence_length 1024 --batch_size 16 --gradient_accumulation_steps 2 --max_steps 6000 --learning_rate 4e-4 \
    --adam_beta2 0.95 --weight_decay 0.1 --recurrent_curriculum 0.3 --use_gradient_checkpointing \
    --override loss_chunk_size=4096 z_loss_weight=1e-4 recurrent_exit_criterion=kl --eval_steps 1000 --save_steps 1000
once "runs/multimodal/${RUN}_recurrent" python evaluate.py --checkpoint "runs/multimodal/${RUN}_recurrent" \
    --thinking_steps 1 2 4 8 16 32 --exit_thresholds 0.0001 0.001 0.01 --max_thinking_steps 32

heading "Generation"
# 3. Generation.
python inference/generate_text.py --checkpoint "runs/multimodal/$RUN" --prompts "Once upon a time" --temperature 0.8 --top_p 0.95
python inference/generate_text.py --checkpoint "runs/multimodal/${RUN}_recurrent" --prompts "Once upon a time" --temperature 0.8 \
    --top_p 0.95 --thinking_steps 16 --exit_threshold 0.001

heading "Done: runs/multimodal/$RUN and ${RUN}_recurrent, metrics.json; curves by make tensorboard"
next "python inference/generate_text.py --checkpoint runs/multimodal/$RUN --prompts '...'"
