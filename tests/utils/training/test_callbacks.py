"""Names of logged numbers, and what callbacks leave untouched."""

import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerControl

from utils.training.callbacks import StopOnSignalCallback, grouped, unmoved_generators


@pytest.mark.parametrize(
    ("name", "tag"),
    [("l1", "train/l1"), ("eval_psnr", "eval/psnr"), ("train_runtime", "summary/runtime"), ("gan/r1", "gan/r1")],
)
def test_logged_names_are_grouped(name, tag):
    assert grouped(name) == tag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signalled_training_saves_and_ends_with_the_status_of_its_signal(number):
    callback, control = StopOnSignalCallback(), TrainerControl()
    args, state = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(global_step=3)
    before = signal.getsignal(number)
    callback.on_train_begin(args, state, control)
    callback.on_step_end(args, state, control)
    callback.end_as_signalled()  # Nothing has come so far.
    os.kill(os.getpid(), number)
    callback.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop
    callback.on_train_end(args, state, control)
    assert signal.getsignal(number) == before
    with pytest.raises(SystemExit) as stop:
        callback.end_as_signalled()
    assert stop.value.code == 128 + number


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
