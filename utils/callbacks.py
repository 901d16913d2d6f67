"""Callbacks of the stages: clean stop on a signal; numbers, pictures and histograms for TensorBoard.

`Stage` sets the attribute `trainer` of each.
"""

import logging
import signal
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from utils.distributed import any_across_ranks
from utils.metrics import LatentHealth, psnr
from utils.pictures import TRIPLE, Group, channel_pictures, draw_sheet, spread, to_picture, triple

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """SIGTERM or SIGINT: finish the step on every process, save a checkpoint, end the run.

    Launchers signal processes one after another, so that the flag is combined over all of them after each step. The
    `deepspeed` runner does not pass signals on: send it to the process group, `kill -TERM -- -PGID`.
    """

    trainer = None

    def __init__(self):
        self.signalled = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number, frame):
        """Signal handler; a second signal ends the process at once."""
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        if any_across_ranks(self.signalled, args.device):
            logger.warning("signal received: saving at step %d and stopping", state.global_step)
            control.should_save = True
            control.should_training_stop = True


class ScalarLogs(TrainerCallback):
    """Logged numbers in TensorBoard, in groups: `eval_x` -> eval/x, `train_x` (totals of a run) -> summary/x, a name
    with a slash as it is, any other x -> train/x.

    The writer stays open after training, for the last evaluation; transformers' own callback closes it and would open
    another one elsewhere.
    """

    trainer = None

    def __init__(self, writer: SummaryWriter):
        self.writer = writer

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(grouped(name), value, state.global_step)
        self.writer.flush()


def grouped(name: str) -> str:
    """The TensorBoard name of a logged number."""
    for prefix, group in (("eval_", "eval"), ("train_", "summary")):
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    return name if "/" in name else f"train/{name}"


class ReconstructionPictures(TrainerCallback):
    """Before the first step and after each evaluation: what the VAE makes of the same validation pictures.

    pictures/reconstruction       input | reconstruction | difference, with the PSNR
    pictures/latent_channels      posterior means, one row per picture, one column per channel
    latents/mean_<channel>        histogram of the posterior means
    latents/posterior_std         histogram of the posterior's standard deviations
    latents/dead_channels         channels that carry next to nothing on these pictures

    Every process runs the model, as sharded weights need; only the one with a writer writes.

    Args:
        writer: None except on rank 0.
        n_pictures: spread evenly over the validation set.
    """

    trainer: Any
    max_latent_rows = 4

    def __init__(self, writer: SummaryWriter | None, n_pictures: int):
        self.writer, self.n_pictures = writer, n_pictures
        self.image: Tensor | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.show(args.device, state.global_step)

    @torch.no_grad()
    def show(self, device: torch.device, step: int) -> None:
        """Run the model on every process, write on one."""
        if self.image is None:
            dataset = self.trainer.eval_dataset
            indices = spread(len(dataset), self.n_pictures)
            self.image = torch.stack([dataset[index]["image"] for index in indices])
        output = self.trainer.evaluation_model()(image=self.image.to(device))
        if self.writer is None:
            return
        reconstruction, mean, logvar = (
            each.float().cpu() for each in (output.reconstruction, output.mean, output.logvar)
        )
        values = psnr(reconstruction, self.image).tolist()
        groups = [Group(triple(*pair), f"{value:.1f} dB") for *pair, value in zip(self.image, reconstruction, values)]
        sheet = draw_sheet(groups, TRIPLE, n_across=2)
        self.writer.add_image("pictures/reconstruction", np.asarray(sheet), step, dataformats="HWC")
        rows = [
            Group([to_picture(channel) for channel in row]) for row in channel_pictures(mean)[: self.max_latent_rows]
        ]
        numbers = [str(channel) for channel in range(mean.shape[1])]
        sheet = draw_sheet(rows, numbers, min_cell=64)
        self.writer.add_image("pictures/latent_channels", np.asarray(sheet), step, dataformats="HWC")
        for channel in range(mean.shape[1]):
            self.writer.add_histogram(f"latents/mean_{channel:02d}", mean[:, channel], step)
        self.writer.add_histogram("latents/posterior_std", (0.5 * logvar).exp(), step)
        health = LatentHealth()
        health.update(mean, logvar)
        self.writer.add_scalar("latents/dead_channels", sum(health.compute()["dead"]), step)
        self.writer.flush()
