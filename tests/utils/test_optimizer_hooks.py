import copy

import pytest
import torch

from tests.helpers.runs import equal
from utils.optimizer_hooks import GradientEMA, GradientMA, NonFiniteGuard, WeightEMA


def apply(hook, gradients):
    """The gradients that SGD(lr=1) sees, from the weights' movement."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.0)
    hook.attach(optimizer)
    seen = []
    for gradient in gradients:
        before = weight.item()
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        seen.append(before - weight.item())
    return seen


def test_ema_equals_definition():
    # m1 = 1, m2 = 0.5*1 + 0.5*2 = 1.5, m3 = 0.5*1.5 + 0.5*4 = 2.75; g + 2 m.
    assert apply(GradientEMA(alpha=0.5, lamb=2.0), [1.0, 2.0, 4.0]) == pytest.approx([3.0, 5.0, 9.5])


def test_ma_equals_definition():
    # No filter until two gradients are there; then g + 2 * mean of the last two.
    assert apply(GradientMA(window=2, lamb=2.0), [1.0, 2.0, 4.0]) == pytest.approx([1.0, 5.0, 10.0])


@pytest.mark.parametrize("make", [lambda: GradientEMA(0.9, 2.0), lambda: GradientMA(3, 2.0)])
def test_state_travels_with_the_optimizer(make):
    gradients = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def run(weight, optimizer, rows):
        for row in rows:
            weight.grad = row.clone()
            optimizer.step()

    def fresh():
        weight = torch.nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        make().attach(optimizer)
        return weight, optimizer

    whole, optimizer = fresh()
    run(whole, optimizer, gradients)
    first, optimizer = fresh()
    run(first, optimizer, gradients[:4])
    second, resumed = fresh()
    second.data.copy_(first.data)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, gradients[4:])
    assert torch.equal(whole, second)


def test_absent_gradient_is_no_error():
    used, absent = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([used, absent], lr=0.1)
    GradientEMA().attach(optimizer)
    used.grad = torch.ones(2)
    optimizer.step()
    absent.grad = torch.ones(2)
    optimizer.step()
    assert "grokfast_ema" in optimizer.state[absent]


def guarded(*hooks, limit=3):
    """A weight of two ones, its optimizer with a guard and hooks, and a function that makes a step."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    guard = NonFiniteGuard(limit, lambda flag, device: flag)
    for hook in (guard, *hooks):
        hook.attach(optimizer)

    def step(*gradient: float) -> None:
        weight.grad = torch.tensor(gradient)
        guard.judge()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)  # as engines do, between the two
        optimizer.step()

    return weight, optimizer, guard, step


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("gradient", [(1.0, NAN), (INF, -INF), (INF, INF), (1e25, 1e25), (1e25, 0.0), (3e38, 3e38)])
def test_a_skipped_step_changes_nothing(gradient):
    weight, optimizer, guard, step = guarded(GradientEMA(), GradientMA(2), WeightEMA(0.9))
    step(*gradient)
    assert torch.equal(weight, torch.ones(2)) and not optimizer.state
    step(1.0, 2.0)
    step(3.0, 2.0)
    before = copy.deepcopy((weight.data, optimizer.state_dict()["state"]))
    step(*gradient)
    assert equal(before, (weight.data, optimizer.state_dict()["state"]))
    assert (guard.skipped, guard.in_a_row, guard.applied) == (2, 1, 2)


def test_large_gradients_that_cancel_or_whose_sum_overflows_are_finite():
    weight, _, guard, step = guarded()
    step(1e19, -1e19)
    step(1e19, 1e19)
    assert guard.skipped == 0 and guard.applied == 2 and weight.isfinite().all()


def test_a_row_of_skipped_steps_ends_the_run():
    weight, _, guard, step = guarded(limit=2)
    step(NAN, 1.0)
    step(1.0, 1.0)
    step(NAN, 1.0)
    resumed = guarded(limit=2)[2]
    resumed.load_state_dict(guard.state_dict())
    assert (resumed.skipped, resumed.in_a_row) == (2, 1)
    before = weight.clone()
    assert guard.problem(is_over=False) == ""
    step(INF, 1.0)
    assert guard.problem(is_over=False) == "2 optimizer steps in a row had non-finite gradients"
    assert torch.equal(weight, before)


@pytest.mark.parametrize("n_saved, is_error", [(0, False), (1, False), (2, True)])
def test_a_run_that_trained_nothing_since_its_last_good_checkpoint_is_an_error(n_saved, is_error):
    guard, step = guarded()[2:]
    for number in range(2):
        step(1.0, 1.0)
        if number < n_saved:
            guard.mark_saved()
    step(NAN, 1.0)
    guard.mark_saved()  # Of a skipped step: it holds nothing new.
    step(NAN, 1.0)
    assert guard.problem(is_over=False) == ""
    expected = "all of the last 2 optimizer steps had non-finite gradients: nothing was trained"
    assert guard.problem(is_over=True) == (expected if is_error else "")


def test_average_equals_definition():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = WeightEMA(decay=0.3)
    ema.attach(optimizer)
    assert ema.state_dict_of(model) is None
    expected = None
    for n in range(1, 6):
        model.weight.grad = torch.full((1, 2), float(n))
        optimizer.step()
        weight = model.weight.detach()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = weight.clone() if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(ema.state_dict_of(model)["weight"], expected)


def test_buffers_are_taken_as_they_are():
    model = torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(3.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = WeightEMA(decay=0.9)
    ema.attach(optimizer)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    state = ema.state_dict_of(model)
    assert torch.equal(state["running_mean"], model.running_mean)
    assert set(state) == set(model.state_dict())


def test_a_frozen_weight_is_its_own_average():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)
    ema = WeightEMA(decay=0.9)
    ema.attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    averages = ema.state_dict_of(model)
    # Without a copy: adapters average few weights, beside a large frozen model.
    assert averages["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert averages["1.weight"].data_ptr() != model[1].weight.data_ptr()


def test_tied_weights_have_their_average_under_both_names():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = WeightEMA(decay=0.9)
    ema.attach(optimizer)
    for _ in range(3):
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    state = ema.state_dict_of(model)
    assert list(state) == list(model.state_dict()) == ["0.weight", "1.weight"]
    assert state["0.weight"] is state["1.weight"] and not torch.equal(state["0.weight"], model[0].weight)
