"""`--measure`: which steps are made, what is extrapolated from them, and that nothing of them is left."""

import pytest

from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import SMALL_RUN, Run, changed, run_stage
from tests.helpers.text_cache import SMALL_CORE
from tests.test_dry_run import COMMON, cache_of, snapshot
from utils.training.image_vae import ImageVAEGANTrainer
from utils.training.planning.measure import Measurement, counted_steps, measured_phases
from utils.training.planning.phases import Phase

COMMON = {**COMMON, MultimodalStage: SMALL_CORE}
assert cache_of  # a fixture


class WatchedTrainer(ImageVAEGANTrainer):
    """Notes its steps, and those of its adversary."""

    def stage_step(self, model, inputs):
        self.events.append(self.state.global_step)
        return super().stage_step(model, inputs)

    def evaluate(self, *args, **kwargs):
        self.events.append(f"evaluation, {self.adversary.updates} updates")
        return super().evaluate(*args, **kwargs)


class WatchedStage(ImageVAEStage):
    trainer_class = WatchedTrainer


def test_steps_are_made_in_the_middle_of_each_phase(image_cache, tmp_path, capsys, monkeypatch, fresh_logging):
    monkeypatch.setattr(WatchedTrainer, "events", events := [], raising=False)
    before = snapshot(tmp_path)
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path / "runs"), "--max_steps", "100"]
    words += ["--eval_steps", "30", "--save_steps", "1", "--gan_start_step", "40", "--measure", "2"]
    assert WatchedStage.main(changed(SMALL_RUN, *words)) == {}
    # Two to warm up and two that count, each; the evaluation is in between.
    assert events == [18, 19, "evaluation, 0 updates", 20, 21, 68, 69, 70, 71]
    assert snapshot(tmp_path) == before
    shown = capsys.readouterr().out
    for part in ("peak memory: ", "before the adversary: ", "40 steps", "with the adversary: ", "60 steps", "4 times"):
        assert part in shown
    # No line of a run: 8 of 100 steps are made.
    assert shown.startswith("measured 8 steps; nothing is trained or kept\n")
    assert "trained 8" not in shown and "eval_" not in shown and "(22 %)" not in shown
    assert "samples per second" in shown and "hours" in shown and "steps 40 to 42, 2.0% of the run" in shown


def test_a_run_that_is_shorter_than_its_measurement_is_measured(image_cache, tmp_path, monkeypatch, fresh_logging):
    monkeypatch.setattr(WatchedTrainer, "events", events := [], raising=False)
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", "3", "--measure", "4"]
    WatchedStage.main(changed(SMALL_RUN, *words))
    steps = [event for event in events if isinstance(event, int)]
    assert steps == [0, 1] * 3 + [0] + [2] * 7  # The adversary starts at step 2.


def test_a_perceptual_distance_that_never_acts_is_not_measured(image_cache, tmp_path, monkeypatch, fresh_logging):
    monkeypatch.setattr(WatchedTrainer, "events", events := [], raising=False)
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", "3", "--measure", "4"]
    words += ["--perceptual_weight", "0.5", "--perceptual_start_step", "3"]
    with pytest.raises(SystemExit) as end:
        WatchedStage.main(changed(SMALL_RUN, *words))
    assert "--perceptual_start_step=3 is not reached in 3 steps" in str(end.value.__cause__) and not events


def test_a_resumed_run_is_measured_from_its_checkpoint_on(image_cache, tmp_path, capsys, monkeypatch, fresh_logging):
    run = run_stage(ImageVAEStage, SMALL_RUN, image_cache, tmp_path, "short", 3, "--save_steps", "1")
    before = snapshot(tmp_path)
    words = ["--resume_from_checkpoint", str(run.folder.parent / "checkpoint-1"), "--measure", "1"]
    ImageVAEStage.main(words)
    shown = capsys.readouterr().out
    assert "before the adversary: " in shown and "samples per second, 1 steps" in shown
    assert snapshot(tmp_path) == before and Run(run.folder.parent, 3).folder.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("stage", COMMON, ids=lambda stage: stage.name)
def test_every_stage_is_measured(stage, cache_of, tmp_path, capsys, monkeypatch, fresh_logging):
    cache = cache_of(stage)
    before = snapshot(tmp_path)
    words = ["--cached_dataset", str(cache), "--output_dir", str(tmp_path / "runs"), "--max_steps", "7"]
    assert stage.main(changed(COMMON[stage], *words, "--measure", "1", "--batch_size", "8")) == {}
    assert snapshot(tmp_path) == before
    assert "peak memory: " in capsys.readouterr().out


def test_a_dry_run_measures_nothing(capsys):
    with pytest.raises(SystemExit) as end:
        ImageVAEStage.main(["--dry_run", "--measure"])
    assert end.value.code == 2
    assert "--measure has no effect with dry_run=True" in capsys.readouterr().err


def test_hours_weigh_phases_and_evaluations():
    phases = [Phase("before", 0, 1000), Phase("with", 1000, 4000)]
    measurement = Measurement(phases, [0.5, 1.0], 16, 60.0, 10, 1.0, 8)
    assert measurement.hours == pytest.approx((500 + 3000 + 600) / 3600)


@pytest.mark.parametrize(
    ("start", "first", "expected"),
    [(40, 0, [(0, 40), (40, 100)]), (0, 0, [(0, 100)]), (100, 0, [(0, 100)]), (40, 60, [(60, 100)])],
)
def test_parts_of_a_run_that_cost_differently(start, first, expected):
    args = ImageVAEStage.arguments_class(gan_start_step=start)
    assert [(phase.start, phase.end) for phase in measured_phases(args, first, 100)] == expected
    without = ImageVAEStage.arguments_class(gan_weight=0, gan_start_step=start)
    assert [(phase.start, phase.end) for phase in measured_phases(without, first, 100)] == [(first, 100)]


@pytest.mark.parametrize(
    ("adversary", "perceptual", "expected"),
    [
        (40, 0, [(0, 40), (40, 100)]),
        (40, 70, [(0, 40), (40, 70), (70, 100)]),
        (40, 40, [(0, 40), (40, 100)]),
        (200, 20, [(0, 20), (20, 100)]),
        (None, 20, [(0, 20), (20, 100)]),
    ],
)
def test_the_perceptual_distance_begins_a_part(adversary, perceptual, expected):
    weights = {"gan_weight": 0} if adversary is None else {"gan_start_step": adversary}
    args = ImageVAEStage.arguments_class(perceptual_start_step=perceptual, **weights)
    phases = measured_phases(args, 0, 100)
    assert [(phase.start, phase.end) for phase in phases] == expected
    args.perceptual_weight = 0.0
    assert all(phase.start in (0, adversary) for phase in measured_phases(args, 0, 100))
    if perceptual == 70:
        assert phases[1].name == "with the adversary, before the perceptual distance"


def test_what_happens_at_some_steps_alone_is_measured_in_proportion():
    arguments = ImageVAEStage.arguments_class
    assert counted_steps(arguments(), 10) == 10
    assert counted_steps(arguments(discriminator_every=4), 10) == 12
    assert counted_steps(arguments(r1_weight=1.0, r1_every=16), 10) == 16
    assert counted_steps(arguments(gan_weight=0, r1_weight=1.0), 10) == 10
