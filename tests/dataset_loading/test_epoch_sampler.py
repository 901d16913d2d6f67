import pytest

from dataset_loading.epoch_sampler import EpochSampler


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
