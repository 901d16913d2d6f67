"""Lets the flags of a resumed run take effect after transformers has restored those of its checkpoint."""

import logging
from typing import Any

from transformers import TrainerCallback

from utils.optimizer_hooks import resume_hooks
from utils.resuming.schedules import apply_settings, later_lengths, rate_factor

logger = logging.getLogger(__name__)


class ResumeCallback(TrainerCallback):
    """Before the first step of a resumed run: optimizers, schedules and counters follow the flags.

    A checkpoint restores learning rate, weight decay, betas and clipping norm (`optimizer.pt`, the engine's files,
    `stage_state.pt`), the peak rate (`scheduler.pt`), and the steps between log lines, evaluations and checkpoints
    (`trainer_state.json`). Where no flag has changed, the values are the same. An average of the weights that the run
    had not so far starts at the present weights, a GrokFast filter at the next gradient.

    Args: trainer: of this run; its `run_lengths` are those of this run.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, lengths = self.trainer, self.trainer.run_lengths
        state.compute_steps(args, state.max_steps)
        state.train_batch_size = trainer._train_batch_size
        # The model's optimizer and schedule.
        factor = rate_factor(
            args.lr_scheduler_type, n_warmup_steps=args.get_warmup_steps(lengths[0][1]), lengths=lengths
        )
        rates = apply_settings(trainer.optimizer, trainer.lr_scheduler, trainer.optimizer_settings, factor)
        log_rates("learning rate", rates, state.global_step)
        resume_hooks(trainer.hooks, trainer.guard.optimizer)
        # DeepSpeed's optimizers restore the norm to which gradients are clipped.
        engine_optimizer = getattr(trainer.model_wrapped, "optimizer", None)
        if trainer.is_deepspeed_enabled and hasattr(engine_optimizer, "clip_grad"):
            engine_optimizer.clip_grad = trainer.model_wrapped.gradient_clipping()
        # The discriminator's.
        adversary = getattr(trainer, "adversary", None)
        if adversary is not None:
            rates = adversary.apply_flags(
                args.lr_scheduler_type, later_lengths(lengths, adversary.arguments.gan_start_step)
            )
            log_rates("learning rate of the discriminator", rates, state.global_step)


def log_rates(name: str, rates: tuple[float, float], step: int) -> None:
    """A log line where a learning rate is not the one before."""
    if rates[0] != rates[1]:
        logger.info("%s from step %d on: %.4g in place of %.4g", name, step, rates[1], rates[0])
