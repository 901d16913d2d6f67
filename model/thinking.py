"""How long a model with recurrent depth thinks: the options of one call, and the number of steps sampled in training.

B batch, L positions, D hidden.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST_MEAN = 1e-9  # stands for a Poisson mean of 0, whose logarithm is infinite


def lognormal_poisson(generator: np.random.Generator, mean: float, sigma: float) -> int:
    """A sample of the log-normal Poisson distribution (arXiv 2502.05171, section 3.3).

    tau ~ N(log(mean) - sigma^2 / 2, sigma), n ~ Poisson(exp(tau)), so that E[n] = mean for every sigma.

    Args:
        mean: of n, at least 0.
        sigma: std of the logarithm of the Poisson rate; 0: plain Poisson.
    """
    log_rate = generator.normal(math.log(max(mean, SMALLEST_MEAN)) - 0.5 * sigma**2, sigma)  # E[exp(tau)] = mean
    return int(generator.poisson(math.exp(log_rate)))


def sample_thinking_steps(config, generator: np.random.Generator, mean: float | None = None) -> int:
    """Sample the number of thinking steps of a training step: 1 + log-normal Poisson of mean `mean` - 1, then clipped
    to [recurrent_min_thinking_steps, recurrent_max_thinking_steps].

    Args:
        mean: replaces `recurrent_mean_thinking_steps`, at least 1.
    """
    mean = config.recurrent_mean_thinking_steps if mean is None else mean
    # The distribution "fixed" is the mean itself.
    steps = round(mean)
    if config.recurrent_steps_distribution == "lognormal_poisson":
        steps = 1 + lognormal_poisson(generator, mean - 1, config.recurrent_sigma)
    return min(max(steps, config.recurrent_min_thinking_steps), config.recurrent_max_thinking_steps)


@dataclass
class CarriedState:
    """The core's last state, from which further calls on the same tokens go on, such as the steps of a solver.

    A call without a state takes all steps. One with a state takes the last `n_steps` of them, and reads the keys and
    values that the past has at those.

    Args:
        n_steps: steps of a call that goes on, at least 1 and at most all.
        state: (B, L, D); written by each call.
    """

    n_steps: int
    state: Tensor | None = None


@dataclass
class Thinking:
    """Thinking options of one call; None leaves an option to the configuration.

    Args:
        n_steps: steps of the core, the maximum where exits are on; default: sampled in training, otherwise
            `recurrent_test_thinking_steps`.
        n_backprop_steps: number of last steps that gradients flow through; default: `recurrent_backprop_steps`.
        initial_state: standard normal noise for `recurrent_state_initialization="normal"`, (B, L, D).
        exit_threshold: replaces `recurrent_exit_criteria_threshold`; 0: no exits.
        carried: state that is carried over calls, in evaluation and without exits; None: each call begins anew.
    """

    n_steps: int | None = None
    n_backprop_steps: int | None = None
    initial_state: Tensor | None = None
    exit_threshold: float | None = None
    carried: CarriedState | None = None

    def resolve(self, config, is_training: bool) -> "ResolvedThinking":
        """The options in force: defaults filled in from the configuration, a threshold of 0 where there are no exits.

        A model without a recurrent core gets 0 steps.

        Raises: ValueError: an option contradicts the configuration, or has no effect with it.
        """
        if not config.n_recurrent_layers:
            self.refuse_without_core()
            return ResolvedThinking()
        self.check(config)
        # Exits belong to inference: training takes all its steps.
        threshold = self.exit_threshold
        if is_training or config.recurrent_exit_criterion == "none":
            threshold = 0.0
        elif threshold is None:
            threshold = config.recurrent_exit_criteria_threshold
        n_backprop_steps, n_steps = self.n_backprop_steps, self.choose_steps(config, is_training)
        if self.carried is not None:
            self.check_carried(self.carried, n_steps, has_exits=threshold > 0, is_training=is_training)
        return ResolvedThinking(
            n_steps=n_steps,
            n_backprop_steps=config.recurrent_backprop_steps if n_backprop_steps is None else n_backprop_steps,
            initial_state=self.initial_state,
            exit_threshold=threshold,
            carried=self.carried,
        )

    def check_carried(self, carried: CarriedState, n_steps: int, *, has_exits: bool, is_training: bool) -> None:
        """Raises: ValueError: a carried state in training, with exits, or for other than 1 to `n_steps` steps."""
        if is_training or has_exits:
            raise ValueError("a carried state belongs to evaluation without exits: model.eval(), exit_threshold=0")
        if not 1 <= carried.n_steps <= n_steps:
            raise ValueError(f"carried n_steps={carried.n_steps} must be from 1 to all thinking steps, {n_steps}")

    def refuse_without_core(self) -> None:
        """Raise ValueError for any option given to a model without a recurrent core, by the name of its argument."""
        given = {
            "n_thinking_steps": self.n_steps,
            "n_backprop_steps": self.n_backprop_steps,
            "initial_state": self.initial_state,
            "exit_threshold": self.exit_threshold,
            "carried": self.carried,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} has no effect: n_recurrent_layers=0, this model has no recurrent core")

    def check(self, config) -> None:
        """Raise ValueError where an option has no effect with this configuration, or is out of its range."""
        kind = config.recurrent_state_initialization
        if self.initial_state is not None and kind != "normal":
            raise ValueError(f"initial_state has no effect with recurrent_state_initialization={kind!r}")
        if self.n_backprop_steps is not None and self.n_backprop_steps < 1:
            raise ValueError(f"n_backprop_steps={self.n_backprop_steps} must be >= 1")
        if self.exit_threshold and config.recurrent_exit_criterion == "none":
            raise ValueError(
                f"exit_threshold={self.exit_threshold} has no effect with recurrent_exit_criterion='none'"
            )

    def choose_steps(self, config, is_training: bool) -> int:
        """The number of thinking steps; without one given it is sampled in training, else that of the configuration.

        Raises: ValueError: outside [1, recurrent_max_thinking_steps].
        """
        steps, limit = self.n_steps, config.recurrent_max_thinking_steps
        if steps is None and is_training:
            # Seeded from torch's stream, so that `torch.manual_seed` fixes it.
            steps = sample_thinking_steps(config, np.random.default_rng(int(torch.randint(2**31, ()))))
        if steps is None:
            steps = config.recurrent_test_thinking_steps or config.recurrent_mean_thinking_steps
        if not 1 <= steps <= limit:
            raise ValueError(f"n_thinking_steps={steps} must be from 1 to recurrent_max_thinking_steps={limit}")
        return steps


@dataclass
class ResolvedThinking(Thinking):
    """Thinking options in force: every number is known."""

    n_steps: int = 0
    n_backprop_steps: int = 0
    exit_threshold: float = 0.0

    @property
    def n_taken(self) -> int:
        """Steps that the call takes: all, or those that go on from a carried state."""
        return self.n_steps if self.carried is None or self.carried.state is None else self.carried.n_steps
