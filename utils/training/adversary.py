"""The adversary of a GAN stage: a replicated discriminator with an optimizer, losses, a schedule and a state.

Every process holds the whole discriminator, outside the generator's engine. Gradients of all micro-batches are
averaged in one flat all-reduce per update; weights therefore stay identical on all processes under DDP and every ZeRO
stage. Generator and discriminator losses share one discriminator pass over the fake sample and one over the real one:
the generator's side is read as the gradient with respect to the fake sample (the leaf), before the discriminator's
backward. On optimizer steps on which the discriminator is not updated (`--discriminator_every`) no graph reaches its
weights, and the real sample is passed through without a graph, or not at all.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from model.criteria import discriminator_loss, feature_matching_loss, generator_loss, lecam_penalty, r1_penalty
from utils.distributed import broadcast_tensors, mean_across_ranks
from utils.optimizer_hooks import advance, has_finite_square
from utils.resuming.schedules import apply_settings, rate_factor
from utils.training.planning.phases import check_phases

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class AdversarialTerms:
    """Result of one micro-batch's discriminator pass.

    Attributes:
        gradient: the generator's gradient at the leaf; None where it is not taken.
        logs: detached numbers by name.
    """

    gradient: Tensor | None
    logs: dict[str, Tensor]


class Adversary:
    """Owns a discriminator and everything that trains it.

        loss = discriminator_loss(real, generated) + lecam_weight * lecam
             + r1_weight / 2 * |gradient at the real sample|^2            (every `r1_every` updates, r1_every-fold)

    Per micro-batch call `play`; after the last micro-batch of an optimizer step call `update`.

    Args:
        discriminator: module, sample -> (list of logits, list of feature maps); without batch statistics.
        arguments: the flags of `AdversaryArguments`.
        augment: differentiable augmentation, (samples, uniforms (B, 8)) -> samples, applied to real and fake alike.
    """

    def __init__(self, discriminator: nn.Module, arguments, augment: Callable | None = None):
        self.discriminator = discriminator
        self.arguments = arguments
        self.augment = augment
        self.optimizer = torch.optim.AdamW(
            discriminator.parameters(),
            lr=arguments.discriminator_learning_rate,
            betas=(arguments.discriminator_beta1, arguments.adam_beta2),
            weight_decay=0.0,
            fused=torch.cuda.is_available() or None,  # On a GPU one kernel for many parameters, as the generator's.
        )
        self.scheduler = None
        self.updates = 0
        self.skipped_updates = 0
        # LeCAM's anchors (real, fake) and the mean squared gradients (reconstruction, adversarial) for the
        # adaptive factor, on the CPU: they are read in every step.
        self.statistics = {"anchors": torch.zeros(2), "gradients": torch.zeros(2)}
        self.parameters = [p for p in discriminator.parameters() if p.requires_grad]
        self.pending: list[Tensor] = []  # a (4,) per micro-batch of this optimizer step, see `play`
        self.trains = False  # Whether the pending micro-batches carry gradients for the discriminator.
        # Of the present optimizer step: norm of the gradient, means of `pending` over all processes, whether they are
        # finite, and the discriminator's buffers before it.
        self.gradient_norm = torch.zeros(())
        self.averages = torch.zeros(4)
        self.finite = torch.ones((), dtype=torch.bool)
        self.buffers: list[Tensor] = []
        self.skipped_in_a_row = 0

    # ---- Schedule.

    def active(self, step: int) -> bool:
        """Whether the adversary takes part in this optimizer step."""
        return self.arguments.gan_weight > 0 and step >= self.arguments.gan_start_step

    def updates_at(self, step: int) -> bool:
        """Whether the discriminator is updated at this optimizer step."""
        since = step - self.arguments.gan_start_step
        return self.active(step) and since % self.arguments.discriminator_every == 0

    def generator_weight(self, step: int) -> float:
        """The generator's adversarial weight before adaptation: 0 while the discriminator warms up, then a linear
        ramp."""
        since = step - self.arguments.gan_start_step - self.arguments.gan_warmup_steps
        if not self.active(step) or since < 0:
            return 0.0
        return self.arguments.gan_weight * min(1.0, since / max(1, self.arguments.gan_ramp_steps))

    def adaptive_factor(self) -> float:
        """Norm of the reconstruction's gradient over the adversarial gradient's at the output, running means, at
        most 1e4.

        VQGAN (arXiv 2012.09841, eq. 7) takes the ratio at the last layer, in the same micro-batch. Here it is taken
        at the output, from past steps: the weight is then the same on every process and for every split into
        micro-batches.
        """
        if not self.arguments.use_adaptive_gan_weight:
            return 1.0
        reconstruction, adversarial = self.statistics["gradients"].tolist()
        return min(1e4, math.sqrt(reconstruction / adversarial)) if adversarial > 0 else 0.0

    def check_start(self, n_steps: int) -> None:
        """Warn where a run of `n_steps` ends before the discriminator starts.

        Raises: ValueError: `--gan_start_step` was given and asks for that.
        """
        if self.arguments.gan_start_step >= n_steps:
            logger.warning("%s", check_phases(self.arguments, n_steps))

    # ---- One optimizer step.

    def prepare(self, device: torch.device, lr_scheduler_type: str, n_steps: int) -> None:
        """Move to the device, make all processes equal, and create the schedule over the remaining updates."""
        self.discriminator.to(device).eval()
        broadcast_tensors([*self.discriminator.parameters(), *self.discriminator.buffers()])
        # The schedule counts optimizer steps from `gan_start_step` on.
        updates = max(1, n_steps - self.arguments.gan_start_step)
        self.scheduler = get_scheduler(
            lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=min(self.arguments.gan_warmup_steps, updates // 2),
            num_training_steps=updates,
        )

    def play(
        self,
        leaf: Tensor,
        real: Tensor,
        leaf_gradient: Tensor,
        *,
        weight: float,
        share: float = 1.0,
        trains: bool = True,
        uniforms: Tensor | None = None,
    ) -> AdversarialTerms:
        """Accumulate one micro-batch into the discriminator's gradient and read the generator's gradient at the leaf.

        Args:
            leaf: generated samples, detached from the generator, `requires_grad`, (B, ...) fp32.
            real: real samples, of the same shape.
            leaf_gradient: gradient of the reconstruction terms at the leaf, for the adaptive factor.
            weight: the generator's weight of this step; 0: no gradient for the generator is taken.
            share: the micro-batch's share of the step, 1 / micro-batches.
            trains: whether this step updates the discriminator; the same for all micro-batches of a step.
            uniforms: per-sample numbers in [0, 1) for the augmentation, (B, 8).
        """
        arguments = self.arguments
        # The adaptive factor must be known before the weight acts: it is measured once while the weight is 0, and
        # where the weight rises without a ramp at every step.
        adapts = arguments.use_adaptive_gan_weight and (
            arguments.gan_ramp_steps == 0 or self.statistics["gradients"][1] == 0
        )
        guides = weight > 0 or adapts
        # Neither side learns from this micro-batch.
        if not trains and not guides:
            self.trains = False
            self.pending.append(leaf.new_zeros(4))  # `update` has the schedule to advance.
            return AdversarialTerms(None, {})

        # One pass of the discriminator over the generated samples, one over the real ones where they are needed.
        if trains and not self.pending:
            # A skipped update gives the vectors of spectral norms back.
            self.buffers = [buffer.clone() for buffer in self.discriminator.buffers()]
            if hasattr(self.discriminator, "update_spectral_norms"):
                self.discriminator.update_spectral_norms()
        self.trains = trains
        for parameter in self.parameters:
            parameter.requires_grad_(trains)
        # Where the generator is not guided, no graph leads to the leaf.
        matches = guides and arguments.feature_matching_weight > 0
        fake_logits, fake_maps = self.discriminate(leaf if guides else leaf.detach(), uniforms)
        real_logits, real_maps = None, None
        if trains or matches:
            with torch.set_grad_enabled(trains):
                real_logits, real_maps = self.discriminate(real.float(), uniforms)

        # The generator's side: losses, and their gradient at the leaf.
        gradient, logs = None, {}
        if guides:
            terms = {"generator": generator_loss(arguments.gan_loss, fake_logits)}
            if matches:
                matching = feature_matching_loss(real_maps, fake_maps)
                terms["feature_matching"] = arguments.feature_matching_weight * matching
            (gradient,) = torch.autograd.grad(sum(terms.values()), leaf, retain_graph=trains)
            logs.update({name: term.detach() for name, term in terms.items()})

        # The discriminator's side, and the numbers that `update` averages: mean logits of real and generated samples,
        # and mean squared gradients of the reconstruction and of the adversarial loss, (4,).
        statistics = leaf.new_zeros(4)
        if gradient is not None:
            # A loss that is a mean has gradients that shrink with the number of values; numel makes up for it.
            statistics[2:] = torch.stack([(g * g.numel()).square().mean() for g in (leaf_gradient, gradient)])
        if trains:
            logs.update(self.accumulate(real, real_logits, fake_logits, share=share))
            statistics[:2] = torch.stack([logs["logits_real"], logs["logits_fake"]])
        self.pending.append(statistics * share)
        return AdversarialTerms(gradient, logs)

    def discriminate(self, sample: Tensor, uniforms: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Logits in fp32 and feature maps of a batch of samples, augmented."""
        if self.augment is not None:
            sample = self.augment(sample, uniforms)
        with self.autocast(sample.device):
            logits, features = self.discriminator(sample)
        return [values.float() for values in logits], features

    def accumulate(
        self, real: Tensor, real_logits: list[Tensor], fake_logits: list[Tensor], *, share: float
    ) -> dict[str, Tensor]:
        """The discriminator's loss and its backward, for one micro-batch; returns what is to be logged."""
        arguments = self.arguments
        # The adversarial loss, and the penalties that are due at this update.
        loss = discriminator_loss(arguments.gan_loss, real_logits, fake_logits)
        logs = {"discriminator": loss.detach()}
        if arguments.lecam_weight > 0 and self.updates > 0:
            ema_real, ema_fake = self.statistics["anchors"]
            penalty = lecam_penalty(real_logits, fake_logits, ema_real=ema_real, ema_fake=ema_fake)
            loss = loss + arguments.lecam_weight * penalty
            logs["lecam"] = penalty.detach()
        if arguments.r1_weight > 0 and self.updates % arguments.r1_every == 0:
            # Lazy regularisation (arXiv 1912.04958, appendix B): a rarer penalty weighs more.
            penalty = r1_penalty(self.discriminator, real.float())
            loss = loss + 0.5 * arguments.r1_weight * arguments.r1_every * penalty
            logs["r1"] = penalty.detach()
        (loss * share).backward(inputs=self.parameters)

        # Accuracy: least squares aims at 1 and 0, the other losses at either side of 0.
        boundary = 0.5 if arguments.gan_loss == "least_squares" else 0.0
        logs["logits_real"] = mean_of_means(real_logits).detach()
        logs["logits_fake"] = mean_of_means(fake_logits).detach()
        logs["accuracy_real"] = mean_of_means([(logits > boundary).float() for logits in real_logits])
        logs["accuracy_fake"] = mean_of_means([(logits < boundary).float() for logits in fake_logits])
        return logs

    def is_finite(self) -> Tensor:
        """End the micro-batches of an optimizer step: average statistics and gradients over all processes, and clip.
        Every process must call it.

        Returns: whether all of them are finite, the same on every process; 0-dim bool on the device, for which nothing
            waits before `update`.
        """
        self.averages = torch.stack(self.pending).sum(0)  # (4,), see `play`
        self.pending = []
        if not self.trains:
            if self.arguments.use_adaptive_gan_weight:
                self.averages = mean_across_ranks(self.averages)
            # The gradient of the generator comes of the same numbers, and has its own guard.
            self.finite = torch.ones_like(self.averages[0], dtype=torch.bool)
            return self.finite

        # Statistics and gradients travel in one flat tensor.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = mean_across_ranks(torch.cat([self.averages, *(g.reshape(-1).float() for g in gradients)]))
        self.averages, *pieces = flat.split([4, *(p.numel() for p in self.parameters)])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

        # All processes see the same numbers and decide alike.
        max_norm = self.arguments.max_grad_norm or float("inf")
        self.gradient_norm = nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.finite = has_finite_square(self.gradient_norm) & self.averages.isfinite().all()
        return self.finite

    def update(self, *, skips: bool = False) -> bool:
        """End an optimizer step: step, and move the running means. A non-finite gradient skips the update: nothing
        changes but the schedule.

        Args: skips: whether the generator's step is skipped, and the update with it.
        Returns: whether this step was one of the discriminator's, so that `gradient_norm` is new.
        """
        if self.pending:
            self.is_finite()
        if not self.trains:
            if self.arguments.use_adaptive_gan_weight and not skips:
                self.blend_gradients(self.averages.cpu())
            advance(self.scheduler)
            return False

        # What the host decides by and keeps comes over in one copy, after the generator's backward.
        *averages, is_finite = torch.cat([self.averages, self.finite[None].float()]).cpu()
        # Weights, moments, LeCAM's anchors and the adaptive factor, or nothing of it.
        if is_finite and not skips:
            self.optimizer.step()
            self.blend("anchors", torch.stack(averages[:2]), decay=0.99)
            self.blend_gradients(torch.stack(averages))
            self.updates += 1
            self.skipped_in_a_row = 0
        else:
            for buffer, value in zip(self.discriminator.buffers(), self.buffers, strict=True):
                buffer.copy_(value)
            self.skipped_updates += 1
            self.skipped_in_a_row += 1
        advance(self.scheduler)
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def problem(self) -> str:
        """Why the run ends with an error, in words; "" where it does not. Where the generator is updated more often,
        its guard sees no row of skipped steps."""
        if self.skipped_in_a_row < self.arguments.max_skipped_steps:
            return ""
        return f"{self.skipped_in_a_row} updates of the discriminator in a row had non-finite gradients"

    def blend_gradients(self, statistics: Tensor) -> None:
        """Move the running means of the adaptive factor, where this step has taken the generator's gradient."""
        if statistics[3] > 0 and torch.isfinite(statistics).all():
            self.blend("gradients", statistics[2:], decay=0.9)

    def blend(self, name: str, value: Tensor, *, decay: float) -> None:
        """Move a running mean towards `value`; the first value is taken whole."""
        is_first = not self.statistics[name].any()
        self.statistics[name] = value.clone() if is_first else decay * self.statistics[name] + (1 - decay) * value

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """bfloat16 for the discriminator's forward where the run asks for it."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.arguments.bf16)

    # ---- State.

    def state_dict(self) -> dict:
        """Everything a resumed run needs, loadable with `weights_only=True`."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "statistics": self.statistics,
            "updates": self.updates,
            "skipped_updates": self.skipped_updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a state; `prepare` must have run."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.statistics = {name: value.cpu() for name, value in state["statistics"].items()}
        self.updates, self.skipped_updates = state["updates"], state["skipped_updates"]

    def apply_flags(self, lr_scheduler_type: str, lengths: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Let this run's flags take effect in the optimizer and the schedule of a restored state.

        Args: lengths: of the schedule, see `utils/resuming/schedules.py`.
        Returns: the learning rate of the next update in the checkpoint, and now.
        """
        arguments = self.arguments
        betas = (arguments.discriminator_beta1, arguments.adam_beta2)
        # The checkpoint holds which kernels its machine stepped with; this run has its own.
        fused = self.optimizer.defaults["fused"]
        settings = [{"initial_lr": arguments.discriminator_learning_rate, "betas": betas, "fused": fused}]
        n_warmup_steps = min(arguments.gan_warmup_steps, lengths[0][1] // 2)
        factor = rate_factor(lr_scheduler_type, n_warmup_steps=n_warmup_steps, lengths=lengths)
        return apply_settings(self.optimizer, self.scheduler, settings, factor)


def mean_of_means(tensors: list[Tensor]) -> Tensor:
    """The mean over sub-discriminators of the mean of each."""
    return torch.stack([tensor.mean() for tensor in tensors]).mean()
