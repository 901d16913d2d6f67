"""Stages on a device that has no float64, as Apple's GPUs: training, evaluation and statistics equal the CPU's."""

import pytest

from model.layers import WITHOUT_FLOAT64
from tests.helpers.runs import changed, relative_distance, run_stage
from tests.helpers.stand_in_device import NAME, trainer_on_stand_in
from tests.stages.test_waits_for_the_device import STAGES

STEPS = 2
# Those whose trainers or models differ in what they count in float64.
FAST = ("streams",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in STAGES]
)
def test_stages_equal_the_cpu(name, request, tmp_path, fresh_logging):
    stage, common, source, _ = STAGES[name]
    cache = request.getfixturevalue(source) if isinstance(source, str) else source(tmp_path / "cache")
    if name == "streams":  # The flags of its caches.
        common, cache = [*common, *cache], None
    common = changed(common, "--logging_steps", "1", "--eval_steps", "1", "--save_steps", "1000")
    expected = run_stage(stage, common, cache, tmp_path, "cpu", STEPS)
    WITHOUT_FLOAT64.add(NAME)
    try:
        with trainer_on_stand_in():
            run = run_stage(stage, common, cache, tmp_path, "device", STEPS)
    finally:
        WITHOUT_FLOAT64.discard(NAME)
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert run.logged("eval_loss") == pytest.approx(expected.logged("eval_loss"), rel=1e-4)
    for weights in ("model", "ema"):  # Latent statistics among them. The harmonic prior adds up fp32 there.
        assert relative_distance(expected.weights(weights), run.weights(weights)) <= 1e-4
