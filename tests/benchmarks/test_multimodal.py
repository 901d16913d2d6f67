"""The benchmark of streams: our side learns from its pairs, and both sides have equally many parameters."""

import pytest
import torch

from benchmarks.multimodal import BenchmarkArguments, Ours, Theirs, read_pairs, stepper
from utils.command_line import parse_arguments


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    args = parse_arguments(BenchmarkArguments, ["--batch_size", "4"], "")
    return args, read_pairs(args)["train"]


def test_a_step_trains_our_side_on_given_pairs(pairs):
    args, rows = pairs
    assert len(rows) == 32 and all(tokens.shape == (16, 64) for _, tokens in rows)
    side = Ours()
    before = side.held_out_error(rows[:4], 0.9)
    assert before == pytest.approx(1 + torch.stack([tokens for _, tokens in rows[:4]]).square().mean().item(), rel=0.1)
    # Images that are all alike are learnt at once.
    alike = [(ids, torch.full((16, 64), 3.0)) for ids, _ in rows[:4]]
    step = stepper(side, alike, args)
    for _ in range(4):
        step()
    assert side.held_out_error(alike, 0.9) < 0.99 * (1 + 3.0**2)


def test_the_peer_has_as_many_parameters_and_the_same_error_at_the_beginning(pairs):
    pytest.importorskip("transfusion_pytorch", reason="a peer of requirements-bench.txt")
    sizes = [sum(parameter.numel() for parameter in side.model.parameters()) for side in (Ours(), Theirs())]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    side = Theirs()
    with torch.no_grad():
        for module in side.model.model_to_latent_projs.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(1e-3)
    expected = 1 + torch.stack([tokens for _, tokens in pairs[1][:4]]).square().mean().item()
    assert side.held_out_error(pairs[1][:4], 0.9) == pytest.approx(expected, rel=0.05)
