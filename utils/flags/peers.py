"""Flags of other trainers and what they are called here: who types them is told our name. They are never taken
silently, since units differ: steps or a fraction of them, per process or in all."""

from collections.abc import Collection

# Our flags, the first of which that a script has is the answer. Names are written with underscores; of names with a
# dot, such as --training.steps, the part behind it is looked up as well.
PEERS: dict[str, str] = {
    name: ours
    for ours, names in {
        # Length and batches: transformers, diffusers, nanochat, litgpt, torchtitan, F5-TTS.
        "batch_size": "train_batch_size per_device_train_batch_size per_device_batch_size device_batch_size "
        "micro_batch_size local_batch_size batch_size_per_gpu bs batch",
        "batch_size gradient_accumulation_steps": "global_batch_size total_batch_size effective_batch_size",
        "eval_batch_size batch_size": "per_device_eval_batch_size validation_batch_size val_batch_size",
        "gradient_accumulation_steps": "grad_accumulation_steps grad_accum gradient_accumulation accum_batches "
        "accumulate_grad_batches accumulation_steps grad_accum_steps gradient_accumulation_iters",
        "max_steps n_steps": "max_train_steps num_train_steps train_steps total_steps num_iterations num_steps steps "
        "iters max_iters iterations num_updates max_updates training_steps",
        "num_train_epochs": "epochs num_epochs max_epochs n_epochs max_train_epochs",
        "sequence_length": "max_seq_len max_seq_length max_sequence_length seq_len seq_length block_size "
        "context_length model_max_length",
        "batch_frames": "max_frames frames_threshold",
        # Optimizer.
        "learning_rate": "lr max_lr base_lr peak_lr",
        "lr_scheduler_type": "lr_scheduler scheduler scheduler_type lr_schedule lr_decay_style decay_type",
        "warmup_ratio": "warmup warmup_steps lr_warmup_steps num_warmup_steps num_warmup_updates warmup_iters "
        "lr_warmup warmup_epochs warmup_fraction lr_warmup_ratio",
        "weight_decay": "wd adam_weight_decay",
        "adam_beta1": "beta1 adam_b1",
        "adam_beta2": "beta2 adam_b2",
        "max_grad_norm": "grad_clip clip_grad gradient_clip_val gradient_clipping max_norm grad_clip_norm",
        "discriminator_learning_rate": "disc_lr lr_disc discriminator_lr",
        "use_ema": "ema do_ema use_exponential_moving_average",
        "ema_decay": "ema_rate ema_beta ema_momentum",
        # Speed and memory.
        "bf16": "mixed_precision precision fp16 half amp use_amp train_precision autocast",
        "tf32": "allow_tf32",
        "use_gradient_checkpointing": "gradient_checkpointing activation_checkpointing grad_checkpointing "
        "activation_checkpoint checkpoint_activations",
        "compile_model": "compile torch_compile",
        "use_deepspeed deepspeed_config": "deepspeed ds_config deepspeed_config_file",
        "num_workers": "dataloader_num_workers workers n_workers data_loader_workers preprocessing_num_workers "
        "num_proc",
        # Logs and checkpoints.
        "save_steps": "checkpointing_steps save_every save_interval checkpoint_every save_per_updates ckpt_interval "
        "checkpoint_step_interval checkpoint_interval save_freq checkpointing_interval",
        "save_total_limit": "checkpoints_total_limit keep_last_n_checkpoints max_checkpoints",
        "eval_steps": "validation_steps eval_every eval_interval val_every val_check_interval validation_interval "
        "validation_epochs",
        "logging_steps": "log_every log_interval log_freq log_every_n_steps print_every",
        "n_logged_samples n_samples": "log_samples num_validation_images",
        "report_to": "logger use_wandb wandb log_with",
        "run_name": "exp_name experiment_name experiment job_name name model_tag tracker_project_name wandb_run_name",
        "output_dir output": "out_dir save_dir output_path outdir logging_dir log_dir save_path dump_folder "
        "results_dir checkpoint_dir",
        "resume_from_checkpoint": "resume resume_from resume_path ckpt_path resume_training",
        "init_from checkpoint": "pretrained_model_name_or_path model_name_or_path pretrained_ckpt_path finetune_from "
        "load_from pretrain initial_checkpoint_dir unet_init pretrained",
        "checkpoint": "model model_path ckpt checkpoint_path weights_path model_dir",
        "config": "model_name model_type preset arch model_config depth flavor",
        "override": "config_overrides opts model_args",
        "config_file": "config_path configs yaml",
        # Data.
        "dataset_name text_dataset cached_dataset": "train_data_dir data_dir dataset data data_path train_data "
        "dataset_path instance_data_dir train_file dataset_dir data_root dataset_name audio_dir image_dir",
        "cached_dataset": "cache_dir preprocessed_data latents_dir data_backend_config dataset_config",
        "dataset_config": "dataset_config_name",
        "dataset_split": "split_name train_split",
        "caption_column text_column": "text_field prompt_column",
        "media_column": "image_column audio_column",
        "validation_dataset": "validation_data_dir validation_file val_data_dir eval_dataset",
        "validation_fraction": "val_split validation_split_percentage test_size val_fraction",
        "limit max_samples": "max_train_samples max_eval_samples num_samples",
        "image_size override": "resolution img_size image_resolution size",
        "resize_mode": "center_crop random_crop",
        "horizontal_flip": "random_flip hflip flip",
        "sample_rate mel": "sampling_rate sr target_sample_rate",
        # Models of captions and of audio.
        "vae_checkpoint": "vae pretrained_vae_model_name_or_path vae_path autoencoder pretransform_ckpt_path",
        "vocoder_checkpoint": "vocoder vocoder_path",
        "text_encoder": "text_encoder_name clip_model text_encoder_path",
        "caption_dropout": "caption_dropout_probability cfg_dropout_prob proportion_empty_prompts uncond_prob "
        "cfg_prob conditioning_dropout_prob",
        "min_snr_gamma": "snr_gamma",
        "lora_rank": "rank lora_r lora_dim network_dim use_lora lora use_peft",
        "lora_alpha": "network_alpha lora_scaling lora_scale",
        "lora_modules": "lora_target_modules target_modules lora_target lora_layers lora_attn_modules",
        # Sampling.
        "n_steps": "num_inference_steps sampling_steps inference_steps ddim_steps nfe nfe_step denoising_steps",
        "guidance_scale": "cfg cfg_scale cfg_strength guidance scale",
        "prompts text": "prompt validation_prompt validation_prompts input_text gen_text",
        "prompt_file input": "prompts_file prompt_path gen_file",
        "n_images n_sounds n_texts": "num_images num_images_per_prompt n_iter num_return_sequences",
        "seeds seed": "random_seed manual_seed",
        "max_new_tokens": "max_tokens max_length max_gen_len",
    }.items()
    for name in names.split()
}


def our_flag(flag: str, known: Collection[str]) -> str:
    """The name of ours that a flag of another trainer stands for; empty where there is none.

    Args:
        flag: as it was typed, such as `--train-batch-size`.
        known: names of the script's flags.
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    _, dot, last = name.rpartition(".")
    for candidates in (PEERS.get(name, ""), PEERS.get(last, ""), last if dot else ""):
        for candidate in candidates.split():
            if candidate in known:
                return candidate
    return ""
