# The help texts that Python carries with it -> a language model -> bits per byte, continued prompts.
texts=runs/multimodal/demo_text

heading "Language model"
step "$texts" torchrun --standalone --nproc_per_node=2 pretrain_multimodal.py --config tiny --run_name demo_text \
    --text_dataset python-topics --cached_dataset cached_datasets/demo_text --tokenizer bpe \
    --tokenizer_vocab_size 4096 --sequence_length 128 --batch_size 4 --max_steps 320 --learning_rate 3e-3 \
    --adam_beta2 0.95 --weight_decay 0.1 \
    --logging_steps 20 --eval_steps 80 --save_steps 160 --resume_from_checkpoint latest
beside "$texts/metrics.json" python evaluate.py --checkpoint "$texts"
step "$texts/continuations" python inference/generate_text.py --checkpoint "$texts" --temperature 0.8 --top_p 0.95 \
    --max_new_tokens 96 --output_dir "$texts/continuations" \
    --prompts "The lambda expression" "A class definition" "An exception is"

next "python inference/generate_text.py --checkpoint $texts --prompts 'A list'"
