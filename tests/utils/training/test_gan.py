import pytest
import torch

from tests.helpers.adversaries import make
from tests.helpers.runs import Run, largest_difference


class OneGraph:
    """The generator's gradient the slow way: one graph through the discriminator, no leaf."""

    def __init__(self, trainer):
        self.trainer = trainer

    def gradients(self, inputs):
        trainer = self.trainer
        model, adversary, step = trainer.model, trainer.adversary, trainer.state.global_step
        generation = trainer.generate(model, inputs)
        terms = {**trainer.criterion(generation.sample, generation.target), **generation.terms}
        logits, _ = adversary.discriminator(generation.sample)
        fake = -torch.stack([each.mean() for each in logits]).mean()
        loss = sum(terms.values()) + adversary.generator_weight(step) * adversary.adaptive_factor() * fake
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()


def test_split_graph_equals_one_graph(train, monkeypatch):
    from utils.training.gan import GANTrainer

    seen = []
    original = GANTrainer.stage_step

    def compare(self, model, inputs):
        slow = OneGraph(self).gradients(inputs) if self.state.global_step == 5 else None
        assert all(p.grad is None for p in self.model.parameters())
        loss = original(self, model, inputs)
        if slow is not None:
            fast = torch.cat([p.grad.flatten() for p in self.model.parameters()]).double()
            seen.append((torch.cosine_similarity(slow, fast, dim=0).item(), (slow.norm() / fast.norm()).item()))
            assert self.adversary.generator_weight(5) > 0 and self.adversary.adaptive_factor() > 0
            assert all(p.grad is None for p in self.adversary.discriminator.parameters())
        return loss

    monkeypatch.setattr(GANTrainer, "stage_step", compare)
    train("compare", 6, "--no_use_spectral_norm", "--diff_augment", "--perceptual_weight", "0.5", "--gan_weight", "5")
    ((cosine, ratio),) = seen
    assert cosine == pytest.approx(1.0, abs=1e-6) and ratio == pytest.approx(1.0, abs=1e-5)


def test_silent_before_its_start(train):
    with_adversary = train("with", 4, "--gan_start_step", "3", "--save_steps", "3")
    without = train("without", 4, "--gan_weight", "0", "--save_steps", "3")
    before, without = (Run(run.folder.parent, 3) for run in (with_adversary, without))
    assert before.losses == without.losses
    assert largest_difference(before.weights(), without.weights()) == 0
    assert before.adversary["updates"] == 0 and with_adversary.adversary["updates"] == 1


def test_a_start_beyond_the_run_is_refused_where_it_was_asked_for(train, caplog):
    with pytest.raises(ValueError, match=r"--gan_start_step=4 is not reached in 4 steps.*or --gan_weight 0"):
        train("refused", 4, "--gan_start_step", "4")
    adversary = make(gan_start_step=5000)
    adversary.check_start(5001)
    assert "never plays" not in caplog.text.partition("refused")[2]
    with caplog.at_level("WARNING"):
        adversary.check_start(5000)
    assert "--gan_start_step=5000 is not reached in 5000 steps, so that the discriminator never plays" in caplog.text
