"""Quality of diffusion objectives at equal training cost, with and without guidance, on the demonstration's scenes.

    python benchmarks/diffusion_quality.py --cached_dataset cached_datasets/scenes_latents --max_steps 1000 --jobs 2

Trains the same network with every objective and seed for the same number of steps, and evaluates with 20 steps of the
default sampler and guidance 1 and 3 on the held-out captions. Also compares averaged with raw weights. Finished runs
are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.collators import collate_captioned
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion
from utils.checkpoints import checkpoints_in, is_complete, load_model, step_of
from utils.evaluation.tables import Column, score_table

ROOT = Path(__file__).resolve().parent.parent
UNIFORM = ["--time_sampling", "uniform"]
OBJECTIVES = {  # name -> flags of pretrain_image_diffusion.py
    "rectified flow": [],
    "rectified flow, times towards noise": ["--time_mean", "0.8", "--time_std", "1.2"],
    "DDPM, epsilon": ["--override", "schedule=linear", "prediction=epsilon", *UNIFORM],
    "v, min-SNR": ["--override", "schedule=cosine", "prediction=v", *UNIFORM, "--loss_weighting", "min_snr"],
}
SCALES = (1.0, 3.0)
N_CHECKPOINTS = 10  # per run
N_TIMES = 2  # times at which the validation loss of a sample is measured


def run(*words: str) -> None:
    """Run a script of this repository on one thread; its output is shown if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}\n{(process.stdout + process.stderr)[-3000:]}")


def train_and_measure(args: argparse.Namespace, objective: str, seed: int) -> dict[float, dict]:
    """Train one objective with one seed; returns metrics by guidance scale."""
    # The name of the run contains everything that determines it.
    cache = ImageLatentDataset(args.cached_dataset, "train").fingerprint
    name = f"{objective.replace(', ', '_').replace(' ', '_')}_{args.config}_{cache}_{args.max_steps}_{seed}"
    run_dir = Path(args.output_dir) / "image_diffusion" / name
    every = str(args.max_steps // N_CHECKPOINTS)
    # Train, unless the run is complete; the flags are those of the demonstration.
    if not is_complete(run_dir / f"checkpoint-{args.max_steps}"):
        flags = ["--config", args.config, "--run_name", name, "--output_dir", args.output_dir, "--seed", str(seed)]
        flags += ["--cached_dataset", args.cached_dataset, "--max_steps", str(args.max_steps), "--eval_images", "0"]
        flags += ["--batch_size", "32", "--learning_rate", "4e-3", "--channel_weight_power", "1", "--n_prompts", "0"]
        flags += ["--save_steps", every]
        flags += [
            "--eval_steps",
            str(args.max_steps),
            "--save_total_limit",
            str(N_CHECKPOINTS),
            "--resume_from_checkpoint",
        ]
        run("pretrain_image_diffusion.py", *flags, *OBJECTIVES[objective])
    # Evaluate with every guidance scale.
    metrics = {}
    for scale in SCALES:
        out = run_dir / f"guidance_{scale:g}"
        if not (out / "metrics.json").is_file():
            flags = ["--checkpoint", str(run_dir), "--guidance_scale", str(scale), "--n_steps", "20"]
            flags += ["--training_samples", "1000", "--max_samples", "144"]
            run("evaluate.py", *flags, "--output_dir", str(out))
        metrics[scale] = json.loads((out / "metrics.json").read_text())["scores"]
    # One objective is enough to compare averaged with raw weights.
    if not OBJECTIVES[objective]:
        metrics["average_over_raw"] = average_over_raw(run_dir, args.cached_dataset)
    return metrics


@torch.no_grad()
def average_over_raw(run_dir: Path, cache: str) -> dict[int, float]:
    """Validation loss of the averaged weights divided by that of the raw weights, by step."""
    data = ImageLatentDataset(cache, "validation")
    batch = collate_captioned([data[i] for i in range(len(data))])
    ratios = {}
    for folder in checkpoints_in(run_dir):
        losses = {}
        for weights in ("ema", "raw"):
            model = load_model(ImageDiffusion, folder, weights)
            # The same times and noise for all weights.
            generator, total = torch.Generator().manual_seed(0), 0.0
            for _ in range(N_TIMES):
                time = torch.rand(len(data), generator=generator)
                noise = torch.randn(batch["mean"].shape, generator=generator)
                noisy = model.process.add_noise(batch["mean"], noise, time)
                prediction = model(noisy, time, tokens=batch["tokens"], mask=batch["mask"]).prediction
                total += (prediction - model.process.target(batch["mean"], noise, time)).square().mean().item()
            losses[weights] = total
        ratios[step_of(folder)] = losses["ema"] / losses["raw"]
    return ratios


def mean_and_range(values: list[float]) -> str:
    """Mean, minimum and maximum over seeds."""
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def report(results: dict[tuple[str, int], dict]) -> None:
    """Print a row per objective and guidance scale, and the ratios of averaged to raw weights."""
    rows = {}
    for objective in OBJECTIVES:
        runs = [metrics for (name, _), metrics in results.items() if name == objective]
        for scale in SCALES:
            scores = [metrics[scale] for metrics in runs]
            names = ("frechet", "kid", "agreement")
            row = {name: mean_and_range([score["generated"][name] for score in scores]) for name in names}
            row["shuffled"] = mean_and_range([score["shuffled"]["agreement"] for score in scores])
            rows[objective, scale] = {"objective": objective, "guidance": f"{scale:g}", **row}
    columns = {name: Column(name, "{}") for name in ("objective", "guidance")}
    titles = {"frechet": "Frechet", "kid": "KID", "agreement": "agreement", "shuffled": "shuffled captions"}
    columns |= {name: Column(title, "{}") for name, title in titles.items()}
    console = Console(width=140)
    console.print(score_table(rows, columns, title="Held-out captions, 20 steps: mean and range over seeds"))
    for (objective, seed), metrics in results.items():
        if "average_over_raw" not in metrics:
            continue
        ratios = " ".join(f"{step}: {ratio:.3f}" for step, ratio in metrics["average_over_raw"].items())
        console.print(f"{objective}, seed {seed}: validation loss of averaged / raw weights: {ratios}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cached_dataset", default="cached_datasets/scenes_latents")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", default="runs/benchmark")
    args = parser.parse_args()
    if args.max_steps < N_CHECKPOINTS or args.max_steps % N_CHECKPOINTS:
        parser.error(f"--max_steps={args.max_steps} must be a multiple of {N_CHECKPOINTS}")
    # Runs are separate processes, so threads suffice.
    pairs = [(objective, seed) for seed in args.seeds for objective in OBJECTIVES]
    with ThreadPoolExecutor(args.jobs) as pool:
        metrics = list(pool.map(lambda pair: train_and_measure(args, *pair), pairs))
    report(dict(zip(pairs, metrics)))


if __name__ == "__main__":
    main()
