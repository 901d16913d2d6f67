"""The GAN engine: a generator trained through one engine against an adversary outside of it; and what all VAE-GANs
share.  B batch, Z latent channels."""

import dataclasses
import math

import torch
from torch import Tensor

from dataset_loading.collators import batches_of
from model.vae import ChannelNoise
from utils.training.adversary import Adversary
from utils.training.latent_statistics import RunningLatents, mean_and_std, measure_latent_statistics
from utils.training_utils import StageTrainer


@dataclasses.dataclass
class Generation:
    """One forward of a generator.

    Attributes:
        sample: what was generated, with its graph, (B, ...).
        target: what it is compared with, of the same shape.
        terms: weighted scalar loss terms that do not depend on the sample alone, such as a KL divergence.
        n_frames: frames of each sequence that count, (B,); None where all do.
    """

    sample: Tensor
    target: Tensor
    terms: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    n_frames: Tensor | None = None


class GANTrainer(StageTrainer):
    """Trains a generator through one engine against an adversary outside of it, with a split graph.

        loss = sum(criterion(sample, target))                             (names and weights: see the criterion)
             + sum(generation.terms)
             + gan_weight(step) * adaptive_factor * (adversarial + feature_matching_weight * feature_matching)

    `gan_weight(step)` is 0 until the discriminator is warm, then rises to `--gan_weight`; see `Adversary`.

    Every loss on the generated sample x is taken on a detached leaf, and its gradient g there. The engine then sees
    exactly one forward and one backward, of `(x * g).sum() + sum(generation.terms)`, which gives the generator the
    same gradient.

    A step is skipped as a whole: where the gradient of either network is not finite on any process, neither changes,
    nor does any running statistic; both schedules go on.

    Subclasses say what is generated: `generate`.
    """

    def __init__(self, *, criterion, adversary: Adversary | None = None, **kwargs):
        super().__init__(**kwargs)
        self.criterion = criterion.to(self.args.device)
        self.adversary = adversary

    def generate(self, model, inputs: dict) -> Generation:
        """Run the model once on a batch, which stays as it is."""
        raise NotImplementedError

    def sample_terms(self, leaf: Tensor, generation: Generation) -> dict[str, Tensor]:
        """Weighted loss terms of the generated sample, the adversary's left out."""
        return self.criterion(leaf, generation.target)

    def weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each term times its flag `<name>_weight`; terms with weight 0 are left out."""
        weights = {name: getattr(self.stage_arguments, f"{name}_weight") for name in terms}
        return {name: weights[name] * term for name, term in terms.items() if weights[name]}

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # The length of the run, and of the schedule, is known from here on.
        if self.adversary is not None and self.adversary.scheduler is None:
            self.adversary.check_start(num_training_steps)
            self.adversary.prepare(self.args.device, self.args.lr_scheduler_type, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def stage_step(self, model, inputs):
        # Forward; all losses of the sample act on a detached copy of it, the leaf.
        model.train()
        inputs = self._prepare_inputs(inputs)
        share = 1.0 / self.current_gradient_accumulation_steps
        generation = self.generate(model, inputs)
        leaf = generation.sample.detach().float().requires_grad_()

        # Reconstruction, and its gradient at the leaf.
        with torch.autocast(leaf.device.type, torch.bfloat16, enabled=self.stage_arguments.bf16):
            terms = self.sample_terms(leaf, generation)
        (gradient,) = torch.autograd.grad(sum(terms.values()), leaf)

        # Adversary: its own backward, and the generator's gradient at the leaf.
        if self.adversary is not None and self.adversary.active(self.state.global_step):
            adversarial, adversarial_terms = self.play(leaf, generation.target, gradient, inputs=inputs, share=share)
            gradient = gradient + adversarial
            terms |= adversarial_terms

        # One backward through the generator.
        terms = {name: term.detach() for name, term in {**terms, **generation.terms}.items()}
        surrogate = (generation.sample.float() * gradient).sum() + sum(generation.terms.values())
        # A step whose discriminator's gradient is not finite is skipped as a whole: the generator's becomes nan too.
        is_over = self.adversary is not None and self.adversary.pending and self.accelerator.sync_gradients
        if is_over:
            surrogate = surrogate * torch.where(self.adversary.is_finite(), 1.0, math.nan)
        self.backward(surrogate * share)

        # The discriminator's update ends the optimizer step, unless the generator's gradient was not finite.
        if is_over and self.adversary.update(skips=self.guard.skips):
            self.record({"gan/discriminator_grad_norm": self.adversary.gradient_norm})
        self.record({f"loss/{name}": term for name, term in terms.items()})
        return sum(terms.values()) * share

    def play(
        self, leaf: Tensor, target: Tensor, gradient: Tensor, *, inputs: dict, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversary's part of a micro-batch.

        Args:
            leaf: generated samples, detached.
            target: real samples, of the same shape.
            gradient: of the reconstruction terms at the leaf.
            inputs: the batch, for random numbers that belong to its samples.
            share: the micro-batch's share of the step.
        Returns: the weighted adversarial gradient at the leaf, and the weighted terms that it comes from.
        """
        # Augmentation, weights and the kind of step depend on (seed, step, sample) and past steps alone.
        step = self.state.global_step
        uniforms = self.sample_uniforms(inputs, "augment", (8,)) if self.adversary.augment is not None else None
        weight = self.adversary.generator_weight(step)
        factor = self.adversary.adaptive_factor()
        trains = self.adversary.updates_at(step)
        adversarial = self.adversary.play(
            leaf, target, gradient, uniforms=uniforms, share=share, weight=weight, trains=trains
        )
        # Terms of the log line, under `gan/` as they are and, where they act on the generator, weighted in the loss.
        logs = {**adversarial.logs, "weight": weight, "adaptive_factor": factor}
        self.record({f"gan/{name}": value for name, value in logs.items()})
        # While the discriminator warms up, it does not guide the generator.
        if adversarial.gradient is None or weight == 0:
            return torch.zeros_like(leaf), {}
        names = [name for name in ("generator", "feature_matching") if name in adversarial.logs]
        terms = {f"weighted_{name}": weight * factor * adversarial.logs[name] for name in names}
        return weight * factor * adversarial.gradient, terms

    def skip_problem(self):
        return super().skip_problem() or (self.adversary.problem() if self.adversary is not None else "")

    def extra_state(self):
        return {"adversary": self.adversary.state_dict()} if self.adversary is not None else None

    def load_extra_state(self, state):
        if self.adversary is None:
            raise ValueError("it holds a discriminator, and this run has none: give the --gan_weight of that run")
        self.adversary.load_state_dict(state["adversary"])


class VAEGANTrainer(GANTrainer):
    """Trains a VAE-GAN. In training the decoder sees

        latents = mean + (posterior's std + u * channel's std) * noise        noise ~ N(0, 1), u ~ U(0, latent_noise)

    with one u per sample; noise and u belong to (seed, step, sample). A channel's std is that of `RunningLatents`,
    over past steps, so that the first step adds nothing; it has a gradient, see `ChannelNoise`. Evaluations decode the
    posterior mean.

    Subclasses pass `channel_noise` to the model, and moments of its posteriors to `running_latents`, unless that is
    None.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.running_latents = RunningLatents() if self.stage_arguments.latent_noise > 0 else None

    def channel_noise(self, inputs: dict) -> ChannelNoise | None:
        """Noise beyond the posterior's for this step's samples; None: none."""
        if self.running_latents is None or self.running_latents.moments is None:
            return None
        mean, std = mean_and_std(self.running_latents.moments)
        self.record({"latent_std": std.mean()})
        share = self.stage_arguments.latent_noise * self.sample_uniforms(inputs, "latent_noise", ())
        return ChannelNoise(share, mean.to(share.device), std.to(share.device))

    def stage_step(self, model, inputs):
        loss = super().stage_step(model, inputs)
        if self.running_latents is not None and self.accelerator.sync_gradients:
            self.running_latents.update(skips=self.guard.skips)
        return loss

    def before_saving(self):
        """Measure the statistics of the latents, for the next stage."""
        self.model.set_latent_statistics(
            *measure_latent_statistics(self, self.latent_moments, self.statistics_batches)
        )

    def statistics_batches(self, samples: list[dict]) -> list[dict]:
        """Training samples as batches to measure the statistics of the latents with, as many on every process where
        ZeRO-3 shards the weights."""
        return batches_of(self.data_collator(samples))

    def latent_moments(self, model, inputs: dict) -> Tensor:
        """What a batch adds to the statistics, (3, Z)."""
        raise NotImplementedError

    def extra_state(self):
        state = super().extra_state()
        if self.running_latents is None or self.running_latents.moments is None:
            return state
        return {**(state or {}), "latent_moments": self.running_latents.moments}

    def load_extra_state(self, state):
        # A run that had no such noise so far begins with the next step; one that has none from now on drops them.
        rest = {name: value for name, value in state.items() if name != "latent_moments"}
        if self.running_latents is not None:
            self.running_latents.moments = state.get("latent_moments")
        if rest or self.adversary is not None:
            super().load_extra_state(rest)
