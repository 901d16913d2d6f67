"""The GAN engine: a generator trained through one engine against an adversary beside it."""

import torch
from torch import Tensor

from utils.training.adversary import Adversary
from utils.training_utils import StageTrainer


class GANTrainer(StageTrainer):
    """Trains a generator through one engine against an adversary beside it, with a split graph.

    Every loss on the generated sample is taken on a detached leaf, and its gradient g there. The engine then sees
    exactly one forward and one backward, of `(generated * g).sum() + other terms`, which gives the generator the
    same gradient.

    Subclasses say what is generated: `generate`, and which terms do not depend on it: `other_terms`.
    """

    def __init__(self, *, criterion, adversary: Adversary | None = None, **kwargs):
        super().__init__(**kwargs)
        self.criterion = criterion.to(self.args.device)
        self.adversary = adversary

    def generate(self, model, inputs: dict):
        """Run the model once; returns (generated sample with graph, real sample, model output)."""
        raise NotImplementedError

    def leaf_terms(self, leaf: Tensor, real: Tensor, inputs: dict) -> dict[str, Tensor]:
        """Weighted loss terms of the generated sample, the adversary's left out."""
        return self.criterion(leaf, real)

    def other_terms(self, output, real: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms that do not depend on the generated sample."""
        return {}

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.adversary is not None and self.adversary.scheduler is None:
            self.adversary.check_start(num_training_steps)
            self.adversary.prepare(self.args.device, self.args.lr_scheduler_type, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def stage_step(self, model, inputs):
        model.train()
        inputs = self._prepare_inputs(inputs)
        share = 1.0 / self.current_gradient_accumulation_steps
        generated, real, output = self.generate(model, inputs)
        leaf = generated.detach().float().requires_grad_()

        # Reconstruction, and its gradient at the leaf.
        with torch.autocast(leaf.device.type, torch.bfloat16, enabled=self.stage_arguments.bf16):
            terms = self.leaf_terms(leaf, real, inputs)
        (gradient,) = torch.autograd.grad(sum(terms.values()), leaf)

        # Adversary: its own backward, and the generator's gradient at the leaf.
        step = self.state.global_step
        if self.adversary is not None and self.adversary.active(step):
            gradient = gradient + self.play(inputs, real, leaf, gradient, share, step, terms)

        # One backward through the generator.
        others = self.other_terms(output, real)
        terms = {name: term.detach() for name, term in {**terms, **others}.items()}
        surrogate = (generated.float() * gradient).sum() + sum(others.values())
        engine = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(surrogate * share, **engine)
        is_over = self.adversary is not None and self.adversary.pending and self.accelerator.sync_gradients
        if is_over and self.adversary.update():
            self.record({"gan/discriminator_grad_norm": self.adversary.gradient_norm})
        self.record({f"loss/{name}": term for name, term in terms.items()})
        return sum(terms.values()) * share

    def play(self, inputs, real, leaf, gradient, share, step, terms) -> Tensor:
        """The adversary's part of a micro-batch; returns the weighted adversarial gradient at the leaf."""
        uniforms = self.sample_uniforms(inputs, "augment", (8,)) if self.adversary.augment is not None else None
        weight = self.adversary.generator_weight(step)
        factor = self.adversary.adaptive_factor()
        played = self.adversary.play(real, leaf, gradient, uniforms, share, weight, self.adversary.updates_at(step))
        logs = {**played.logs, "weight": weight, "adaptive_factor": factor}
        self.record({f"gan/{name}": value for name, value in logs.items()})
        if played.gradient is None or weight == 0:
            return torch.zeros_like(leaf)
        for name in ("generator", "feature_matching"):
            if name in played.logs:
                terms[f"weighted_{name}"] = weight * factor * played.logs[name]
        return weight * factor * played.gradient

    def extra_state(self):
        return {"adversary": self.adversary.state_dict()} if self.adversary is not None else None

    def load_extra_state(self, state):
        self.adversary.load_state_dict(state["adversary"])
