import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.training.log_lines import duration, number


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
    run = train("lines", 4, *flags)
    first = capsys.readouterr().out
    train("lines", 8, *flags, "--resume_from_checkpoint", "latest")
    lines = first.splitlines() + capsys.readouterr().out.splitlines()
    logged = r"  loss [\d.]+  .*learning_rate [\de.-]+.*  [\d.,]+ samples/s  [\d.]+ GiB  \d+ s left"
    for steps in ("2/4 (50 %)", "4/4 (100 %)", "6/8 (75 %)", "8/8 (100 %)"):
        matching = [line for line in lines if line.startswith(f"step {steps}  loss")]
        assert len(matching) == 1 and re.fullmatch(re.escape(f"step {steps}") + logged, matching[0]), lines
    evaluated = [line for line in lines if re.match(r"step 8/8 \(100 %\)  eval_l1 [\d.]+  eval_psnr [\d.]+ ", line)]
    assert len(evaluated) == 1 and "left" not in evaluated[0]
    # Steps of this process alone.
    assert [line.partition("  ")[2] for line in lines if "trained" in line][1].startswith("trained 4 steps in ")
    assert not [line for line in lines if "{" in line or "'" in line]
    assert lines[-1] == f"next: python evaluate.py --checkpoint {run.folder.parent}"
    # The flags of both are in TensorBoard, in the run's own folder.
    tags = EventAccumulator(str(run.folder.parent)).Reload().Tags()["tensors"]
    assert {"flags/text_summary", "configuration/text_summary"} <= set(tags)
