"""The discriminator updated every N-th step: the generator's gradient is the same, and nothing else moves."""

import copy

import pytest
import torch

from model.criteria import discriminator_loss, feature_matching_loss, generator_loss
from tests.helpers.adversaries import batch, flat_gradient, make


def play_steps(adversary, steps, n_micro_batches=1):
    """Optimizer steps on the same batch; returns the generator's gradients."""
    gradients = []
    for step in steps:
        leaf, real, gradient = batch(4)
        parts = []
        for rows in torch.arange(4).chunk(n_micro_batches):
            part = leaf[rows].detach().requires_grad_()
            share, weight = 1 / n_micro_batches, adversary.generator_weight(step)
            settings = {"share": share, "weight": weight, "trains": adversary.updates_at(step)}
            played = adversary.play(part, real[rows], n_micro_batches * gradient[rows], **settings)
            parts.append(torch.zeros_like(part) if played.gradient is None else share * played.gradient)
        if adversary.pending:
            adversary.update()
        gradients.append(torch.cat(parts))
    return gradients


def weights(adversary):
    return [p.detach().clone() for p in adversary.discriminator.parameters()]


def test_updates_fall_on_every_nth_step_after_the_start():
    adversary = make(gan_start_step=4, discriminator_every=3)
    assert [step for step in range(12) if adversary.updates_at(step)] == [4, 7, 10]
    assert [adversary.active(step) for step in (3, 4, 5)] == [False, True, True]


@pytest.mark.parametrize("kind", ["hinge", "non_saturating", "least_squares"])
@pytest.mark.parametrize("matching", [0.0, 2.0])
def test_a_step_without_update_gives_the_generator_the_same_gradient(kind, matching):
    adversary = make(gan_loss=kind, feature_matching_weight=matching)
    leaf, real, gradient = batch()
    skipped = adversary.play(leaf, real, gradient, weight=0.1, trains=False)
    assert skipped.logs.keys() == {"generator", *(["feature_matching"] if matching else [])}
    assert all(p.grad is None and not p.requires_grad for p in adversary.discriminator.parameters())
    adversary.pending = []
    played = adversary.play(leaf, real, gradient, weight=0.1, trains=True)
    torch.testing.assert_close(skipped.gradient, played.gradient)
    twin = make().discriminator
    logits, features = twin(leaf)
    loss = generator_loss(kind, logits) + matching * feature_matching_loss(twin(real)[1], features)
    torch.testing.assert_close(skipped.gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-7)


def test_weights_optimizer_and_anchors_stand_still_between_updates():
    adversary = make(discriminator_every=3, lecam_weight=0.1, r1_weight=1.0, r1_every=1)
    play_steps(adversary, [0])
    before = copy.deepcopy(adversary.state_dict())
    play_steps(adversary, [1, 2])
    after = adversary.state_dict()
    for name in before["discriminator"]:
        assert torch.equal(before["discriminator"][name], after["discriminator"][name])
    assert before["optimizer"]["state"][0]["step"] == after["optimizer"]["state"][0]["step"] == 1
    assert torch.equal(before["statistics"]["anchors"], after["statistics"]["anchors"])
    assert adversary.updates == 1 and adversary.scheduler.last_epoch == 3
    play_steps(adversary, [3])
    assert adversary.updates == 2


def test_an_update_after_skipped_steps_has_the_gradient_of_its_step_alone():
    adversary = make(discriminator_every=2, feature_matching_weight=1.0)
    play_steps(adversary, [0, 1])
    twin = copy.deepcopy(adversary.discriminator).requires_grad_()
    leaf, real, gradient = batch()
    adversary.play(leaf, real, gradient, weight=0.1, trains=True)
    discriminator_loss("hinge", twin(real)[0], twin(leaf.detach())[0]).backward()
    torch.testing.assert_close(flat_gradient(adversary.discriminator), flat_gradient(twin), rtol=1e-4, atol=1e-7)


def test_adaptive_weight_follows_all_steps():
    adversary = make(discriminator_every=4)
    play_steps(adversary, [0])
    first = adversary.statistics["gradients"].clone()
    play_steps(adversary, [1])
    gradient = batch()[2]
    squares = (gradient * gradient.numel()).square().mean()
    torch.testing.assert_close(adversary.statistics["gradients"][0], 0.9 * first[0] + 0.1 * squares)


def test_micro_batches_accumulate_to_the_whole():
    whole, parts = (make(discriminator_every=2, feature_matching_weight=1.0) for _ in range(2))
    for first, second in zip(play_steps(whole, range(5)), play_steps(parts, range(5), n_micro_batches=4)):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    for first, second in zip(weights(whole), weights(parts)):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert whole.updates == parts.updates == 3


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_between_updates_goes_on_exactly(stop):
    flags = {"discriminator_every": 3, "lecam_weight": 0.1, "r1_weight": 1.0, "r1_every": 2, "use_spectral_norm": True}
    straight = make(**flags)
    play_steps(straight, range(8))
    first = make(**flags)
    play_steps(first, range(stop))
    second = make(**flags)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    play_steps(second, range(stop, 8))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(second)))
    assert torch.equal(straight.statistics["gradients"], second.statistics["gradients"])


def test_nothing_runs_while_the_discriminator_warms_up_between_updates():
    adversary = make(gan_warmup_steps=10, gan_ramp_steps=5, discriminator_every=5, use_adaptive_gan_weight=False)
    calls = []
    adversary.discriminator.register_forward_hook(lambda *_: calls.append(1))
    play_steps(adversary, range(10))
    assert adversary.updates == 2 and len(calls) == 4  # Real and fake at steps 0 and 5.
    assert adversary.scheduler.last_epoch == 10 and not adversary.statistics["gradients"].any()


@pytest.mark.parametrize("matching, n_calls", [(0.0, 1), (1.0, 2)])
def test_the_real_side_is_passed_through_only_where_features_are_matched(matching, n_calls):
    adversary = make(feature_matching_weight=matching)
    graphs = []
    adversary.discriminator.register_forward_hook(lambda _, __, output: graphs.append(output[0][0].requires_grad))
    adversary.play(*batch(), weight=0.1, trains=False)
    assert graphs == [True, False][:n_calls]
