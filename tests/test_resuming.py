"""Resumed runs in one process: changed flags take effect, forgotten ones keep the run's values, others are refused;
earlier checkpoints; damaged and older ones."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_loading.epoch_sampler import FORMER_ORDER
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import SMALL_RUN, Run, changed, largest_difference, run_stage
from tests.helpers.text_cache import SMALL_CORE, make_text
from utils.checkpoints import COMPLETE, STAGE, mark_complete
from utils.options import declared_fields
from utils.resuming.flags import ON_RESUME
from utils.training.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--batch_size", "8", "--save_steps", "2", "--save_total_limit", "9"]


@pytest.fixture(scope="module")
def whole(image_cache, tmp_path_factory) -> Run:
    """8 steps with checkpoints at 2, 4, 6 and 8."""
    return run_stage(ImageVAEStage, SMALL_RUN, image_cache, tmp_path_factory.mktemp("whole"), "run", 8, *FLAGS)


@pytest.fixture
def resume(whole, image_cache, tmp_path, fresh_logging):
    """Goes on from a copy of one of the checkpoints, by default with no flag but the given ones."""

    def resume(n_steps: int, *flags: str, step: int = 4, common: list[str] | None = None) -> Run:
        folder = checkpoint(tmp_path, step)
        if not folder.exists():
            shutil.copytree(checkpoint(whole.folder.parents[2], step), folder)
        words = [*flags, "--resume_from_checkpoint"]
        return run_stage(ImageVAEStage, common or [], image_cache, tmp_path, "run", n_steps, *words)

    return resume


def checkpoint(output_dir: Path, step: int) -> Path:
    return output_dir / "image_vae" / "run" / f"checkpoint-{step}"


def record(run: Run) -> dict:
    return json.loads((run.folder / STAGE).read_text())


# ---- Flags.


def stage_classes() -> list[type[Stage]]:
    modules = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("pretrain_*.py"))]
    members = [member for module in modules for member in vars(module).values() if isinstance(member, type)]
    return [member for member in members if issubclass(member, Stage) and "name" in vars(member)]


def test_every_flag_of_every_stage_has_its_rule():
    flags = {field.name for stage in stage_classes() for field in declared_fields(stage.arguments_class)}
    assert flags == set(ON_RESUME)


def test_flags_that_are_not_given_are_those_of_the_run(resume, whole, caplog):
    caplog.set_level("INFO")
    resumed = resume(8)
    for name in ("model", "ema"):
        assert largest_difference(whole.weights(name), resumed.weights(name)) == 0
    assert resumed.losses == whole.losses and resumed.adversary["updates"] == whole.adversary["updates"]
    names = ("output_dir", "resume_from_checkpoint")
    first, second = ({k: v for k, v in record(run)["arguments"].items() if k not in names} for run in (whole, resumed))
    assert first == second and record(resumed)["changes"] == []
    assert "'override': ['image_size=32']" in caplog.text


def test_changed_flags_take_effect_and_are_recorded(resume, whole, caplog):
    caplog.set_level("INFO")
    flags = "--learning_rate 5e-5 --weight_decay 0.1 --adam_beta1 0.8 --discriminator_learning_rate 3e-4".split()  # noqa: SIM905
    flags += "--save_steps 3 --eval_steps 2 --logging_steps 2 --max_grad_norm 0.5 --batch_size 4".split()  # noqa: SIM905
    resumed = resume(8, *flags, "--gradient_accumulation_steps", "2")
    # The model's optimizer, with half the rate of the run; biases and norms are not decayed.
    assert resumed.logged("learning_rate")[4:] == pytest.approx(
        [rate / 2 for rate in whole.logged("learning_rate")[5::2]]
    )
    groups = torch.load(resumed.folder / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.8, 0.99) and group["initial_lr"] == 5e-5 for group in groups)
    assert torch.load(resumed.folder / "scheduler.pt", weights_only=True)["base_lrs"] == [5e-5, 5e-5]
    # The discriminator's.
    assert resumed.adversary["optimizer"]["param_groups"][0]["initial_lr"] == 3e-4
    assert resumed.adversary["scheduler"]["base_lrs"] == [3e-4]
    # Steps between logs, evaluations and checkpoints.
    history = resumed.history
    assert [line["step"] for line in history if "eval_loss" in line] == [6, 8]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4, 6, 8]
    assert [folder.name for folder in sorted(resumed.folder.parent.glob("checkpoint-*"))] == [
        "checkpoint-4", "checkpoint-6", "checkpoint-8"
    ]  # fmt: skip
    # What was changed, from which value to which.
    (change,) = record(resumed)["changes"]
    assert change["step"] == 4 and change["flags"]["learning_rate"] == [1e-4, 5e-5]
    assert set(change["flags"]) == {flag[2:] for flag in flags if flag.startswith("--")} | {
        "gradient_accumulation_steps"
    }
    assert "--learning_rate from step 4 on: 0.0001 -> 5e-05" in caplog.text


@pytest.mark.parametrize(
    "flags, old, new",
    [
        ("--override rotary=1", "no field 'rotary'", ""),
        ("--override latent_channels=4", "'latent_channels': (16, 4)", "another --run_name"),
        ("--config small", "'encoder_widths': ([64, 128], [128, 256])", "another --run_name"),
        ("--batch_size 4", "with 8 samples per optimizer step, this run has 4", "--gradient_accumulation_steps 2"),
        ("--seed 1", "--seed 42, this run has 1", "--init_from"),
        ("--discriminator multi_scale", "--discriminator patch, this run has multi_scale", "--init_from"),
        ("--discriminator_channels 16", "--discriminator_channels 8, this run has 16", "--init_from"),
        ("--gan_weight 0", "--gan_weight 0.1, this run has 0.0", "--init_from"),
        ("--gan_start_step 3", "--gan_start_step 2, this run has 3", "--init_from"),
        ("--init_from elsewhere", "--init_from '', this run has elsewhere", "another --run_name"),
    ],
)
def test_what_cannot_change_is_refused_with_both_values_and_what_works(resume, flags, old, new):
    with pytest.raises(ValueError) as refused:
        resume(8, *flags.split())
    assert old in str(refused.value) and new in str(refused.value)


def test_average_and_gradient_filter_are_switched(resume, caplog):
    caplog.set_level("INFO")
    flags = "--no_use_ema --trainer grokfast_ma --grokfast_window 2 --grokfast_lambda 3 --save_steps 1".split()  # noqa: SIM905
    off = resume(8, *flags)
    states = torch.load(off.folder / "optimizer.pt", weights_only=True)["state"].values()
    assert all(len(state["grokfast_ring"]) == 2 and "weight_ema" not in state for state in states)
    assert not (off.folder / "ema.safetensors").exists() and "--use_ema from step 4 on: True -> False" in caplog.text
    assert all(value.isfinite().all() for value in off.weights().values())
    # The average begins at the weights of the checkpoint; d = min(0.9, (1 + 7) / (10 + 7)) at the seventh step.
    before, after = (Run(off.folder.parent, step) for step in (6, 7))
    words = "--use_ema --ema_decay 0.9 --trainer grokfast_ema --resume_from_checkpoint".split()  # noqa: SIM905
    present = before.weights()
    ImageVAEStage.main([*words, str(before.folder)])
    averages, weights = after.weights("ema"), after.weights()
    for name in (name for name, value in weights.items() if value.ndim == 4):
        torch.testing.assert_close(averages[name], 8 / 17 * present[name] + 9 / 17 * weights[name])
    states = torch.load(after.folder / "optimizer.pt", weights_only=True)["state"].values()
    assert all({"weight_ema", "grokfast_ema"} <= state.keys() for state in states)
    assert not any({"grokfast_ring", "grokfast_count"} & state.keys() for state in states)


def test_a_longer_run_goes_on_from_the_present_rate(resume, whole, tmp_path):
    longer = resume(12)
    assert longer.logged("learning_rate")[:5] == whole.logged("learning_rate")[:5]
    # The schedule is that of 8 steps; from step 4 on two steps of the new run are one of it.
    assert longer.logged("learning_rate")[4::2] == pytest.approx(whole.logged("learning_rate")[4:]) and record(longer)[
        "run_lengths"
    ] == [
        [0, 8],
        [4, 12],
    ]
    # Resumed again, it goes on the same way, in the discriminator's schedule too.
    shutil.rmtree(checkpoint(tmp_path, 12))
    again = resume(12)
    assert again.logged("learning_rate") == longer.logged("learning_rate") and again.losses == longer.losses
    assert again.adversary["scheduler"]["_last_lr"] == longer.adversary["scheduler"]["_last_lr"]


def test_a_finished_run_goes_on_at_a_constant_rate_only(resume):
    with pytest.raises(ValueError, match=r"learning rate of 0.*--lr_scheduler_type constant"):
        resume(9, step=8)
    longer = resume(9, "--lr_scheduler_type", "constant", "--learning_rate", "1e-5", step=8)
    assert longer.logged("learning_rate")[-1] == 1e-5


def test_epochs_that_are_given_replace_the_runs_steps(whole, capsys, fresh_logging):
    words = ["--dry_run", "--num_train_epochs", "0.75", "--resume_from_checkpoint", str(whole.folder)]
    ImageVAEStage.main(words)
    shown = capsys.readouterr().out
    assert "optimizer steps: 6 of 8 samples" in shown and "--max_steps from step 8 on: 8 -> -1" in shown


@pytest.mark.slow
def test_a_curriculum_goes_on_evenly_in_a_longer_run(tmp_path, fresh_logging):
    cache, flags = make_text(tmp_path / "cache", 40), ["--batch_size", "4", "--recurrent_curriculum", "1"]
    overrides = ["hidden_size=64", "n_recurrent_layers=1", "recurrent_steps_distribution=fixed"]
    overrides += ["recurrent_mean_thinking_steps=5", "recurrent_max_thinking_steps=6", "recurrent_backprop_steps=2"]
    fixed = changed(SMALL_CORE, "--override", *overrides)
    run = run_stage(MultimodalStage, fixed, cache, tmp_path, "run", 8, *flags, "--save_steps", "4")
    shutil.rmtree(run.folder)
    longer = run_stage(MultimodalStage, fixed, cache, tmp_path, "run", 12, *flags, "--resume_from_checkpoint")
    # Means 1, 1.5, 2, 2.5 of 8 steps, then 3, 3.25, ... of 12; rounded.
    steps = longer.logged("thinking_steps")
    assert steps == [round(1 + 0.5 * min(step, 4) + 0.25 * max(0, step - 4)) for step in range(12)]


# ---- Earlier checkpoints, other folders.


def test_later_checkpoints_are_set_aside_and_no_longer_shown(whole, tmp_path, fresh_logging):
    run = Run(Path(shutil.copytree(whole.folder.parent, tmp_path / "image_vae" / "run")), 8)
    old = (run.folder / "model.safetensors").read_bytes()
    ImageVAEStage.main(["--learning_rate", "1e-3", "--resume_from_checkpoint", str(checkpoint(tmp_path, 4))])
    # The new course is in the run's folder, the old one beside it.
    assert {folder.name for folder in run.folder.parent.glob("abandoned-1/*")} == {"checkpoint-6", "checkpoint-8"}
    assert (run.folder.parent / "abandoned-1" / "checkpoint-8" / "model.safetensors").read_bytes() == old
    assert (run.folder / "model.safetensors").read_bytes() != old
    assert run.logged("learning_rate")[4] == pytest.approx(10 * 6.112604669781572e-05)
    # TensorBoard has every step once, with the new rates.
    events = EventAccumulator(str(run.folder.parent)).Reload().Scalars("train/learning_rate")
    assert [event.step for event in events] == list(range(1, 9))
    assert [event.value for event in events] == pytest.approx(run.logged("learning_rate"))


def test_a_checkpoint_of_another_run_is_continued_in_an_empty_folder(whole, image_cache, tmp_path, fresh_logging):
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--run_name", "fork"]
    words += ["--resume_from_checkpoint", str(checkpoint(whole.folder.parents[2], 6))]
    ImageVAEStage.main(words)
    fork = Run(tmp_path / "image_vae" / "fork", 8)
    assert fork.losses == whole.losses and record(fork)["changes"][0]["from"].endswith("run/checkpoint-6")
    with pytest.raises(SystemExit) as refused:
        ImageVAEStage.main(words)
    assert "fork already holds checkpoint-8" in str(refused.value.__cause__)


# ---- Damaged and older checkpoints.


def edit(folder: Path, file: str, change) -> None:
    """Change the content of a JSON file of a checkpoint, or replace a file, and list it as complete."""
    path = folder / file
    if callable(change):
        content = json.loads(path.read_text())
        change(content)
        change = json.dumps(content).encode()
    path.write_bytes(change)
    (folder / COMPLETE).unlink()
    mark_complete(folder)


def list_file(folder: Path) -> bytes:
    torch.save([1], folder / "list.pt")
    return (folder / "list.pt").read_bytes()


@pytest.mark.parametrize(
    "file, change, message",
    [
        (STAGE, b"{", "stage.json is damaged"),
        (STAGE, b"[]", r"stage.json is damaged \(it holds \[\], not an object"),
        (STAGE, lambda content: content.pop("arguments"), "stage.json: arguments=None must be dict"),
        (STAGE, lambda content: content.pop("n_ranks"), "stage.json: n_ranks=None must be int"),
        (STAGE, lambda content: content["data"].pop("fingerprint"), "data.fingerprint=None must be str"),
        (STAGE, lambda content: content["arguments"].update(batch_size="x"), "arguments.batch_size='x' must be int"),
        (STAGE, lambda content: content.update(run_lengths=[3]), r"run_lengths=\[3\] must be pairs"),
        ("trainer_state.json", b"", "trainer_state.json is damaged"),
        ("trainer_state.json", lambda content: content.update(global_step=3), "global_step=3 is not that of"),
        ("trainer_state.json", lambda content: content.pop("log_history"), "log_history=None must be"),
        ("trainer_state.json", lambda content: content.update(unknown=3), "trainer_state.json: .*unknown"),
        ("config.json", b"no", "config.json is damaged"),
        ("config.json", lambda content: content.update(unknown=3), "config.json: .*no field 'unknown'"),
        ("optimizer.pt", b"text", "optimizer.pt cannot be read"),
        ("optimizer.pt", list_file, "optimizer.pt holds a list"),
        ("scheduler.pt", b"", "scheduler.pt cannot be read"),
        ("stage_state.pt", b"text", "stage_state.pt cannot be read"),
        ("model.safetensors", b"text", "model.safetensors cannot be read"),
        ("rng_state.pth", b"text", r"rng_state\*.pth\) cannot be"),
    ],
)
def test_a_damaged_file_is_named(resume, tmp_path, file, change, message):
    with pytest.raises(ValueError):  # Makes the copy.
        resume(8, "--seed", "1")
    folder = checkpoint(tmp_path, 4)
    edit(folder, file, change(folder) if change is list_file else change)
    with pytest.raises(ValueError, match=message) as refused:
        resume(8)
    assert str(folder) in str(refused.value)


def test_a_state_that_does_not_fit_is_named(resume, tmp_path):
    with pytest.raises(ValueError):  # Makes the copy.
        resume(8, "--seed", "1")
    folder = checkpoint(tmp_path, 4)
    for file, key in (("stage_state.pt", "adversary"), ("optimizer.pt", "param_groups")):
        state = torch.load(folder / file, weights_only=True)
        state.pop(key)
        torch.save(state, folder / file)
        (folder / COMPLETE).unlink()
        mark_complete(folder)
        name = file if file == "stage_state.pt" else "the state of the optimizer"
        with pytest.raises(ValueError, match=rf"{name}.* cannot be loaded \(KeyError: '{key}'\); "):
            resume(8)


def test_an_older_record_is_read(resume, whole, tmp_path, caplog):
    """Without the entries that came later, with former names, with a flag that is gone."""

    def age(content):
        del content["run_lengths"], content["changes"], content["sample_order"]
        arguments = content["arguments"]
        arguments["n_logged_pictures"] = arguments.pop("n_logged_samples")
        arguments["gone"] = 3
        del arguments["adam_beta2"]

    with pytest.raises(ValueError):  # Makes the copy.
        resume(8, "--seed", "1")
    edit(checkpoint(tmp_path, 4), STAGE, age)
    assert resume(8).losses == whole.losses
    assert json.loads((checkpoint(tmp_path, 8) / STAGE).read_text())["sample_order"] == FORMER_ORDER
    assert "this version has no flags {'gone': 3}" in caplog.text and "has no values of --adam_beta2" in caplog.text
