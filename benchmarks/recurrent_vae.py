"""The recurrent VAE on held-out images: PSNR over decoder steps, early exit, memory of the graph. A comparison with
the same network trained with a single decoder step, at equal optimizer steps and at equal CPU time.

    OMP_NUM_THREADS=1 python benchmarks/recurrent_vae.py --cached_dataset cached_datasets/openmoji_64

Runs are stored in OUTPUT_DIR; a second call measures them again without training.
"""

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset_loading.collators import collate_stack
from dataset_loading.image.pixels import ImageDataset
from model.image.recurrent_vae import RecurrentVAE
from pretrain_recurrent_vae import RecurrentVAEStage
from utils.checkpoints import load_model, write_json
from utils.command_line import explained_errors, parse_arguments
from utils.metrics.images import psnr
from utils.options import option

# Numbers of decoder steps whose PSNR is measured, and thresholds of early exit.
STEPS = [0, 1, 2, 3, 4, 6, 8, 12, 16, 32]
THRESHOLDS = [0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005]
ONE_PASS = (
    "--override n_steps=1 --mean_decoder_steps 1 --min_decoder_steps 1 --max_decoder_steps 1 --n_backprop_steps 1"
)


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the experiment."""

    cached_dataset: str = option("cached_datasets/openmoji_64", "images")
    output_dir: str = option("runs/benchmark", "folder of the runs")
    config: str = option("tiny", "preset")
    optimizer_steps: int = option(2000, "optimizer steps of the recurrent decoder", gt=0)
    batch_size: int = option(8, "images per step", gt=0)
    learning_rate: float = option(2e-3, "peak learning rate", gt=0)
    seed: int = option(42, "seed of weights, data order and noise", ge=0)


def train(args: BenchmarkArguments, name: str, steps: int, *flags: str) -> tuple[RecurrentVAE, float]:
    """Train, unless the run exists; returns the averaged weights and the CPU seconds of training."""
    run = Path(args.output_dir) / "recurrent_vae" / f"{name}_{steps}_{args.seed}"
    record = run / "seconds.json"  # written when the run has ended
    if not record.is_file():
        words = f"""--config {args.config} --run_name {run.name} --output_dir {args.output_dir} --seed {args.seed}
            --cached_dataset {args.cached_dataset} --batch_size {args.batch_size} --learning_rate {args.learning_rate}
            --max_steps {steps} --kl_weight 1e-3 --perceptual_weight 0 --gan_weight 0 --bf16
            --logging_steps 200 --eval_steps {steps} --save_steps {steps} --latent_statistics_samples 64"""
        start = time.process_time()
        RecurrentVAEStage.main([*words.split(), *flags])
        write_json(record, {"cpu_seconds": time.process_time() - start})
    return load_model(RecurrentVAE, run), json.loads(record.read_text())["cpu_seconds"]


def curve(model: RecurrentVAE, held_out: Tensor, steps: list[int]) -> list[float]:
    """Mean PSNR in dB of decoded posterior means after each number of steps."""
    values: dict[int, list[float]] = {k: [] for k in steps}
    for image in held_out.split(46):  # in batches, to bound memory
        mean, _ = model.encode(image)
        for k, reconstruction in zip(steps, model.decoder.images_at(mean, steps)):
            values[k] += psnr(reconstruction, image).tolist()
    return [sum(values[k]) / len(values[k]) for k in steps]


def exits(model: RecurrentVAE, held_out: Tensor, n_steps: int) -> None:
    """Print steps and PSNR over the threshold, and the maximum difference from decoding one image at a time."""
    # Posterior means (N, Z, y, x), decoded with every threshold.
    latents = torch.cat([model.encode(image)[0] for image in held_out.split(46)])
    (full,) = curve(model, held_out, [n_steps])
    for threshold in THRESHOLDS:
        decoded, taken = model.decode_until_settled(latents, threshold, n_steps)
        value, mean_steps = psnr(decoded, held_out).mean().item(), taken.float().mean().item()
        print(
            f"exit below {threshold:<6} {mean_steps:5.2f} of {n_steps} steps (saves {1 - mean_steps / n_steps:4.0%}), "
            f"{value:.2f} dB ({value - full:+.2f})",
            flush=True,
        )
    # Images that stop early must not change the others of the batch.
    decoded, taken = model.decode_until_settled(latents[:24], 0.015, n_steps)
    alone = [model.decode_until_settled(latents[i : i + 1], 0.015, n_steps) for i in range(24)]
    difference = (decoded - torch.cat([reconstruction for reconstruction, _ in alone])).abs().max().item()
    print(f"one at a time: steps equal {taken.tolist() == [int(k) for _, k in alone]}, images to {difference:.1e}")


def saved_bytes(model: RecurrentVAE, image: Tensor, n_steps: int) -> int:
    """Bytes of distinct tensors saved for the backward pass with the default number of backpropagated steps."""
    saved: dict[int, Tensor] = {}  # by address: views of the same storage count once

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # The hook sees every tensor that autograd saves.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(image=image, n_steps=n_steps, n_backprop_steps=4)
    assert output.reconstruction.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def main(args: BenchmarkArguments) -> None:
    """Train one recurrent and two one-pass decoders, measure, print."""
    dataset = ImageDataset(args.cached_dataset, "validation")
    held_out = collate_stack([dataset[i] for i in range(len(dataset))])["image"]
    model, seconds = train(args, "recurrent", args.optimizer_steps)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model, model.decoder)]
    print(f"parameters {sizes[0]:,}, decoder {sizes[1]:,}; trained {seconds:.0f} CPU s, {args.optimizer_steps} steps")
    # PSNR over steps and over exit thresholds, with 8 and 16 steps at most.
    with torch.no_grad():
        values = curve(model, held_out, STEPS)
        print("PSNR after steps: " + "  ".join(f"{k}: {value:.2f}" for k, value in zip(STEPS, values)), flush=True)
        exits(model, held_out, 8)
        exits(model, held_out, 16)
    memory = [saved_bytes(model, held_out[:8], k) for k in (8, 32)]
    print(f"memory of the graph at 8 and 32 steps: {memory[0]:,} and {memory[1]:,} bytes", flush=True)
    # The one-pass decoder: its first run gives the time per step, hence the number of steps at equal time.
    value_at_8 = values[STEPS.index(8)]
    one, one_seconds = train(args, "one_pass", args.optimizer_steps, *ONE_PASS.split())
    longer = round(args.optimizer_steps * seconds / one_seconds)
    for label, steps in (("equal optimizer steps", args.optimizer_steps), ("equal CPU time", longer)):
        one, one_seconds = train(args, "one_pass", steps, *ONE_PASS.split())
        with torch.no_grad():
            (value,) = curve(one, held_out, [1])
        print(
            f"one pass, {label}: {value:.2f} dB ({steps} steps, {one_seconds:.0f} CPU s); "
            f"8 recurrent steps {value_at_8 - value:+.2f} dB",
            flush=True,
        )


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(1)
    with explained_errors(logging.getLogger("benchmark")):
        main(arguments)
