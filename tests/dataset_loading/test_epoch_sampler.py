import itertools
import time

import numpy as np
import pytest
import torch

from dataset_loading import epoch_sampler
from dataset_loading.epoch_sampler import FORMER_ORDER, LISTED, BucketSampler, EpochSampler, Permutation


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


def test_smaller_sets_have_the_listed_order(monkeypatch):
    monkeypatch.setattr(epoch_sampler, "CHUNK", 7)
    sampler = EpochSampler(100, 3, seed=5)
    sampler.set_epoch(2)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 2)
    assert list(sampler) == torch.randperm(100, generator=generator)[:99].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_a_cipher_is_a_permutation(n):
    orders = {tuple(Permutation(n, key)(np.arange(n)).tolist()) for key in ("0 0", "0 1", "1 0")}
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(orders) == 3 or n < 16


def test_a_cipher_scatters_places():
    # Pairs of neighbours and places are as in a random permutation, for many keys: all 4! orders of 4 elements occur,
    # and each element is at each place equally often.
    n, counts, rises = 40, np.zeros((40, 40)), 0
    for key in range(400):
        order = Permutation(n, str(key))(np.arange(n))
        counts[np.arange(n), order] += 1
        rises += int((np.diff(order) > 0).sum())
    # Expected 10 each, chi-squared with 39 x 39 degrees of freedom: mean 1521, deviation 55.
    assert ((counts - 10) ** 2 / 10).sum() == pytest.approx(1521, abs=5 * 55)
    assert rises == pytest.approx(400 * 39 / 2, abs=5 * (400 * 41 / 12) ** 0.5)
    orders = {tuple(Permutation(4, str(key))(np.arange(4)).tolist()) for key in range(400)}
    assert orders == set(itertools.permutations(range(4)))


def test_large_sets_need_no_list():
    started = time.process_time()
    first, second, third = EpochSampler(LISTED, 8, seed=1), EpochSampler(LISTED, 8, seed=1), EpochSampler(LISTED, 8, 2)
    second.set_epoch(1)
    orders = [list(itertools.islice(sampler, 1000)) for sampler in (first, first, second, third)]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3] != orders[2]
    assert all(0 <= index < LISTED for order in orders for index in order) and len(set(orders[0])) == 1000
    # A list would take seconds.
    assert time.process_time() - started < 0.5
    # A resumed run skips to where it stopped.
    assert list(itertools.islice(first, 500, 1000)) == orders[0][500:]


def test_runs_of_earlier_versions_keep_their_order(monkeypatch):
    monkeypatch.setattr(epoch_sampler, "LISTED", 50)
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    listed = torch.randperm(100, generator=generator)[:99].tolist()
    assert list(EpochSampler(100, 3, 5, order=FORMER_ORDER)) == listed != list(EpochSampler(100, 3, 5))


BUCKETS = [0] * 11 + [1] * 9 + [2] * 3


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_micro_batches_have_samples_of_one_bucket():
    sampler = BucketSampler(BUCKETS, 4, seed=1)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert first != second and first == epoch_of(sampler, 0)
    assert first != epoch_of(BucketSampler(BUCKETS, 4, seed=2), 0)
    assert len(first) == len(sampler) == 2 + 2 + 1
    for batch in (*first, *second):
        assert len(batch) == 4 and len({BUCKETS[index] for index in batch}) == 1
    # Every sample has its turn, and the buckets come mixed.
    assert {index for epoch in range(20) for batch in epoch_of(sampler, epoch) for index in batch} == set(range(23))
    orders = {tuple(BUCKETS[batch[0]] for batch in epoch_of(sampler, epoch)) for epoch in range(9)}
    assert len(orders) > 3


def test_steps_are_the_same_for_every_number_of_processes():
    """Accumulation and processes deal the same micro-batches: only whole steps differ."""
    plain = epoch_of(BucketSampler(BUCKETS, 4, seed=1), 3)
    assert epoch_of(BucketSampler(BUCKETS, 4, seed=1, n_parts=2), 3) == plain[:4]
    with pytest.raises(ValueError, match=r"5 micro-batches of 4, and no optimizer step of 6.*lower --batch_size"):
        BucketSampler(BUCKETS, 4, seed=1, n_parts=6)


def test_a_bucket_with_fewer_samples_than_a_batch_repeats_them(caplog):
    (batch,) = [batch for batch in epoch_of(BucketSampler(BUCKETS, 8, seed=1, names="abc"), 0) if batch[0] >= 20]
    assert len(batch) == 8 and set(batch) == {20, 21, 22}
    assert "bucket c has 3 training samples" in caplog.text and "--batch_size" in caplog.text
