"""What a loop says of its progress, and when it is silent."""

import logging

import pytest

from utils.console.progress import progress_shown, reported


@pytest.fixture
def lines(caplog):
    """lines() -> what was logged since the last call, without the seconds."""
    caplog.set_level(logging.INFO)

    def call() -> list[str]:
        texts = [record.getMessage().rpartition(" in ")[0] for record in caplog.records]
        caplog.clear()
        return texts

    return call


def test_a_loop_tells_its_beginning_and_its_end_where_there_is_no_terminal(lines):
    with progress_shown():
        batches = reported([[1, 2], [3]], "generated images", 3, "images", size=len)
        assert next(batches) == [1, 2] and lines() == ["generated images: 0 of 3 images"]
        assert list(batches) == [[3]]
    assert lines() == ["generated images: 3 of 3 images"]


def test_loops_inside_another_and_those_of_a_training_are_silent(lines):
    assert list(reported("ab", "clips", 2, "clips")) == ["a", "b"] and lines() == []
    with progress_shown():
        for _ in reported("a", "outer", 1, "clips"):
            assert list(reported("ab", "inner", 2, "batches")) == ["a", "b"]
        assert lines() == ["outer: 0 of 1 clips", "outer: 1 of 1 clips"]
        # One that is left is over.
        next(reported("ab", "left", 2, "clips"))
        assert list(reported("c", "next", 1, "clips")) == ["c"]
    assert lines() == ["left: 0 of 2 clips", "next: 0 of 1 clips", "next: 1 of 1 clips"]
