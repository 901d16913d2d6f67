import pytest
import torch

from utils.training_utils import EpochSampler


def test_sampler_deals_whole_steps():
    sampler = EpochSampler(10, 4, seed=1)
    sampler.set_epoch(0)
    first = list(sampler)
    assert len(first) == len(sampler) == 8 and len(set(first)) == 8
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    with pytest.raises(ValueError, match="3 training samples make no optimizer step of 4"):
        EpochSampler(3, 4, seed=1)


def test_non_finite_steps_are_skipped_and_counted(train, monkeypatch):
    from dataset_loading.image.pixels import ImageDataset

    original = ImageDataset.__getitem__

    def broken(self, index):
        sample = original(self, index)
        if index == 7 and self.split == "train":
            sample["image"][:] = float("inf")
        return sample

    monkeypatch.setattr(ImageDataset, "__getitem__", broken)
    run = train("broken", 8, "--batch_size", "8", "--latent_statistics_samples", "4")
    assert all(torch.isfinite(value).all() for value in run.weights().values())
    assert sum(not torch.isfinite(torch.tensor(loss)) for loss in run.losses) == 1
