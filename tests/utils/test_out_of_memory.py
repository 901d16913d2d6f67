"""Full memory ends a command with the flags that help: real allocations that fail, in training, evaluation and
generation."""

import logging

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset

import evaluate
from inference.text_to_image import TextToImageArguments, generate
from pretrain_audio_diffusion import AudioDiffusionStage
from pretrain_audio_vae import AudioVAEStage
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from pretrain_vocoder import VocoderStage
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import SMALL_RUN, changed
from utils.checkpoints import explained_loading
from utils.command_line import explained_errors, memory_flags, parse_arguments

TOO_MANY = 10**15  # numbers: four petabytes, beyond the addresses of a process


@pytest.fixture
def error_of(caplog, fresh_logging):
    """error_of(function) -> the message of a command that ends with status 2 for lack of memory."""

    def run(function) -> str:
        with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as end:
            function()
        assert end.value.code == 2 and "out of memory (" in caplog.text, caplog.text
        return caplog.text

    return run


@pytest.fixture
def full_in_forward():
    """The first module that is called finds no memory. What a limited address space does instead differs from machine
    to machine: libraries below torch end the process."""
    hook = register_module_forward_pre_hook(lambda *_: torch.empty(TOO_MANY))
    yield
    hook.remove()


def test_a_training_names_batch_and_switches(image_cache, tmp_path, error_of):
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", "9"]
    words = [*words, "--batch_size", "64", "--discriminator_channels", str(10**13)]  # petabytes
    message = error_of(lambda: ImageVAEStage.main(changed(SMALL_RUN, *words)))
    assert "--batch_size 32 --gradient_accumulation_steps 2, or --use_gradient_checkpointing, or --bf16" in message


def test_the_evaluation_of_a_training_names_its_own_batch(image_cache, tmp_path, error_of):
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", "2"]
    stage = ImageVAEStage(parse_arguments(ImageVAEStage.arguments_class, [*SMALL_RUN, *words], ""))

    def evaluation():
        with explained_errors(logging.getLogger("test")):
            evaluate_absurdly(stage)

    assert "--eval_batch_size 8, or --bf16" in error_of(evaluation)


def evaluate_absurdly(stage) -> None:
    def evaluate() -> None:
        torch.empty(TOO_MANY)

    evaluate()


def test_evaluate_py_names_its_batch(image_cache, tmp_path, error_of, full_in_forward):
    checkpoint = save_checkpoint(tmp_path / "run", image_cache)
    words = ["--checkpoint", str(checkpoint), "--split", "train", "--batch_size", "64"]
    assert "--batch_size 32, or --bf16, or --max_samples" in error_of(lambda: evaluate.main(words))


def test_generation_names_its_batch(latent_cache, tmp_path, error_of, full_in_forward):
    checkpoint = save_diffusion_checkpoint(tmp_path / "run", latent_cache)
    words = ["--checkpoint", str(checkpoint), "--prompts", "a", "--n_images", "4096", "--batch_size", "4096"]
    words += ["--output_dir", str(tmp_path / "out"), "--n_steps", "2"]

    def generation():
        with explained_errors(logging.getLogger("test")):
            generate(parse_arguments(TextToImageArguments, words, ""))

    assert "--batch_size 2048" in error_of(generation)


def test_a_file_that_memory_has_no_room_for_is_not_called_damaged(tmp_path, error_of):
    def load():
        with explained_errors(logging.getLogger("test")), explained_loading(tmp_path / "model.safetensors"):
            torch.empty(TOO_MANY)

    assert "model.safetensors" in error_of(load)


class Absurd(Dataset):
    """One item of petabytes."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.empty(TOO_MANY)


def test_a_loading_process_names_their_number_first(error_of):
    parse_arguments(ImageVAEStage.arguments_class, ["--num_workers", "2"], "")

    def load():
        with explained_errors(logging.getLogger("test")):
            next(iter(DataLoader(Absurd(), num_workers=1)))

    assert "give --num_workers 0, or --batch_size 8 " in error_of(load)


@pytest.mark.parametrize(
    ("stage", "given", "flags"),
    [
        (ImageVAEStage, ["--batch_size", "1"], ["--use_gradient_checkpointing", "--bf16", "--no_use_ema"]),
        (ImageVAEStage, ["--batch_size", "1", "--bf16", "--use_gradient_checkpointing"], ["--no_use_ema"]),
        (VocoderStage, ["--bf16"], ["--use_gradient_checkpointing", "--segment_frames 16"]),
        (AudioVAEStage, ["--bf16", "--segment_frames", "0"], ["--use_gradient_checkpointing", "--segment_frames 64"]),
        (AudioDiffusionStage, ["--bf16"], ["--batch_frames 400 --gradient_accumulation_steps 2"]),
        (MultimodalStage, ["--bf16", "--use_gradient_checkpointing"], ["--sequence_length 128"]),
    ],
)
def test_flags_that_are_set_or_have_no_effect_are_not_named(stage, given, flags):
    args = parse_arguments(stage.arguments_class, given, "")
    named = memory_flags(args)
    assert set(flags) <= set(named) and len(named) <= 3
    # The command takes each of them.
    for flag in named:
        assert parse_arguments(stage.arguments_class, changed(given, *flag.split()), "")
