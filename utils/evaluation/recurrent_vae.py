"""Evaluation of a recurrent VAE: the evaluation of an image VAE at the model's number of decoder steps, PSNR over the
number of steps, and steps and PSNR over the exit threshold."""

import statistics
from typing import Any, ClassVar

import torch
from rich.table import Table

from model.image.recurrent_vae import RecurrentVAE
from utils.evaluation.image_vae import ImageVAEEvaluator
from utils.evaluation.tables import Column, score_table
from utils.metrics.images import psnr

STEPS = (1, 2, 4, 8, 16, 32)  # depths that are measured, with that of the model
# Root mean square change of an image in one step, at which its decoding ends.
THRESHOLDS = (0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005)
EXIT_COLUMNS = {
    "threshold": Column("threshold", "{:g}"),
    "mean_steps": Column("mean steps", "{:.2f}"),
    "saved": Column("steps saved", "{:.0%}"),
    "psnr_db": Column("PSNR dB", "{:.2f}"),
    "difference_db": Column("difference", "{:+.2f}"),
}


class RecurrentVAEEvaluator(ImageVAEEvaluator):
    """Decodes posterior means, so nothing is random."""

    model_class = RecurrentVAE
    definitions: ClassVar[dict[str, str]] = {
        **ImageVAEEvaluator.definitions,
        "decoder_steps": "Mean PSNR in dB after each number of decoder steps, all from a single pass.",
        "early_exit": "The decoding of an image stops after the step that changes it by less than the threshold (root "
        "mean square over values in [-1, 1]), at the latest after the model's n_steps: mean number of steps, share of "
        "steps saved, mean PSNR, and its difference from the PSNR without early exit.",
    }

    def measure(self, dataset, indices):
        evaluation = super().measure(dataset, indices)
        # Depths to measure, the model's own among them; PSNR of every image by depth and by threshold.
        n_steps = self.model.config.n_steps
        depths = sorted({*STEPS, n_steps})
        by_depth: dict[int, list[float]] = {k: [] for k in depths}
        by_threshold: dict[float, tuple[list[int], list[float]]] = {value: ([], []) for value in THRESHOLDS}
        # A second pass over the data, with all depths and thresholds per batch.
        for batch in self.reported_batches(dataset, indices, "depths and early exits"):
            image = batch["image"].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                # One encoding, all depths from a single pass of the decoder, one pass per threshold.
                mean, _ = self.model.encode(image)
                for k, reconstruction in zip(depths, self.model.decode_steps(mean, depths)):
                    by_depth[k] += psnr(reconstruction, image).tolist()
                for threshold, (taken, values) in by_threshold.items():
                    reconstruction, steps = self.model.decode_until_settled(mean, threshold)
                    taken += steps.tolist()
                    values += psnr(reconstruction, image).tolist()
        # Means over images, compared with the PSNR without early exit.
        curve = {k: statistics.fmean(values) for k, values in by_depth.items()}
        exits = []
        for threshold, (taken, values) in by_threshold.items():
            mean_steps, value = statistics.fmean(taken), statistics.fmean(values)
            saved, difference = 1 - mean_steps / n_steps, value - curve[n_steps]
            row = {"threshold": threshold, "mean_steps": mean_steps, "saved": saved, "psnr_db": value}
            exits.append({**row, "difference_db": difference})
        # Added to the results of the image VAE: metrics, scalars, tables.
        evaluation.metrics.update(decoder_steps={str(k): value for k, value in curve.items()}, early_exit=exits)
        evaluation.scalars.update({f"psnr_db_{k}_steps": value for k, value in curve.items()})
        evaluation.tables = [*evaluation.tables, depth_table(curve, n_steps), exit_table(exits, n_steps)]
        return evaluation


def depth_table(curve: dict[int, float], n_steps: int) -> Table:
    """One row per number of decoder steps; that of the model in bold."""
    return score_table(
        {k: {"steps": k, "psnr_db": value} for k, value in curve.items()},
        {"steps": Column("steps", "{:d}"), "psnr_db": Column("PSNR dB", "{:.2f}")},
        title=f"PSNR over decoder steps (n_steps of the model: {n_steps})",
        evaluated=n_steps,
    )


def exit_table(exits: list[dict[str, Any]], n_steps: int) -> Table:
    """One row per threshold."""
    return score_table(dict(enumerate(exits)), EXIT_COLUMNS, title=f"Early exit, at most {n_steps} decoder steps")
