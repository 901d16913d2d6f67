"""Evaluation of a recurrent VAE: that of an image VAE at its own number of steps, PSNR over the number of decoder
steps, and steps and PSNR over the exit threshold."""

import statistics
from typing import Any, ClassVar

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from dataset_loading.collators import collate_stack
from model.image.recurrent_vae import RecurrentVAE
from utils.evaluation.image_vae import ImageVAEEvaluator
from utils.metrics.images import psnr

STEPS = (1, 2, 4, 8, 16, 32)
THRESHOLDS = (0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005)


class RecurrentVAEEvaluator(ImageVAEEvaluator):
    """Posterior means are decoded: nothing is random."""

    model_class = RecurrentVAE
    definitions: ClassVar[dict[str, str]] = {
        **ImageVAEEvaluator.definitions,
        "decoder_steps": "mean PSNR in dB after each number of decoder steps, all from one pass of the deepest",
        "early_exit": "each image stops after the step that changes it by less than the threshold (root mean square "
        "over values in [-1, 1]), at the model's n_steps at the latest: mean steps taken, share of steps saved, mean "
        "PSNR, and its difference to no exit",
    }

    def measure(self, dataset, indices):
        evaluation = super().measure(dataset, indices)
        n_steps = self.model.config.n_steps
        depths = sorted({*STEPS, n_steps})
        by_depth: dict[int, list[float]] = {k: [] for k in depths}
        by_threshold: dict[float, tuple[list[int], list[float]]] = {value: ([], []) for value in THRESHOLDS}
        loader = DataLoader(
            Subset(dataset, indices), self.args.batch_size, num_workers=self.args.num_workers, collate_fn=collate_stack
        )
        for batch in loader:
            image = batch["image"].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                mean, _ = self.model.encode(image)
                for k, reconstruction in zip(depths, self.model.decode_steps(mean, depths)):
                    by_depth[k] += psnr(reconstruction, image).tolist()
                for threshold, (taken, values) in by_threshold.items():
                    reconstruction, steps = self.model.decode_until_settled(mean, threshold)
                    taken += steps.tolist()
                    values += psnr(reconstruction, image).tolist()
        curve = {k: statistics.fmean(values) for k, values in by_depth.items()}
        exits = []
        for threshold, (taken, values) in by_threshold.items():
            mean_steps, value = statistics.fmean(taken), statistics.fmean(values)
            saved, difference = 1 - mean_steps / n_steps, value - curve[n_steps]
            row = {"threshold": threshold, "mean_steps": mean_steps, "saved": saved, "psnr_db": value}
            exits.append({**row, "difference_db": difference})
        evaluation.metrics.update(decoder_steps={str(k): value for k, value in curve.items()}, early_exit=exits)
        evaluation.scalars.update({f"psnr_db_{k}_steps": value for k, value in curve.items()})
        evaluation.tables = [*evaluation.tables, depth_table(curve, n_steps), exit_table(exits, n_steps)]
        return evaluation


def depth_table(curve: dict[int, float], n_steps: int) -> Table:
    """One column per number of steps."""
    title = f"PSNR in dB after this many decoder steps (the model's own: {n_steps})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for k in curve:
        table.add_column(str(k), justify="right", style="bold" if k == n_steps else "")
    table.add_row(*(f"{value:.2f}" for value in curve.values()))
    return table


def exit_table(exits: list[dict[str, Any]], n_steps: int) -> Table:
    """One row per threshold."""
    title = f"Early exit, at the latest after {n_steps} decoder steps"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("exit below", "mean steps", "steps saved", "PSNR dB", "difference"):
        table.add_column(name, justify="right")
    for row in exits:
        table.add_row(
            f"{row['threshold']:g}",
            f"{row['mean_steps']:.2f}",
            f"{row['saved']:.0%}",
            f"{row['psnr_db']:.2f}",
            f"{row['difference_db']:+.2f}",
        )
    return table
