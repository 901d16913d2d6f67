import torch

from utils.ema import WeightEMA


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
