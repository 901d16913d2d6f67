import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import training_utils
from utils.training_utils import TRAINERS, EpochSampler, StageTrainer

ROOT = Path(__file__).resolve().parents[2]


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


def test_trainers_of_all_stages_are_found_here_and_loaded_when_asked_for():
    program = "import sys, utils.training_utils; print([name for name in sys.modules if 'utils.training.' in name])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"
    for name, module in TRAINERS.items():
        trainer = getattr(training_utils, name)
        assert issubclass(trainer, StageTrainer) and trainer.__module__ == f"utils.training.{module}"
    with pytest.raises(ImportError, match="cannot import name 'NoTrainer'"):
        from utils.training_utils import NoTrainer  # noqa: F401
