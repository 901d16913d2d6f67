"""What a dry run counts: all networks of a run, their memory as a run has it, and the adversary's phases."""

import warnings

import pytest
import torch

from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import SMALL_RUN, changed
from tests.helpers.text_cache import SMALL_TEXT, make_text
from utils.training.planning.memory import FP32, Engine, memory_of, n_bytes
from utils.training.planning.phases import check_perceptual_start, check_phases

COUNTERS = ("step", "grokfast_count")  # of an optimizer's state: one number each
PERCEPTUAL = changed(SMALL_RUN, "--perceptual_weight", "0.1")


@pytest.fixture
def dry_run(image_cache, tmp_path, capsys, fresh_logging):
    """dry_run(steps, *flags) -> the lines that a dry run of the image VAE prints."""

    def run(steps: int, *flags: str) -> list[str]:
        words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", str(steps)]
        ImageVAEStage.main(changed([*PERCEPTUAL, *words, "--dry_run"], *flags))
        return capsys.readouterr().out.splitlines()

    return run


def test_all_networks_are_counted_without_a_warning(dry_run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = dry_run(100)
    assert not caught, f"{len(caught)}: {caught[0].message}"
    (line,) = [line for line in lines if line.startswith("parameters: ")]
    assert "model 660,704, discriminator 10,969," in line and "perceptual network 4,652,008" in line
    names = " ".join(line for line in lines if "MiB" in line)
    assert all(name in names for name in ("discriminator:", "its gradients and moments:", "networks of the losses:"))


def test_phases_are_steps_and_shares_of_the_run(dry_run):
    lines = dry_run(100, "--gan_start_step", "20", "--gan_warmup_steps", "10", "--gan_ramp_steps", "30")
    expected = ("steps 0 to 20, 20.0%", "steps 20 to 30, 10.0%", "steps 30 to 60, 30.0%", "steps 60 to 100, 40.0%")
    assert all(any(part in line for line in lines) for part in expected)
    assert not any("warning" in line for line in lines)


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [((5000, 200, 1000), "not reached"), ((90, 10, 0), "never guides"), ((50, 10, 41), "beyond the run")],
)
def test_what_lies_beyond_the_end_is_a_warning_with_flags_that_help(schedule, problem):
    stage = ImageVAEStage(ImageVAEStage.arguments_class())
    names = ("gan_start_step", "gan_warmup_steps", "gan_ramp_steps")
    for name, value in zip(names, schedule):
        setattr(stage.args, name, value)
    warning = check_phases(stage.args, 100)
    assert problem in warning
    # The flags that it names do help.
    words = warning.partition("give ")[2].split(",")[0].split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        setattr(stage.args, name.removeprefix("--"), int(value))
    assert check_phases(stage.args, 100) == ""


def test_a_dry_run_warns_of_a_default_start_and_refuses_a_given_one(dry_run):
    words = [word for word in PERCEPTUAL if word not in ("--gan_start_step", "2")]
    assert "--gan_start_step" in PERCEPTUAL and "--gan_start_step" not in words
    with pytest.raises(SystemExit) as end:
        dry_run(100, "--gan_start_step", "100")
    assert "--gan_start_step=100" in str(end.value.__cause__) and end.value.code == 2


def test_a_dry_run_refuses_a_perceptual_distance_that_never_acts(dry_run):
    with pytest.raises(SystemExit) as end:
        dry_run(100, "--perceptual_start_step", "100")
    assert "--perceptual_start_step=100 is not reached in 100 steps" in str(end.value.__cause__)
    assert any("optimizer steps: 100" in line for line in dry_run(100, "--perceptual_start_step", "99"))
    # The remedy of the message helps a run that is resumed with its start step, too.
    args = ImageVAEStage.arguments_class(perceptual_weight=0.0, perceptual_start_step=100)
    check_perceptual_start(args, 100)


class WatchedStage(ImageVAEStage):
    """Keeps its trainer."""

    def build_trainer(self, *args, **kwargs):
        WatchedStage.trainer = super().build_trainer(*args, **kwargs)
        return WatchedStage.trainer


@pytest.mark.parametrize("trainer", ["grokfast_ema", "grokfast_ma"])
def test_the_states_of_a_run_have_the_counted_bytes(trainer, image_cache, tmp_path, fresh_logging):
    filters = {"grokfast_ma": ["--grokfast_window", "3"]}.get(trainer, [])
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", "2", *filters]
    words += ["--trainer", trainer]
    WatchedStage.main(changed([*SMALL_RUN, *words], "--gan_start_step", "0"))
    run = WatchedStage.trainer
    parts = {"adversary": run.adversary, "criterion": run.criterion}
    rows = memory_of(run.model, parts, run.stage_arguments, Engine())
    held = [
        sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k not in COUNTERS)
        for optimizer in (run.optimizer.optimizer, run.adversary.optimizer)
    ]
    gradients = sum(p.numel() for p in run.adversary.parameters)
    assert rows["Adam's two moments"] + rows["averages of weights and gradients"] == FP32 * held[0]
    assert rows["its gradients and moments"] == FP32 * (held[1] + gradients)
    assert rows["copy with averaged weights, for evaluation"] == n_bytes(run.ema_model) == rows["weights"]


def test_zero_shards_what_its_stage_says(tmp_path):
    args, model = ImageVAEStage.arguments_class(), torch.nn.Linear(9, 10)
    sharded = {stage: memory_of(model, {}, args, Engine(stage, n_ranks=4, bucket=7)) for stage in (0, 1, 2, 3)}
    for stage, rows in sharded.items():
        for name, first in (("weights", 3), ("gradients", 2), ("Adam's two moments", 1)):
            assert rows[name] == sharded[0][name] / (4 if stage >= first else 1), (stage, name)
        assert rows.get("buckets of gradients", 0) == (28 if stage else 0)


@pytest.mark.parametrize(("stage", "n_values"), [(1, 50_000_000), (2, 100_000_000), (3, 50_000_000)])
def test_buckets_are_those_of_the_file(stage, n_values):
    args = ImageVAEStage.arguments_class(use_deepspeed=True, deepspeed_config=f"ds_config_zero-{stage}.json")
    assert Engine.of(args, 4) == Engine(stage, n_ranks=4, bucket=n_values)
    assert Engine.of(ImageVAEStage.arguments_class(), 2) == Engine(-1, n_ranks=2)


def test_frozen_parts_have_no_gradients(tmp_path, capsys, fresh_logging):
    cache = make_text(tmp_path / "text")
    sizes = []
    for flags in ([], ["--freeze", "trunk"]):
        MultimodalStage.main([*SMALL_TEXT, "--cached_dataset", str(cache), "--max_steps", "2", *flags, "--dry_run"])
        lines = capsys.readouterr().out.splitlines()
        sizes.append([line for line in lines if "parameters:" in line or "gradients:" in line])
    assert sizes[0][0] == sizes[1][0] and sizes[0][1:] != sizes[1][1:]
