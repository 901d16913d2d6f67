"""What a real run leaves in its TensorBoard folder."""

import pytest

from utils.training.callbacks import grouped


@pytest.mark.parametrize(
    ("name", "tag"),
    [("l1", "train/l1"), ("eval_psnr", "eval/psnr"), ("train_runtime", "summary/runtime"), ("gan/r1", "gan/r1")],
)
def test_logged_names_are_grouped(name, tag):
    assert grouped(name) == tag
