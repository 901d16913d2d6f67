import pytest

from utils.resuming.schedules import later_lengths, position, rate_factor


def test_a_position_is_the_step_until_the_length_changes():
    assert [position([[0, 8]], step) for step in range(9)] == list(range(9))
    lengths = [[0, 8], [4, 12], [8, 10]]
    # From step 4 on half a step, from step 8 (position 6) on a whole one.
    assert [position(lengths, step) for step in (0, 4, 5, 6, 8, 9, 10)] == [0, 4, 4.5, 5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_a_changed_length_neither_moves_the_rate_nor_the_end(kind):
    plain = rate_factor(kind, n_warmup_steps=2, lengths=[[0, 8]])
    for change in (1, 5):  # Within the warm-up and after it.
        longer = rate_factor(kind, n_warmup_steps=2, lengths=[[0, 8], [change, 80]])
        assert [longer(step) for step in range(change + 1)] == [plain(step) for step in range(change + 1)]
        assert longer(80) == pytest.approx(plain(8)) and abs(longer(change + 1) - longer(change)) < 0.1


def test_a_later_schedule_counts_changes_before_its_begin_as_its_first_length():
    assert later_lengths([[0, 8]], 2) == [(0, 6)]
    assert later_lengths([[0, 8], [4, 12], [8, 20]], 6) == [(0, 6), (2, 14)]
    assert later_lengths([[0, 8]], 10) == [(0, 1)]
