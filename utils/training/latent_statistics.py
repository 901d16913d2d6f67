"""Mean and std of each latent channel over the training set, by which the next stage standardises latents.

    mean = E[mu],   std = sqrt(E[mu^2 + sigma^2] - mean^2)        of posteriors N(mu, sigma^2)

Sums run in float64, over all processes.  B batch, Z latent channels, L latent frames.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dataset_loading.cached import evenly_spaced
from model.audio.lengths import valid_frames
from model.layers import home_of_doubles, in_double
from utils.distributed import mean_across_ranks, rank, world_size
from utils.training_utils import StageTrainer


@torch.no_grad()
def measure_latent_statistics(
    trainer: StageTrainer, moments_of: Callable[..., Tensor], batches_of: Callable[[list[dict]], list[dict]]
) -> tuple[Tensor, Tensor]:
    """Statistics of the latents of `--latent_statistics_samples` training samples. Every process must call it.

    Args:
        trainer: of a VAE; its evaluation model encodes.
        moments_of: (model, batch) -> (3, Z) float64, the batch's sums of mu, of mu^2 + sigma^2, and of 1.
        batches_of: samples -> batches with each of them.
    Returns: mean and std, each (Z,) fp32.
    Raises: ValueError: latents are not finite, on every process; names a batch of samples that gave some. A sample
        with values that are not finite is refused by its dataset.
    """
    model = trainer.evaluation_model()
    shape, device = (3, trainer.model.config.latent_channels), home_of_doubles(trainer.args.device)
    moments = torch.zeros(shape, dtype=torch.float64, device=device)
    # Sums over the samples of this process, then over all processes.
    names: list[str] = []  # of the samples in the first batch whose latents are not finite
    for samples, counts in batches_of_rank(trainer, trainer.stage_arguments.latent_statistics_samples):
        batch_moments = torch.zeros_like(moments)
        for batch in batches_of(samples):
            batch_moments += moments_of(model, trainer._prepare_inputs(batch))
        if counts:
            moments += batch_moments
            if not names and not batch_moments.isfinite().all():
                names = [trainer.train_dataset.entries[int(sample["index"])]["key"] for sample in samples]
    total = mean_across_ranks(moments)  # The number of processes cancels in the ratios.
    # All processes have the same sums, so that they stop together.
    if not total.isfinite().all():
        some = f" {', '.join(names)}" if names else " other processes"
        raise ValueError(
            f"latent statistics at step {trainer.state.global_step}: the VAE's latents of the samples{some} are not "
            "finite, although the samples are: its weights have diverged. Go on from an earlier checkpoint with a "
            "lower --learning_rate"
        )
    return mean_and_std(total)


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std, each (Z,) fp32, from sums of mu, of mu^2 + sigma^2, and of 1, (3, Z) float64."""
    mean = moments[0] / moments[2]
    # Rounding can make a small variance negative.
    std = (moments[1] / moments[2] - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float(), std.float()


class RunningLatents:
    """Mean and std of each latent channel in training, over past optimizer steps, of which step k before the present
    one has the weight `DECAY` ^ k.

    A step's sums go over all its micro-batches and processes, so that its split changes nothing, nor does a step that
    is skipped.

    Attributes:
        moments: weighted sums over past steps as `measure_latent_statistics` takes them, (3, Z) float64; None before
            the first.
    """

    DECAY = 0.99

    def __init__(self):
        self.moments: Tensor | None = None
        self.pending: list[Tensor] = []  # of this step's micro-batches

    def add(self, moments: Tensor) -> None:
        """Add a micro-batch's sums, (3, Z)."""
        self.pending.append(moments.detach())

    def update(self, *, skips: bool) -> None:
        """End an optimizer step. Every process must call it.

        Args: skips: whether the step is skipped, the same on every process.
        """
        pending, self.pending = self.pending, []
        if skips:
            return
        # Sums over all processes: a run may be resumed on another number of them.
        step = mean_across_ranks(torch.stack(pending).sum(0)) * world_size()
        self.moments = step if self.moments is None else self.DECAY * self.moments + step


def batches_of_rank(trainer: StageTrainer, n_samples: int) -> Iterator[tuple[list[dict], bool]]:
    """This process's batches of `n_samples` training samples in all, spread over the training set, whose order often
    goes by kind; and whether they count. Every process has the same number of batches, since forwards of sharded
    weights are collective: beyond the end it gets one that does not count."""
    dataset, batch_size = trainer.train_dataset, trainer.args.per_device_eval_batch_size
    indices = evenly_spaced(len(dataset), n_samples)
    # Each round gives a batch to every process, by rank.
    for start in range(0, len(indices), batch_size * world_size()):
        first = start + rank() * batch_size
        samples = [dataset[index] for index in indices[first : first + batch_size]]
        # Any sample stands in where this process has none left.
        yield samples or [dataset[0]], bool(samples)


def image_moments(mean: Tensor, logvar: Tensor) -> Tensor:
    """Moments of posteriors (B, Z, y, x), as means over positions: all images count alike, whatever their
    size. Returns (3, Z)."""
    mean, variance = in_double(mean), in_double(logvar).exp()
    values = (mean, mean.square() + variance, torch.ones_like(mean))
    return torch.stack([value.mean((2, 3)).sum(0) for value in values])


def sequence_moments(mean: Tensor, logvar: Tensor, lengths: Tensor) -> Tensor:
    """Moments of posteriors (B, Z, L) or (B, Z, m, L), over the first `lengths` (B,) frames. Returns (3, Z)."""
    mean, variance = in_double(mean), in_double(logvar).exp()
    valid = valid_frames(lengths.to(mean.device), mean.shape[-1])  # (B, L)
    valid = valid.view(len(mean), *[1] * (mean.ndim - 2), -1).expand_as(mean).double()  # (B, Z, ..., L)
    values = (mean, mean.square() + variance, valid)
    return torch.stack([(value * valid).transpose(0, 1).flatten(1).sum(1) for value in values])
