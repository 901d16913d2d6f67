"""Part of `benchmarks/cuda.py`: a stage trained for some minutes, then evaluated."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from benchmarks.timing import ResultRows

ROOT = Path(__file__).resolve().parent.parent
TrainedStage = Literal[
    "image_vae", "recurrent_vae", "image_diffusion", "vocoder", "audio_vae", "audio_diffusion", "multimodal"
]
# A schedule that has no end, since the number of steps is not known.
FLAGS = ["--max_steps", "1000000", "--eval_steps", "1000000", "--save_steps", "1000000"]
FLAGS += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_ratio", "0.0001"]


def run_script(results: ResultRows, script: str, *words: str, run: Path | None = None) -> None:
    """Run a script of the repository. A training run, whose folder is `run`, is told to stop after `--minutes`, which
    saves a checkpoint.

    Raises: RuntimeError: it failed; with the end of what it said.
    """
    environment = {**os.environ, "MEGATRANSFORMER_TRACEBACK": "1"}
    if results.is_small:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, script, *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            # The logs are there once the model is built.
            while run is not None and process.poll() is None and not any(run.glob("events.*")):
                time.sleep(0.2)
            process.wait(None if run is None else 60 * results.args.minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read()
    if process.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        raise RuntimeError(f"{script} ended with {process.returncode}: {text[-3000:]}")


def train_stage(results: ResultRows) -> None:
    """Train a stage for `--minutes`, on a GPU in bf16, then evaluate its checkpoint.

    Raises: ValueError: no cache is named, or it is not there. RuntimeError: training or evaluation failed, or the time
        ended before the first step.
    """
    args = results.args
    if not Path(args.cached_dataset, "manifest.json").is_file() and args.stage != "multimodal":
        raise ValueError(
            f"--cached_dataset={args.cached_dataset!r} holds no cache for --stage {args.stage}; preprocess it first"
        )
    # Streams are trained on caches that `--flags` name, and evaluated on those that their checkpoint names.
    cache = ["--cached_dataset", str(Path(args.cached_dataset).resolve())] if args.cached_dataset else []
    evaluated = [] if args.stage == "multimodal" else cache
    with tempfile.TemporaryDirectory() as folder:
        words = [*cache, "--output_dir", folder, "--run_name", "benchmark", *FLAGS]
        words += [*shlex.split(args.flags), *([] if results.is_small else ["--bf16"])]
        run = Path(folder, args.stage, "benchmark")
        run_script(results, f"pretrain_{args.stage}.py", *words, run=run)
        checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        if checkpoint is None:
            raise RuntimeError(f"--minutes={args.minutes:g} ended before the first step; give more")
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        lines = [line for line in state["log_history"] if "samples_per_second" in line]
        speed = {name: lines[-1][name] for name in ("samples_per_second", "memory_gib") if lines and name in lines[-1]}
        # The row is there before the evaluation, which the end of the time may cut off.
        row = {"what": f"{args.stage}, {args.minutes:g} minutes", "steps": state["global_step"], **speed}
        results.rows.append(row)
        out = str(Path(folder, "metrics"))
        run_script(results, "evaluate.py", "--checkpoint", str(checkpoint), *evaluated, "--output_dir", out)
        metrics = json.loads(Path(out, "metrics.json").read_text())
    row["scores"] = metrics.get("scores", {})
    print(json.dumps(row, indent=1), flush=True)
