"""Steps whose gradient is not finite are skipped alike under DDP and every ZeRO stage: the same counts, schedule,
weights and end as in one process."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import largest_difference
from tests.helpers.two_processes import ROOT, TWO_PROCESSES, environment, skip_without_deepspeed
from tests.launched.non_finite_runs import CASES, run_case

# ZeRO stage 0 judges before the engine steps, stages 1 and 2 are one optimizer, stage 3 has norms in fp64.
CONFIGS = ["ds_config.json", "ds_config_zero-2.json", "ds_config_zero-3.json"]
pytestmark = pytest.mark.launch


def launch(
    output_dir: Path, cache: Path, engines: list[str], cases: list[str], flags: list[str], *, status: int = 1
) -> str:
    """Run the cases under the engines on two processes, the last of which fails unless `status` is 0; returns what
    was printed."""
    if engines != ["none"]:
        skip_without_deepspeed()
    program = ["tests/launched/non_finite_runs.py", str(output_dir), ",".join(engines), ",".join(cases)]
    command = [*TWO_PROCESSES, *program, "--cached_dataset", str(cache), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == status, (done.stdout + done.stderr)[-4000:]
    return done.stderr


def compare(cases: list[str], configs: list[str], cache: Path, tmp_path: Path, *, flags=(), tolerance=1e-5) -> None:
    """DDP and DeepSpeed with each configuration, on two processes, do in these cases what one process does."""
    printed = launch(tmp_path / "two", cache, ["none", *configs], cases, ["--batch_size", "4", *flags])
    assert printed.count("step 7: 4 optimizer steps in a row had non-finite gradients") == 1
    assert "non_finite_runs.py" not in printed.partition("ChildFailedError")[0]  # No traceback but the launcher's.
    assert "Detected call of `lr_scheduler" not in printed
    for case in cases:
        run_case(case, tmp_path / "one", ["--cached_dataset", str(cache), "--batch_size", "8", *flags])
        one = torch.load(tmp_path / "one" / f"{case}.pt", weights_only=True)
        for engine in ("none", *configs):
            two = torch.load(tmp_path / "two" / Path(engine).stem / f"{case}.pt", weights_only=True)
            for name in ("error", "skipped", "logged", "updates", "checkpoints"):
                assert two[name] == one[name], (engine, case, name)
            assert two["rates"] == pytest.approx(one["rates"], rel=1e-12), (engine, case)
            # A bias that a norm cancels has a gradient of rounding errors, which Adam scales up.
            kernels = [name for name, value in one["model"].items() if value.ndim == 4]
            for kind in ("model", "ema"):
                first, second = ({name: run[kind][name] for name in kernels} for run in (one, two))
                assert largest_difference(first, second) <= tolerance, (engine, case, kind)
            states = [run["adversary"]["discriminator"] for run in (one, two)]
            assert largest_difference(*states) <= tolerance, (engine, case)


def test_all_engines_skip_the_same_steps_and_end_alike(image_cache, tmp_path, fresh_logging):
    compare(["mixed", "from_step_3"], CONFIGS, image_cache, tmp_path)
    mixed, ended = (torch.load(tmp_path / "one" / f"{case}.pt") for case in ("mixed", "from_step_3"))
    assert mixed["logged"] == [1, 1, 1, 2, 2, 3, 3, 4, 4] and mixed["updates"] == (4, 3) and not mixed["error"]
    # The last good checkpoint stays beside that of a skipped step, in spite of --save_total_limit 1.
    assert ended["logged"] == [0, 0, 0, 1, 2, 3] and ended["checkpoints"] == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--max_grad_norm 0", "--gradient_accumulation_steps 2 --trainer grokfast_ema"])
def test_all_cases_on_all_engines(flags, image_cache, tmp_path, fresh_logging):
    cases = [*(case for case in CASES if case != "from_step_3"), "from_step_3"]
    compare(cases, [*CONFIGS, "ds_config_zero-1.json"], image_cache, tmp_path, flags=flags.split())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["none", *CONFIGS, "ds_config_zero-1.json"])
@pytest.mark.parametrize("case, status", [("one_process", 0), ("adversary_from_step_3", 1)])
def test_exit_statuses(engine, case, status, image_cache, tmp_path):
    launch(tmp_path, image_cache, [engine], [case], ["--batch_size", "4"], status=status)


@pytest.mark.slow
def test_all_engines_skip_the_same_steps_in_bfloat16(image_cache, tmp_path, fresh_logging):
    compare(["mixed", "from_step_3"], CONFIGS, image_cache, tmp_path, flags=["--bf16"], tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_optimizers_skip_the_same_steps(stage, image_cache, tmp_path, fresh_logging):
    settings = json.loads((ROOT / f"ds_config_zero-{stage}.json").read_text())
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "offload.json").write_text(json.dumps(settings))
    compare(["mixed", "from_step_3"], [str(tmp_path / "offload.json")], image_cache, tmp_path)
