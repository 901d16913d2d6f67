"""Names of logged numbers, and what callbacks leave untouched."""

import random

import numpy as np
import pytest
import torch

from utils.training.callbacks import grouped, unmoved_generators


@pytest.mark.parametrize(
    ("name", "tag"),
    [("l1", "train/l1"), ("eval_psnr", "eval/psnr"), ("train_runtime", "summary/runtime"), ("gan/r1", "gan/r1")],
)
def test_logged_names_are_grouped(name, tag):
    assert grouped(name) == tag


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("fails", [False, True])
def test_generators_have_their_states_back_even_after_an_error(fails):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first, second = draw(), draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert draw() == first
    try:
        with unmoved_generators():
            assert draw() == second
            assert not fails
    except AssertionError:
        assert fails
    assert draw() == second
