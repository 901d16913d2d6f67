"""What the flags of samplers of images and of audio share. They are no base class: its place among the bases of
`evaluate.py`'s flags would change their order."""

from collections.abc import Sequence
from typing import Any

from utils.options import option, other_than_one


def interval_option() -> Any:
    """The flag `--guidance_interval`, of classes that have `--guidance_scale`."""
    return option(
        [0.0, 1.0],
        "interval of times in which guidance is applied; 0: data, 1: noise",
        only_with=("guidance_scale", other_than_one),
    )


def check_interval(bounds: Sequence[float]) -> None:
    """Raises: ValueError: the values of `--guidance_interval` are no interval of times."""
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
        raise ValueError(f"--guidance_interval={bounds} must be two times with 0 <= first < second <= 1")
