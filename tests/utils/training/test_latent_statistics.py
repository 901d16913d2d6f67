"""Moments of posteriors against loops over positions."""

import pytest
import torch

from dataset_loading.image.pixels import ImageDataset
from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, run_stage
from utils.training.image_vae import ImageVAEGANTrainer
from utils.training.latent_statistics import image_moments, sequence_moments


def posterior(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_moments_of_images_are_means_over_positions():
    mean, logvar = posterior(3, 2, 4, 5)
    sums, squares, count = image_moments(mean, logvar)
    for channel in range(2):
        mu, variance = mean[:, channel].double(), logvar[:, channel].double().exp()
        assert sums[channel].item() == pytest.approx(sum(mu[b].mean().item() for b in range(3)))
        assert squares[channel].item() == pytest.approx(
            sum((mu[b] ** 2 + variance[b]).mean().item() for b in range(3))
        )
    assert count.tolist() == [3, 3]


@pytest.mark.parametrize("rows", [(), (2,)], ids=["conv1d", "conv2d"])
def test_moments_of_sequences_leave_padding_out(rows):
    mean, logvar = posterior(2, 3, *rows, 6)
    lengths = torch.tensor([6, 2])
    moments = sequence_moments(mean, logvar, lengths)
    alone = [
        sequence_moments(mean[i : i + 1, ..., :n], logvar[i : i + 1, ..., :n], torch.tensor([n]))
        for i, n in enumerate([6, 2])
    ]
    torch.testing.assert_close(moments, sum(alone))
    torch.testing.assert_close(
        moments[0], mean[0].double().flatten(1).sum(1) + mean[1, ..., :2].double().flatten(1).sum(1)
    )
    assert moments[2].tolist() == [8 * (rows[0] if rows else 1)] * 3


class DivergedTrainer(ImageVAEGANTrainer):
    """Its weights become infinite before the statistics are measured."""

    def before_saving(self):
        with torch.no_grad():
            for parameter in self.model.encoder.parameters():
                parameter.fill_(torch.inf)
        super().before_saving()


class DivergedStage(ImageVAEStage):
    trainer_class = DivergedTrainer


def test_latents_that_are_not_finite_are_named(image_cache, tmp_path, fresh_logging):
    key = ImageDataset(image_cache, "train").entries[0]["key"]
    flags = ["--batch_size", "8", "--gan_weight", "0", "--no_use_ema"]
    with pytest.raises(ValueError, match=rf"latent statistics at step 1: .*{key}.* not finite.*--learning_rate"):
        run_stage(DivergedStage, SMALL_RUN, image_cache, tmp_path, "diverged", 1, *flags)
