"""Flags of other trainers are answered with ours, and never taken."""

import pytest

from utils.command_line import parse_arguments
from utils.evaluation.arguments.every_stage import EvaluateArguments
from utils.exporting.arguments import ExportModelArguments
from utils.flags.peers import PEERS
from utils.generation.arguments.audio_diffusion import TextToAudioArguments, TextToSpeechArguments
from utils.generation.arguments.image import TextToImageArguments
from utils.generation.arguments.text import GenerateTextArguments
from utils.options import declared_fields
from utils.preprocessing.arguments import ImageVAEPreprocessArguments
from utils.preprocessing.audio_arguments import AudioDiffusionPreprocessArguments
from utils.training.arguments.audio_vae import AudioVAEArguments
from utils.training.arguments.diffusion import AudioDiffusionArguments, ImageDiffusionArguments
from utils.training.arguments.image_vae import ImageVAEGANArguments
from utils.training.arguments.multimodal import MultimodalArguments


def error(arguments: type, words: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments, words.split(), "")
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words", "ours"),
    [
        # diffusers' scripts; `--lr` is also the beginning of our --lr_scheduler_type.
        (ImageDiffusionArguments, "--train_batch_size 16", "--batch_size"),
        (ImageDiffusionArguments, "--lr 1e-4", "--learning_rate"),
        (ImageDiffusionArguments, "--lr=1e-4", "--learning_rate"),
        (ImageDiffusionArguments, "--warmup_steps 500", "--warmup_ratio"),
        (ImageDiffusionArguments, "--lr_warmup_steps 500", "--warmup_ratio"),
        (ImageDiffusionArguments, "--train_data_dir images", "--cached_dataset"),
        (ImageDiffusionArguments, "--dataset_name images", "--cached_dataset"),
        (ImageDiffusionArguments, "--checkpointing_steps 500", "--save_steps"),
        (ImageDiffusionArguments, "--checkpoints_total_limit 2", "--save_total_limit"),
        (ImageDiffusionArguments, "--mixed_precision bf16", "--bf16"),
        (ImageDiffusionArguments, "--gradient_checkpointing", "--use_gradient_checkpointing"),
        (ImageDiffusionArguments, "--max_train_steps 9", "--max_steps"),
        (ImageDiffusionArguments, "--snr_gamma 5", "--min_snr_gamma"),
        (ImageDiffusionArguments, "--resolution 64", "--override"),
        # Adapters: diffusers, PEFT and litgpt, axolotl and LLaMA-Factory.
        (ImageDiffusionArguments, "--rank 4", "--lora_rank"),
        (ImageDiffusionArguments, "--network_dim 4", "--lora_rank"),
        (ImageDiffusionArguments, "--lora_layers to_q", "--lora_modules"),
        (MultimodalArguments, "--lora_dim 4", "--lora_rank"),
        (MultimodalArguments, "--lora_target_modules q_proj", "--lora_modules"),
        (MultimodalArguments, "--target_modules q_proj", "--lora_modules"),
        (MultimodalArguments, "--lora_target all", "--lora_modules"),
        (ImageVAEPreprocessArguments, "--train_data_dir images", "--dataset_name"),
        (ImageVAEPreprocessArguments, "--resolution 64", "--image_size"),
        (ImageVAEPreprocessArguments, "--dataset_config_name x", "--dataset_config"),
        # transformers, litgpt, torchtitan, nanochat, and names with hyphens as in stable-audio-tools and F5-TTS.
        (MultimodalArguments, "--per_device_train_batch_size 16", "--batch_size"),
        (MultimodalArguments, "--train.micro_batch_size 4", "--batch_size"),
        (MultimodalArguments, "--training.steps 4", "--max_steps"),
        (MultimodalArguments, "--train.max_steps 4", "--max_steps"),
        (MultimodalArguments, "--num_iterations 4", "--max_steps"),
        (MultimodalArguments, "--block_size 256", "--sequence_length"),
        (MultimodalArguments, "--train_file texts.txt", "--text_dataset"),
        (AudioVAEArguments, "--accum-batches 8", "--gradient_accumulation_steps"),
        (AudioVAEArguments, "--checkpoint-every 8", "--save_steps"),
        (AudioDiffusionArguments, "--exp_name a", "--run_name"),
        (AudioDiffusionArguments, "--save_per_updates 8", "--save_steps"),
        (AudioDiffusionArguments, "--epochs 8", "--num_train_epochs"),
        (AudioDiffusionPreprocessArguments, "--vae runs/a", "--vae_checkpoint"),
        # Inference and evaluation.
        (TextToImageArguments, "--num_inference_steps 20", "--n_steps"),
        (TextToImageArguments, "--prompt x", "--prompts"),
        (TextToImageArguments, "--cfg_scale 3", "--guidance_scale"),
        (EvaluateArguments, "--model runs/a", "--checkpoint"),
        (EvaluateArguments, "--num_samples 5", "--max_samples"),
    ],
)
def test_a_peers_flag_is_answered_with_ours(arguments, words, ours, capsys):
    message = error(arguments, words, capsys)
    flag = words.split()[0].partition("=")[0]
    assert f"unknown argument {flag}; here it is {ours}: " in message


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--run_nam x", "did you mean '--run_name'?"),
        ("--run=x", "did you mean '--run_name'?"),
        ("--max_grad 2", "did you mean '--max_grad_norm'?"),
        ("--lr_scheduler linear", "here it is --lr_scheduler_type: "),
        ("--lora_r 4 --init_from x", "here it is --lora_rank: "),
        ("--warmup 500", "here it is --warmup_ratio: "),
    ],
)
def test_abbreviations_are_refused_and_answered_with_the_flag(words, ours, capsys):
    message = error(ImageDiffusionArguments, words, capsys)
    assert f"unknown argument {words.split()[0]}" in message and ours in message


def test_another_spelling_of_ours_is_suggested(capsys):
    assert "did you mean '--batch_size'" in error(AudioVAEArguments, "--batch-size 8", capsys)
    assert "did you mean '--batch_size'" in error(AudioVAEArguments, "--batch_Size 8", capsys)


def test_what_ours_means_is_said(capsys):
    assert "fraction of the steps" in error(ImageVAEGANArguments, "--warmup_steps 100", capsys)


@pytest.mark.parametrize("arguments", [ImageVAEGANArguments, MultimodalArguments, EvaluateArguments])
def test_flags_of_ours_are_taken_where_a_peers_name_is_ours_too(arguments, capsys):
    names = {field.name for field in declared_fields(arguments)} & set(PEERS)
    for name in names:
        try:
            parse_arguments(arguments, [f"--{name}"], "")
        except SystemExit:
            assert "here it is" not in capsys.readouterr().err


def test_every_answer_is_a_flag_of_some_script():
    scripts = [ImageVAEPreprocessArguments, AudioDiffusionPreprocessArguments, MultimodalArguments, EvaluateArguments]
    scripts += [AudioVAEArguments, AudioDiffusionArguments, ImageDiffusionArguments, ExportModelArguments]
    scripts += [TextToImageArguments, TextToAudioArguments, TextToSpeechArguments, GenerateTextArguments]
    known = {field.name for script in scripts for field in declared_fields(script)} | {"config_file"}
    assert {candidate for answer in PEERS.values() for candidate in answer.split()} <= known
