"""Runs of the image VAE whose numbers stop being finite, many of them in one launch: what each of them did.

    python tests/launched/non_finite_runs.py OUTPUT_DIR ENGINES CASES [FLAGS]

writes OUTPUT_DIR/ENGINE/CASE.pt: counts of skipped steps, learning rates, the error, the last checkpoint. An engine is
"none", or a DeepSpeed configuration. The error of the last run ends the program.
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, Run
from utils.checkpoints import checkpoints_in, step_of
from utils.command_line import explained_errors, parse_arguments
from utils.distributed import ending_together, rank, world_size
from utils.training.image_vae import ImageVAEGANTrainer

STEPS = 9
SAVE = SMALL_RUN.index("--save_steps")
COMMON = [*SMALL_RUN[:SAVE], *SMALL_RUN[SAVE + 2 :], "--max_steps", str(STEPS), "--max_skipped_steps", "4"]
# Case -> what is not finite at which steps: images, those of the last process alone, what the discriminator of the
# last process takes for real, or the norm of a gradient of finite numbers.
CASES: dict[str, dict[int, str]] = {
    "finite": {},
    "from_step_3": dict.fromkeys(range(3, STEPS), "images"),
    "one_step": {3: "images"},
    "first_step": {0: "images"},
    "one_process": {3: "last images"},
    "adversary": {5: "real"},
    "adversary_from_step_3": dict.fromkeys(range(3, STEPS), "real"),
    "norm": {3: "norm"},
    "mixed": {0: "images", 3: "last images", 5: "real", 7: "norm"},
}


class NonFiniteTrainer(ImageVAEGANTrainer):
    """Breaks the steps of a case."""

    case = "finite"

    def generate(self, model, inputs):
        broken = CASES[self.case].get(self.state.global_step)
        if broken == "images" or (broken == "last images" and rank() == world_size() - 1):
            inputs = {**inputs, "image": inputs["image"] * float("nan")}
        generation = super().generate(model, inputs)
        if broken == "norm":
            generation.terms = {name: term * 1e30 for name, term in generation.terms.items()}
        return generation

    def play(self, leaf, target, *args, **kwargs):
        broken = CASES[self.case].get(self.state.global_step) == "real" and rank() == world_size() - 1
        return super().play(leaf, target * float("nan") if broken else target, *args, **kwargs)


class NonFiniteStage(ImageVAEStage):
    trainer_class = NonFiniteTrainer

    def build_trainer(self, *args, **kwargs):
        self.trainer = super().build_trainer(*args, **kwargs)
        return self.trainer


def run_case(
    case: str, output_dir: Path, flags: list[str], *, save_steps: int = 3, limit: int = 1
) -> FloatingPointError | None:
    """Run a case, write what it did, and return its error."""
    NonFiniteTrainer.case = case
    words = ["--output_dir", str(output_dir), "--run_name", case]
    words += ["--save_steps", str(save_steps), "--save_total_limit", str(limit)]
    stage = NonFiniteStage(parse_arguments(NonFiniteStage.arguments_class, [*COMMON, *words, *flags], ""))
    error = None
    try:
        stage.run()
    except FloatingPointError as raised:
        error = raised
    if rank() == 0:
        trainer, folders = stage.trainer, checkpoints_in(stage.run_dir)
        lines = [line for line in trainer.state.log_history if "learning_rate" in line]
        result = {
            "error": str(error or "").replace(f"{stage.run_dir}/", ""),
            "skipped": trainer.guard.skipped,
            "logged": [line.get("skipped_steps", 0) for line in lines],
            "rates": [line["learning_rate"] for line in lines],
            "updates": (trainer.adversary.updates, trainer.adversary.skipped_updates),
            "checkpoints": [step_of(folder) for folder in folders],
        }
        print(output_dir.name, case, json.dumps(result))
        run = Run(stage.run_dir, result["checkpoints"][-1])
        result |= {"model": run.weights(), "ema": run.weights("ema"), "adversary": run.adversary}
        torch.save(result, output_dir / f"{case}.pt")
    return error


if __name__ == "__main__":
    _, folder, engines, cases, *given = sys.argv
    if engines != "none":  # Before a group of processes exists, as in a run that is alone in its process.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401
    for engine in engines.split(","):
        for case in cases.split(","):
            AcceleratorState._reset_state(True)  # The process may have run under another engine.
            words = [] if engine == "none" else ["--use_deepspeed", "--deepspeed_config", engine]
            last_error = run_case(case, Path(folder, Path(engine).stem), [*words, *given])
    with explained_errors(logging.getLogger()), ending_together():
        if last_error is not None:
            raise last_error
