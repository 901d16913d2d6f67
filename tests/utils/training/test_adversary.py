import copy

import pytest
import torch

from model.criteria import discriminator_loss, feature_matching_loss, generator_loss, r1_penalty
from tests.helpers.adversaries import batch, flat_gradient, make
from tests.helpers.runs import equal


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_discriminator_gradient_equals_an_isolated_computation(kind):
    adversary = make(gan_loss=kind, r1_weight=2.0, r1_every=1, feature_matching_weight=1.0)
    leaf, real, gradient = batch()
    adversary.play(leaf, real, gradient, weight=0.1)
    together = flat_gradient(adversary.discriminator).clone()

    twin = make(gan_loss=kind).discriminator
    loss = discriminator_loss(kind, twin(real)[0], twin(leaf.detach())[0]) + r1_penalty(twin, real)
    loss.backward()
    alone = flat_gradient(twin)
    assert torch.cosine_similarity(together, alone, dim=0) > 0.999999
    assert (together.norm() / alone.norm()).item() == pytest.approx(1.0, abs=1e-5)
    assert leaf.grad is None


def test_generator_gradient_equals_an_isolated_computation():
    adversary = make(feature_matching_weight=0.5)
    leaf, real, gradient = batch()
    played = adversary.play(leaf, real, gradient, weight=0.1)
    twin = make().discriminator
    logits, features = twin(leaf)
    loss = generator_loss("hinge", logits) + 0.5 * feature_matching_loss(twin(real)[1], features)
    torch.testing.assert_close(played.gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-7)


def test_micro_batches_accumulate_to_the_whole():
    whole, parts = make(), make()
    leaf, real, gradient = batch(4)
    whole.play(leaf, real, gradient, weight=0.1)
    for half in (slice(0, 2), slice(2, 4)):
        part = leaf[half].detach().requires_grad_()
        parts.play(part, real[half], 2 * gradient[half], weight=0.1, share=0.5)
    torch.testing.assert_close(flat_gradient(whole.discriminator), flat_gradient(parts.discriminator))
    whole.update()
    parts.update()
    torch.testing.assert_close(whole.statistics["gradients"], parts.statistics["gradients"])
    assert whole.adaptive_factor() == pytest.approx(parts.adaptive_factor(), rel=1e-5)


def test_adaptive_factor_is_the_ratio_of_gradient_norms():
    adversary = make()
    leaf, real, gradient = batch()
    assert adversary.adaptive_factor() == 0.0
    played = adversary.play(leaf, real, gradient, weight=0.1)
    adversary.update()
    assert adversary.adaptive_factor() == pytest.approx((gradient.norm() / played.gradient.norm()).item(), rel=1e-4)


def test_schedule():
    adversary = make(gan_weight=0.5, gan_start_step=10, gan_warmup_steps=5, gan_ramp_steps=10)
    assert [adversary.active(step) for step in (9, 10)] == [False, True]
    assert [adversary.generator_weight(step) for step in (9, 14, 15, 20, 25, 99)] == [0, 0, 0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("broken", ["real", "leaf", "leaf_gradient", "weights", "generator"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_skipped_update_changes_nothing_but_the_schedule(broken, max_grad_norm):
    """Samples, gradients of the reconstruction, a norm of finite values, or the generator's step are not finite."""
    kinds = {"lecam_weight": 0.1, "r1_weight": 1.0, "r1_every": 1, "use_spectral_norm": True}
    adversary = make(max_grad_norm=max_grad_norm, **kinds)
    adversary.play(*batch(), weight=0.1)
    adversary.update()
    before = copy.deepcopy(adversary.state_dict())
    leaf, real, gradient = batch()
    if broken == "real":
        real[0, 0, 0, 0] = float("nan")
    elif broken == "leaf":
        leaf = leaf.detach().fill_(float("inf")).requires_grad_()
    elif broken == "leaf_gradient":
        gradient *= 1e30
    adversary.play(leaf, real, gradient, weight=0.1)
    if broken == "weights":  # Each value is finite.
        for parameter in adversary.parameters:
            parameter.grad.fill_(1e25)
    assert adversary.is_finite() == (broken == "generator")
    assert adversary.update(skips=broken == "generator")
    after = adversary.state_dict()
    assert adversary.skipped_updates == 1 and adversary.updates == 1
    assert after["scheduler"]["last_epoch"] == before["scheduler"]["last_epoch"] + 1
    assert all(equal(before[name], after[name]) for name in ("discriminator", "optimizer", "statistics"))
    assert any("original" in name for name in after["discriminator"])  # spectral norms


def test_a_row_of_skipped_updates_ends_the_run_where_the_generator_is_updated_more_often():
    adversary = make(max_skipped_steps=2, discriminator_every=2)
    leaf, real, gradient = batch()
    for trains in (True, False, True):
        assert adversary.problem() == ""
        adversary.play(leaf, real * float("nan") if trains else real, gradient, weight=0.1, trains=trains)
        adversary.update()
    assert adversary.problem() == "2 updates of the discriminator in a row had non-finite gradients"
    assert adversary.skipped_updates == 2


def test_state_round_trip_continues_exactly():
    first = make(lecam_weight=0.1, r1_weight=1.0, r1_every=2)
    for _ in range(3):
        first.play(*batch(), weight=0.1)
        first.update()
    second = make(lecam_weight=0.1, r1_weight=1.0, r1_every=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for adversary in (first, second):
        adversary.play(*batch(), weight=0.1)
        adversary.update()
    for a, b in zip(first.discriminator.parameters(), second.discriminator.parameters()):
        assert torch.equal(a, b)


def test_a_resumed_run_steps_with_the_kernels_of_its_own_machine():
    """A checkpoint of a CPU, resumed where AdamW has a kernel for many parameters."""
    adversary, source = make(), make()
    state = copy.deepcopy(source.state_dict())
    adversary.optimizer.defaults["fused"] = True
    adversary.load_state_dict(state)
    adversary.apply_flags("constant", [[0, 10]])
    assert [group["fused"] for group in adversary.optimizer.param_groups] == [True]
