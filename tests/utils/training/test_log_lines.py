import re
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState

from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, run_stage
from utils.training.log_lines import LogLinesCallback, duration, log_line, number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (126, "2.1 min"), (3 * 3600, "3.0 h"), (99 * 3600, "99.0 h"), (1e6, "11.6 days")],
)
def test_durations_have_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0661234, "0.06612"), (24.1, "24.1"), (123456.0, "123,456"), (2e-5, "2e-05"), (3, "3")]
)
def test_numbers_are_short_and_unquoted(value, text):
    assert number(value) == text


def test_lines_of_a_run_and_of_its_continuation_tell_step_speed_and_time(train, capsys):
    flags = ("--logging_steps", "2", "--eval_steps", "4", "--save_steps", "4", "--lr_scheduler_type", "constant")
    run = train("two lines", 4, *flags)
    first = capsys.readouterr().out
    train("two lines", 8, *flags, "--resume_from_checkpoint", "latest")
    lines = first.splitlines() + capsys.readouterr().out.splitlines()
    logged = r"  loss [\d.]+  .*learning_rate [\de.-]+.*  [\d.,]+ samples/s  [\d.]+ GiB  \d+ s left"
    # The adversary comes at step 2 of these runs.
    for steps in ("2/4 (50 %)", "4/4 (100 %)", "6/8 (75 %)", "8/8 (100 %)"):
        matching = [line for line in lines if line.startswith(f"step {steps}  loss")]
        end = ", more from step 2 on" if steps.startswith("2/") else ""
        assert len(matching) == 1 and re.fullmatch(re.escape(f"step {steps}") + logged + end, matching[0]), lines
    evaluated = [line for line in lines if re.match(r"step 8/8 \(100 %\)  eval_l1 [\d.]+  eval_psnr [\d.]+ ", line)]
    assert len(evaluated) == 1 and "left" not in evaluated[0]
    # Steps of this process alone.
    assert [line.partition("  ")[2] for line in lines if "trained" in line][1].startswith("trained 4 steps in ")
    assert not [line for line in lines if "{" in line or "'" in line.removesuffix(lines[-1])]
    assert lines[-1] == f"next: python evaluate.py --checkpoint '{run.folder.parent}'"
    # The flags of both are in TensorBoard, in the run's own folder.
    tags = EventAccumulator(str(run.folder.parent)).Reload().Tags()["tensors"]
    assert {"flags/text_summary", "configuration/text_summary"} <= set(tags)


def test_a_finished_run_that_is_called_again_writes_no_events(train, caplog):
    run = train("finished", 2)
    events = sorted(run.folder.parent.rglob("events.*"))
    caplog.set_level("INFO")
    train("finished", 2, "--resume_from_checkpoint", "latest")
    assert "has made all its steps" in caplog.text
    assert events and sorted(run.folder.parent.rglob("events.*")) == events


def test_time_left_counts_steps_of_this_process_and_not_what_is_shown_before(monkeypatch, capsys):
    state, control = TrainerState(global_step=1000, max_steps=1110), TrainerControl()
    callback = LogLinesCallback()
    # Training begins at 0 s, the first step after 60 s of drawing; ten steps take 10 s.
    for moment, method in ((0.0, "on_train_begin"), (60.0, "on_step_begin")):
        monkeypatch.setattr(time, "perf_counter", lambda moment=moment: moment)
        getattr(callback, method)(None, state, control)
    state.global_step = 1010
    monkeypatch.setattr(time, "perf_counter", lambda: 70.0)
    callback.on_log(None, state, control, logs={"loss": 0.5})
    assert capsys.readouterr().out == "step 1010/1110 (91 %)  loss 0.5  1.7 min left\n"


@pytest.mark.parametrize(
    ("step", "end"),
    [
        (100, "  4.0 min left, more from step 200 on"),
        (200, "  2.0 min left, more from step 200 on"),  # The step that is made next is number 200, from 0 on.
        (201, "  2.0 min left, more from step 260 on"),
        (261, "  47 s left"),
    ],
)
def test_time_left_names_the_next_step_from_which_each_takes_longer(step, end):
    assert log_line(step, 300, {}, [(step - 10, 0.0), (step, 12.0)], (200, 260, 999)).endswith(end)


def test_speeds_count_from_the_first_step_of_this_process(image_cache, tmp_path, fresh_logging):
    counted_from = []

    class WatchedStage(ImageVAEStage):
        def build_callbacks(self, trainer, writer):
            class WatchCallback(TrainerCallback):
                def on_step_begin(self, args, state, control, **kwargs):
                    counted_from.append((state.global_step, trainer.last_log[0]))

            return [WatchCallback()]

    flags = ("--logging_steps", "9", "--save_steps", "4", "--eval_steps", "4", "--lr_scheduler_type", "constant")
    run_stage(WatchedStage, SMALL_RUN, image_cache, tmp_path, "speeds", 4, *flags)
    run_stage(
        WatchedStage, SMALL_RUN, image_cache, tmp_path, "speeds", 6, *flags, "--resume_from_checkpoint", "latest"
    )
    assert counted_from == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 4), (5, 4)]
