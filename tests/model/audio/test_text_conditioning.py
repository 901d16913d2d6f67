import math

import pytest
import torch

from model.audio.text_conditioning import duration_errors, expand_tokens, whole_durations


def slow_expansion(states, durations, n_latents, compression):
    """Frame by frame, for one clip."""
    rows = []
    for token, duration in enumerate(durations.tolist()):
        for k in range(duration):
            place = [(k + 0.5) / duration, min(k, 8) / 8, min(duration - 1 - k, 8) / 8, math.log(duration) / 3]
            rows.append(torch.cat([states[token], torch.tensor(place)]))
    rows += [torch.zeros(states.shape[1] + 4)] * (n_latents * compression - len(rows))
    return torch.stack([torch.cat(rows[i * compression : (i + 1) * compression]) for i in range(n_latents)])


@pytest.mark.parametrize("compression", [1, 2, 3])
def test_expansion_equals_a_slow_one(compression):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 7, 5, generator=generator)
    durations = torch.randint(0, 12, (4, 7), generator=generator)
    durations[1] = torch.tensor([0, 0, 3, 0, 20, 1, 0])  # pauses without a frame, also at both ends
    durations[2, 4:] = 0  # padding
    n_latents = -(-int(durations.sum(1).max()) // compression) + 1
    rows = expand_tokens(states, durations, n_latents=n_latents, compression=compression)
    assert rows.shape == (4, n_latents, compression * 9)
    for clip in range(4):
        torch.testing.assert_close(rows[clip], slow_expansion(states[clip], durations[clip], n_latents, compression))


def test_an_odd_total_leaves_half_a_latent_frame_empty():
    rows = expand_tokens(torch.ones(1, 1, 2), torch.tensor([[3]]), n_latents=2, compression=2)
    assert rows[0, 1, :2].eq(1).all() and not rows[0, 1, 6:].any()


def test_rounded_durations_keep_the_total_and_give_phones_a_frame():
    generator = torch.Generator().manual_seed(0)
    expected = 3 * torch.rand(50, 40, generator=generator) ** 3
    is_pause = torch.rand(50, 40, generator=generator) < 0.3
    mask = torch.arange(40) < torch.randint(1, 41, (50, 1), generator=generator)
    durations = whole_durations(expected, is_pause, mask)
    assert not durations[~mask].any() and (durations[mask & ~is_pause] >= 1).all()
    assert (durations[mask & is_pause] == 0).any()
    total = torch.where(is_pause, expected, expected.clamp_min(1)).where(mask, 0.0).sum(1)
    assert (durations.sum(1) - total).abs().max() <= 0.5 + 1e-4
    # Ends of exactly one half would round to the same even number.
    halves = whole_durations(
        torch.tensor([[1.5, 1.0, 1.0]]), torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3) > 0
    )
    assert halves.tolist() == [[2, 1, 1]]


def test_duration_errors_are_sums_of_smooth_l1():
    predicted, durations = torch.tensor([[0.1, 3.0, 9.0], [1.0, 2.0, 3.0]]), torch.tensor([[0, 4, 7], [2, 3, 9]])
    sums = duration_errors(predicted, durations, torch.tensor([2, 3]))

    def smooth(error, beta=0.2):
        return 0.5 * error**2 / beta if abs(error) < beta else abs(error) - 0.5 * beta

    expected = [
        smooth(0.1) + smooth(3 - math.log(5)),
        smooth(1 - math.log(3)) + smooth(2 - math.log(4)) + smooth(3 - math.log(10)),
    ]
    torch.testing.assert_close(sums, torch.tensor(expected))
