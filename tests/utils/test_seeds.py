import pytest
import torch

from utils.seeds import generators, sample_keys, sample_normal, sample_uniform


def test_rows_belong_to_samples_not_to_batches():
    both = sample_normal(1, 5, torch.tensor([3, 8]), stream="posterior", shape=(2, 4))
    alone = sample_normal(1, 5, torch.tensor([8]), stream="posterior", shape=(2, 4))
    assert torch.equal(both[1:], alone)
    keys = sample_keys(1, 5, torch.tensor([3, 8]), stream="dropout")
    assert keys.dtype == torch.int64 and torch.equal(keys[1:], sample_keys(1, 5, torch.tensor([8]), stream="dropout"))


def test_every_part_of_the_key_matters():
    draws = [
        sample_normal(seed, step, torch.tensor([index]), stream=stream, shape=(8,))
        for seed, step, index, stream in [
            (1, 5, 3, "a"),
            (2, 5, 3, "a"),
            (1, 6, 3, "a"),
            (1, 5, 4, "a"),
            (1, 5, 3, "b"),
            # The largest seed, late in a run: the key has more bits than a float.
            (2**32 - 1, 2**20, 1, "a"),
            (2**32 - 1, 2**20, 2, "a"),
        ]
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 7


def test_moments():
    noise = sample_normal(0, 0, torch.arange(64), stream="posterior", shape=(256,))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    uniform = sample_uniform(0, 0, torch.arange(64), stream="augment", shape=(256,))
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (1001,)])
def test_rows_are_those_of_a_generator_of_their_own(shape):
    """Rows are made by one generator in turn, whatever it has drawn before."""
    keywords = {"seed": 2**32 - 1, "step": 1 << 20, "indices": torch.tensor([2**39 + 1, 0, 7]), "stream": "x"}
    first, second, third = (generators(**keywords) for _ in range(3))
    normal = [generator.standard_normal(shape, dtype="float32") for generator in first]
    uniform = [generator.random(shape, dtype="float32") for generator in second]
    assert torch.equal(sample_normal(**keywords, shape=shape), torch.stack([torch.as_tensor(row) for row in normal]))
    assert torch.equal(sample_uniform(**keywords, shape=shape), torch.stack([torch.as_tensor(row) for row in uniform]))
    assert sample_keys(**keywords).tolist() == [
        generator.integers(-(2**63), 2**63 - 1, endpoint=True) for generator in third
    ]
