"""Training on clips of different lengths: accumulation, resume and recomputation change nothing; sums are over valid
frames; the duration factor."""

import json
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset

from model.audio.diffusion import AudioDiffusion, AudioDiffusionConfig
from model.presets import AUDIO_DIFFUSION
from tests.helpers.runs import equal, largest_difference, run_stage
from tests.helpers.speech_batch import collate, speech_clips
from utils.checkpoints import load_model
from utils.training.arguments.diffusion import AudioDiffusionArguments
from utils.training.audio_diffusion import AudioDiffusionTrainer
from utils.training.stage import Stage


class Clips(Dataset):
    """Random clips in memory."""

    fingerprint = "random clips"

    def __init__(self, n_clips: int, seed: int):
        self.clips = speech_clips([3 + i % 9 for i in range(n_clips)], n_channels=20, seed=seed)
        self.lengths = [len(clip["latents"]) for clip in self.clips]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return self.clips[index]


class ClipsStage(Stage):
    name = "audio_diffusion"
    arguments_class = AudioDiffusionArguments
    config_class, model_class, presets = AudioDiffusionConfig, AudioDiffusion, AUDIO_DIFFUSION
    trainer_class = AudioDiffusionTrainer

    def build_dataset(self, split, config):
        return Clips(32, 0) if split == "train" else Clips(5, 1)

    def build_collator(self, config):
        return partial(collate, padding=2)


SMALL = """widths=[16,24] n_blocks=[1,1] n_attentions=[0,1] head_width=8 conditioning_width=16 text_width=16
    frame_width=16 n_symbols=12 speakers=["a","b"]""".split()  # noqa: SIM905
COMMON = """--config tiny --batch_frames 0 --logging_steps 1 --eval_steps 1000 --save_steps 1000 --n_time_buckets 2
    --eval_batch_size 2""".split()  # noqa: SIM905


@pytest.fixture
def train(tmp_path, fresh_logging):
    """train(name, steps, *flags, text_dropout=0.0) -> Run."""

    def call(name, steps, *flags, text_dropout=0.0):
        override = ["--override", *SMALL, f"text_dropout={text_dropout}", f"network_dropout={text_dropout}"]
        return run_stage(ClipsStage, COMMON, tmp_path, tmp_path, name, steps, *override, *flags)

    return call


def history(run):
    return json.loads((run.folder / "trainer_state.json").read_text())["log_history"]


def test_accumulation_and_recomputation_change_nothing(train):
    whole = train("whole", 4, "--batch_size", "8", text_dropout=0.2)
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "4", "--use_gradient_checkpointing"]
    parts = train("parts", 4, *flags, text_dropout=0.2)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert largest_difference(whole.weights(), parts.weights()) <= 1e-4
    for one, two in zip(history(whole), history(parts)):
        assert all(
            two[name] == pytest.approx(one[name], rel=1e-4) for name in one if name.startswith(("loss", "eval"))
        )


def test_a_budget_of_frames_gives_the_same_steps_in_parts(train):
    whole = train("whole", 4, "--batch_frames", "80", text_dropout=0.2)
    flags = ["--batch_frames", "40", "--gradient_accumulation_steps", "2", "--eval_steps", "2"]
    parts = train("parts", 4, *flags, text_dropout=0.2)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert largest_difference(whole.weights(), parts.weights()) <= 1e-4
    frames = [line["frames_per_step"] for line in history(whole) if "loss" in line]
    assert all(0 < count <= 80 for count in frames) and len(set(frames)) > 1


def test_resumed_equals_straight_through_also_with_dropout(train, tmp_path):
    flags = ["--batch_frames", "80", "--save_steps", "3", "--trainer", "grokfast_ema"]
    straight = train("straight", 6, *flags, text_dropout=0.2)
    half = tmp_path / "audio_diffusion" / "half"
    half.mkdir()
    (straight.folder.parent / "checkpoint-3").rename(half / "checkpoint-3")
    resumed = train("half", 6, *flags, "--resume_from_checkpoint", text_dropout=0.2)
    for name in ("model", "ema"):
        assert equal(straight.weights(name), resumed.weights(name))
        assert straight.weights(name)["duration_factor"] != 1
    assert straight.losses == resumed.losses


def test_bf16_is_close_to_fp32(train):
    runs = [train("fp32", 4, "--batch_size", "8"), train("bf16", 4, "--batch_size", "8", "--bf16")]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=0.01) and runs[1].losses != runs[0].losses
    assert all(value.dtype == torch.float32 for value in runs[1].weights().values())


def test_logged_losses_are_means_over_the_frames_and_tokens_of_the_step(train):
    """Fresh weights predict nothing, so that the first losses are known from the data."""
    run = train("first", 1, "--batch_size", "32", "--prior_weight", "0.25", "--duration_weight", "2")
    line = history(run)[0]
    assert line["frames_per_step"] == sum(len(clip["latents"]) for clip in Clips(32, 0).clips)
    # |noise - x|^2 of unit data has mean 2; the prior has random weights.
    assert line["loss/mse"] == pytest.approx(2, rel=0.1) and 1 < line["loss/prior"] < 2
    assert line["loss"] == pytest.approx(line["loss/mse"] + 0.25 * line["loss/prior"] + 2 * line["loss/duration"])


def test_evaluation_is_the_mean_over_frames_whatever_the_batches(train):
    flags = ("--batch_size", "8")
    lines = [history(train(f"by {n}", 2, *flags, "--eval_batch_size", n))[-1] for n in ("1", "5")]
    names = [name for name in lines[0] if name.startswith("eval_")]
    assert {"eval_loss", "eval_flow", "eval_prior", "eval_duration", "eval_length_ratio"} <= set(names)
    assert [lines[1][name] for name in names] == pytest.approx([lines[0][name] for name in names], rel=1e-4)
    buckets = [lines[0][name] for name in names if name.startswith("eval_loss_t")]
    assert len(buckets) == 2 and lines[0]["eval_flow"] == pytest.approx(sum(buckets) / 2)
    weighted = lines[0]["eval_flow"] + lines[0]["eval_prior"] + 0.5 * lines[0]["eval_duration"]
    assert lines[0]["eval_loss"] == pytest.approx(weighted)


def test_the_duration_factor_is_real_over_predicted_frames(train):
    run = train("factor", 20, "--batch_size", "32", "--learning_rate", "2e-2", "--ema_decay", "0.5")
    model = load_model(AudioDiffusion, run.folder)
    batch = collate(Clips(32, 0).clips)
    text = model.encode_speech(batch["tokens"], batch["n_tokens"], speakers=batch["speakers"])
    predicted = model.expected_durations(text.log_durations).where(text.mask, 0).sum()
    assert model.duration_factor == pytest.approx((batch["durations"].sum() / predicted).item(), rel=1e-4)
    assert 0.5 < model.duration_factor < 2 and model.duration_factor != 1
