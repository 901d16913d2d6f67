"""Objectives, guidance, captions and averaged weights at equal cost, on the demonstration's scenes.

    python benchmarks/diffusion_quality.py --cached_dataset cached_datasets/scenes_latents --max_steps 1000 --jobs 2

Trains every objective with every seed for the same number of steps of the same network, which is the same cost, and
evaluates at 20 steps of the default sampler with guidance 1 and 3 on the held-out captions. Runs that are there
already are not made again.
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
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.collators import collate_captioned
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion
from utils.checkpoints import checkpoints_in, is_complete, load_model, step_of

ROOT = Path(__file__).resolve().parent.parent
UNIFORM = ["--time_sampling", "uniform"]
OBJECTIVES = {
    "rectified flow": [],
    "rectified flow, times towards noise": ["--time_mean", "0.8", "--time_std", "1.2"],
    "DDPM, epsilon": ["--override", "schedule=linear", "prediction=epsilon", *UNIFORM],
    "v, min-SNR": ["--override", "schedule=cosine", "prediction=v", *UNIFORM, "--loss_weighting", "min_snr"],
}
SCALES = (1.0, 3.0)
N_TENTHS = 10
N_TIMES = 2


def run(*words: str) -> None:
    """A script of this repository on one thread; its output is shown where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{(done.stdout + done.stderr)[-3000:]}")


def train_and_measure(args: argparse.Namespace, objective: str, seed: int) -> dict[float, dict]:
    """Metrics by guidance scale of one run."""
    cache = ImageLatentDataset(args.cached_dataset, "train").fingerprint
    name = f"{objective.replace(', ', '_').replace(' ', '_')}_{args.config}_{cache}_{args.max_steps}_{seed}"
    run_dir = Path(args.output_dir) / "image_diffusion" / name
    every = str(args.max_steps // N_TENTHS)
    if not is_complete(run_dir / f"checkpoint-{args.max_steps}"):
        flags = ["--config", args.config, "--run_name", name, "--output_dir", args.output_dir, "--seed", str(seed)]
        flags += ["--cached_dataset", args.cached_dataset, "--max_steps", str(args.max_steps), "--eval_images", "0"]
        flags += ["--batch_size", "32", "--learning_rate", "4e-3", "--channel_weight_power", "1", "--n_prompts", "0"]
        flags += ["--save_steps", every]
        flags += ["--eval_steps", str(args.max_steps), "--save_total_limit", str(N_TENTHS), "--resume_from_checkpoint"]
        run("pretrain_image_diffusion.py", *flags, *OBJECTIVES[objective])
    found = {}
    for scale in SCALES:
        out = run_dir / f"guidance_{scale:g}"
        if not (out / "metrics.json").is_file():
            flags = ["--checkpoint", str(run_dir), "--guidance_scale", str(scale), "--n_steps", "20"]
            flags += ["--training_samples", "1000", "--max_samples", "144"]
            run("evaluate.py", *flags, "--output_dir", str(out))
        found[scale] = json.loads((out / "metrics.json").read_text())["scores"]
    if not OBJECTIVES[objective]:
        found["average_over_raw"] = average_over_raw(run_dir, args.cached_dataset)
    return found


@torch.no_grad()
def average_over_raw(run_dir: Path, cache: str) -> dict[int, float]:
    """Validation loss of the averaged weights over that of the raw ones, by step."""
    data = ImageLatentDataset(cache, "validation")
    batch = collate_captioned([data[i] for i in range(len(data))])
    ratios = {}
    for folder in checkpoints_in(run_dir):
        losses = {}
        for weights in ("ema", "raw"):
            model = load_model(ImageDiffusion, folder, weights)
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


def shown(values: list[float]) -> str:
    """Mean, and the range over seeds."""
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def report(results: dict[tuple[str, int], dict]) -> None:
    """Print the tables."""
    table = Table(title="held-out captions, 20 steps: mean and range over seeds", box=SIMPLE_HEAD)
    for column in ("objective", "guidance", "Frechet", "KID", "agreement", "shuffled captions"):
        table.add_column(column)
    for objective in OBJECTIVES:
        runs = [found for (name, _), found in results.items() if name == objective]
        for scale in SCALES:
            rows = [found[scale] for found in runs]
            numbers = [shown([row["generated"][name] for row in rows]) for name in ("frechet", "kid", "agreement")]
            shuffled = shown([row["shuffled"]["agreement"] for row in rows])
            table.add_row(objective, f"{scale:g}", *numbers, shuffled)
    console = Console(width=140)
    console.print(table)
    for (objective, seed), found in results.items():
        if "average_over_raw" not in found:
            continue
        ratios = " ".join(f"{step}: {ratio:.3f}" for step, ratio in found["average_over_raw"].items())
        console.print(f"{objective}, seed {seed}: validation loss, averaged over raw weights: {ratios}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached_dataset", default="cached_datasets/scenes_latents")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", default="runs/benchmark")
    args = parser.parse_args()
    if args.max_steps < N_TENTHS or args.max_steps % N_TENTHS:
        parser.error(f"--max_steps={args.max_steps} must be a multiple of {N_TENTHS}")
    pairs = [(objective, seed) for seed in args.seeds for objective in OBJECTIVES]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda pair: train_and_measure(args, *pair), pairs))
    report(dict(zip(pairs, found)))


if __name__ == "__main__":
    main()
