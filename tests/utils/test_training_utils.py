import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_multimodal import MultimodalStage
from tests.helpers.runs import SMALL_DIFFUSION, equal, run_stage
from tests.helpers.text_cache import SMALL_CORE, make_text
from tests.launched.non_finite_runs import CASES, run_case
from utils import training_utils
from utils.checkpoints import checkpoints_in
from utils.training.diffusion import DiffusionTrainer
from utils.training.multimodal import MultimodalTrainer
from utils.training_utils import TRAINERS, StageTrainer

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_in_which_anything_is_not_finite_changes_nothing(image_cache, tmp_path, fresh_logging):
    """The steps of `mixed`: a first step, images, what the discriminator sees, a norm of finite numbers."""
    flags = ["--cached_dataset", str(image_cache), "--batch_size", "8", "--trainer", "grokfast_ema"]
    run_case("mixed", tmp_path, flags, save_steps=1, limit=9)
    folders = [tmp_path / "image_vae" / "mixed" / f"checkpoint-{step}" for step in range(1, 10)]
    states = [trained_state(folder) for folder in folders]
    for number, (before, after) in enumerate(itertools.pairwise(states), start=1):
        skipped = number in CASES["mixed"]
        for name in before if skipped else ("model", "optimizer"):
            assert equal(before[name], after[name]) == skipped, (number, name)
    assert not states[0]["optimizer"] and states[-1]["updates"] == 4
    weights = [*states[-1]["model"].values(), *states[-1]["discriminator"].values()]
    assert all(value.isfinite().all() for value in weights)
    assert all({"exp_avg", "grokfast_ema", "weight_ema"} <= state.keys() for state in states[-1]["optimizer"].values())
    record = torch.load(folders[-1] / "stage_state.pt")
    assert record["guard"] == {"skipped": 4, "in_a_row": 0}
    assert record["adversary"]["scheduler"]["last_epoch"] == 7  # steps since --gan_start_step 2


def trained_state(folder: Path) -> dict:
    """What a step may change of a checkpoint's model, its optimizer with all averages, and its adversary."""
    adversary = torch.load(folder / "stage_state.pt", weights_only=True)["adversary"]
    return {
        "model": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(folder / "optimizer.pt", weights_only=True)["state"],
        "discriminator": adversary["discriminator"],
        "discriminator_optimizer": adversary["optimizer"]["state"],
        "statistics": adversary["statistics"],
        "updates": adversary["updates"],
    }


class NonFiniteDiffusionTrainer(DiffusionTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step >= 2 else 1)


class NonFiniteDiffusionStage(ImageDiffusionStage):
    trainer_class = NonFiniteDiffusionTrainer


class NonFiniteTextTrainer(MultimodalTrainer):
    def backward(self, loss):
        super().backward(loss * (float("nan") if self.state.global_step >= 2 else 1))


class NonFiniteTextStage(MultimodalStage):
    trainer_class = NonFiniteTextTrainer


@pytest.mark.parametrize("stage", [NonFiniteDiffusionStage, NonFiniteTextStage])
def test_stages_without_an_adversary_skip_and_end(stage, latent_cache, tmp_path, fresh_logging, caplog):
    common, cache = SMALL_DIFFUSION, latent_cache
    if stage is NonFiniteTextStage:
        common, cache = SMALL_CORE, make_text(tmp_path / "cache")
    flags = ["--batch_size", "4", "--max_skipped_steps", "3"]
    run = run_stage(stage, common, cache, tmp_path, "short", 4, *flags)
    assert "2 of 4 optimizer steps were skipped" in caplog.text and "its weights are those of step 2" in caplog.text
    record = json.loads((run.folder / "stage.json").read_text())
    assert record["skipped_steps"] == {"total": 2, "at_the_end": 2}
    skipped = [line.get("skipped_steps") for line in run.history]
    assert [count for count in skipped if count] == [1, 2]
    assert all(value.isfinite().all() for name in ("model", "ema") for value in run.weights(name).values())
    # Nothing was trained since the last checkpoint; then a whole row of skipped steps.
    losses = "not finite since the last log line: loss nan" if stage is NonFiniteDiffusionStage else "all losses are"
    last = str(tmp_path / stage.name / "long" / "checkpoint-2")
    for n_steps, limit, problem in ((4, "3", "step 4: all of the last 2"), (9, "2", "step 4: 2 optimizer steps in")):
        flags = ["--batch_size", "4", "--max_skipped_steps", limit, "--save_steps", "2"]
        with pytest.raises(FloatingPointError, match=f"{problem}.*{losses}.*--learning_rate.*{last}"):
            run_stage(stage, common, cache, tmp_path, "long", n_steps, *flags, "--resume_from_checkpoint")
        assert [folder.name for folder in checkpoints_in(Path(last).parent)] == ["checkpoint-2"]
    assert caplog.records[-1].levelname == "ERROR"  # The message, in place of a traceback.


def test_trainers_of_all_stages_are_found_here_and_loaded_when_asked_for():
    program = "import sys, utils.training_utils; print([name for name in sys.modules if 'utils.training.' in name])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"
    for name, module in TRAINERS.items():
        trainer = getattr(training_utils, name)
        assert issubclass(trainer, StageTrainer) and trainer.__module__ == f"utils.training.{module}"
    with pytest.raises(ImportError, match="cannot import name 'NoTrainer'"):
        from utils.training_utils import NoTrainer  # noqa: F401
