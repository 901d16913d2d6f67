"""Hooks around an optimizer's step: the guard against non-finite gradients, GrokFast's gradient filters
(arXiv 2405.20233), and the moving average of the weights, exact under DDP and ZeRO.

A filter adds the amplified slow part of the gradient, elementwise and linearly, just before the optimizer's step. It
acts on whatever parameters the optimizer holds, whole or ZeRO's flat shards, with its state in `optimizer.state[p]`:
it is sharded, saved and restored with the optimizer.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class OptimizerHook:
    """Base of hooks that work per parameter around an optimizer's step.

    ZeRO steps each parameter group separately, so that one training step may fire the hook several times: counters
    live per parameter.
    """

    entries: ClassVar[tuple[str, ...]] = ()  # What the hook keeps in `optimizer.state[p]`.

    def __init__(self):
        self.fired = 0
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Register with the optimizer that really steps."""
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Called before each optimizer step, after clipping; `after_step` follows it."""

    def after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.fired += 1

    def resume(self) -> None:
        """Called once the optimizer's state has been restored, which may be of a run without this hook."""


class GradientFilter(OptimizerHook):
    """Replaces each gradient g by g + lambda * slow(g); subclasses say what the slow part is."""

    def __init__(self, lamb: float):
        super().__init__()
        self.lamb = lamb
        # torch optimizers initialise a parameter's state when it is empty: new keys wait until the first step is done.
        self.waiting: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def before_step(self, optimizer, args, kwargs):
        for parameter in with_gradients(optimizer):
            state = optimizer.state[parameter]
            target = state if state else self.waiting.setdefault(parameter, {})
            parameter.grad.add_(self.slow_part(target, parameter.grad), alpha=self.lamb)

    def after_step(self, optimizer, args, kwargs):
        super().after_step(optimizer, args, kwargs)
        # The optimizer has initialised its state by now.
        for parameter, values in self.waiting.items():
            optimizer.state[parameter].update(values)
        self.waiting.clear()

    def slow_part(self, state: dict, gradient: Tensor) -> Tensor:
        """The slow part of the gradient, updating the filter's entries of `state`."""
        raise NotImplementedError


class GradientEMA(GradientFilter):
    """GrokFast-EMA: the slow part is m <- alpha m + (1 - alpha) g, started at the first gradient (Algorithm 1)."""

    entries = ("grokfast_ema",)

    def __init__(self, alpha: float = 0.98, lamb: float = 2.0):
        super().__init__(lamb)
        self.alpha = alpha

    def slow_part(self, state, gradient):
        if "grokfast_ema" not in state:
            state["grokfast_ema"] = gradient.clone()
        else:
            state["grokfast_ema"].lerp_(gradient, 1 - self.alpha)
        return state["grokfast_ema"]


class GradientMA(GradientFilter):
    """GrokFast-MA: the slow part is the mean of the last `window` gradients, 0 until the window is full (Algorithm 2).

    A ring buffer holds the window; the mean is taken anew each step, so that no rounding error accumulates.
    """

    entries = ("grokfast_ring", "grokfast_count")

    def __init__(self, window: int = 100, lamb: float = 5.0):
        super().__init__(lamb)
        self.window = window

    def resume(self):
        # A window of another length is filled anew.
        for state in self.optimizer.state.values():
            if "grokfast_ring" in state and len(state["grokfast_ring"]) != self.window:
                del state["grokfast_ring"], state["grokfast_count"]
            # Loading an optimizer moves its state to the GPU; a count that is read there makes the host wait.
            if "grokfast_count" in state:
                state["grokfast_count"] = state["grokfast_count"].cpu()

    def slow_part(self, state, gradient):
        if "grokfast_ring" not in state:
            state["grokfast_ring"] = gradient.new_zeros((self.window, *gradient.shape))
            state["grokfast_count"] = torch.zeros((), dtype=torch.float32)
        # The oldest gradient is overwritten.
        count = int(state["grokfast_count"])
        state["grokfast_ring"][count % self.window] = gradient
        state["grokfast_count"] += 1
        return state["grokfast_ring"].mean(0) if count + 1 >= self.window else torch.zeros_like(gradient)


class NonFiniteGuard(OptimizerHook):
    """Skips the optimizer steps whose gradient is not finite, on all processes alike: such a step changes nothing.

    A step is skipped where the squared norm of its gradient is no finite fp32 number. The gradient is that of the
    whole step, over all parameters, micro-batches and processes, before clipping: a larger norm would make clipping
    multiply by 0. `judge` is called once per optimizer step, the hook then keeps the gradients from the optimizer.

    Attributes:
        skips: whether the present optimizer step is skipped.
        skipped, in_a_row: skipped steps of the whole run, and those since the last one that was not.
        applied: steps that this process has not skipped; `applied_when_saved`: those that a good checkpoint holds.
    """

    def __init__(self, limit: int, any_across_ranks: Callable[[bool, torch.device], bool]):
        super().__init__()
        self.limit, self.any_across_ranks = limit, any_across_ranks
        self.skips = False
        self.skipped = self.in_a_row = self.applied = self.applied_when_saved = 0
        self.zero: Any = None  # ZeRO's optimizer, where it shards gradients.
        self.withheld: list[tuple[Tensor, Tensor | None]] = []  # ZeRO's shards, and their gradients

    def judge(self) -> None:
        """Decide about the present step, from the whole gradients that the optimizer's parameters hold."""
        gradients = [parameter.grad for parameter in with_gradients(self.optimizer)]
        if not gradients:
            return
        norm = nn.utils.get_total_norm(gradients)
        self.count(self.any_across_ranks(is_too_large(norm), norm.device))

    def count(self, skips: bool) -> None:
        """Note the decision about a step."""
        self.skips = skips
        if skips:
            self.in_a_row += 1
            self.skipped += 1
        else:
            self.in_a_row = 0
            self.applied += 1

    def mark_saved(self) -> None:
        """Note that a checkpoint holds what was trained so far, unless it lies in a row of skipped steps."""
        if not self.in_a_row:
            self.applied_when_saved = self.applied

    def problem(self, *, is_over: bool) -> str:
        """Why the run ends with an error, in words that name the steps; "" where it does not.

        Args: is_over: whether this was the last step of the run.
        """
        # A row of such steps is no longer a single bad batch.
        if self.in_a_row >= self.limit:
            return f"{self.in_a_row} optimizer steps in a row had non-finite gradients"
        if is_over and self.in_a_row and self.applied == self.applied_when_saved:
            return f"all of the last {self.in_a_row} optimizer steps had non-finite gradients: nothing was trained"
        return ""

    def before_step(self, optimizer, args, kwargs):
        if self.zero is not None:
            self.skips = is_too_large(self.zero._global_grad_norm)
        # Without gradients the optimizer leaves weights and moments as they are, and so do the other hooks.
        if self.skips:
            for parameter in with_gradients(optimizer):
                if self.zero is not None:
                    self.withheld.append((parameter, parameter.grad))
                parameter.grad = None

    def state_dict(self) -> dict[str, int]:
        """The counts of the whole run."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the counts of a resumed run."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def watch(self, engine: Any) -> None:
        """Judge the steps of a DeepSpeed engine, which makes them within `backward`.

        ZeRO stage 0 holds whole gradients, which are judged before the engine clips them. The other stages have the
        norm once they step; where it is not finite, they skip the step before any hook.
        """
        step, is_sharded = engine.step, engine.zero_optimization_stage() > 0
        self.zero = engine.optimizer if is_sharded else None

        def judged_step(*args, **kwargs) -> None:
            if not is_sharded:
                self.judge()
            step(*args, **kwargs)
            # Offloaded optimizers keep the buffers of their gradients.
            for parameter, gradient in self.withheld:
                parameter.grad = gradient
            self.withheld.clear()
            if is_sharded:
                # The Trainer would stop the schedule at an overflow, which no other engine reports.
                engine.optimizer.overflow = False
                self.count(is_too_large(engine.get_global_grad_norm()))

        engine.step = judged_step


def is_too_large(norm: Tensor | float) -> bool:
    """Whether the square of a gradient's norm is no finite fp32 number, on every engine alike: some compute norms in
    fp64, or without squares where there is one value. Reading it waits for the GPU."""
    return not has_finite_square(torch.as_tensor(norm)).item()


def has_finite_square(norm: Tensor) -> Tensor:
    """The opposite as a tensor on the norm's device, for which nothing waits."""
    return norm.float().square().isfinite()


def resume_hooks(hooks: Sequence[OptimizerHook], optimizer: torch.optim.Optimizer) -> None:
    """Fit the restored state of an optimizer to this run's hooks: what others have kept there is dropped."""
    entries = {name for kind in (GradientEMA, GradientMA, WeightEMA) for name in kind.entries}
    for state in optimizer.state.values():
        for name in entries.difference(*(hook.entries for hook in hooks)):
            state.pop(name, None)
    for hook in hooks:
        hook.resume()


def advance(scheduler: Any) -> None:
    """Step a schedule of the learning rate beside an optimizer that may never have stepped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
        scheduler.step()


def with_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's parameters that have a gradient in this step."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p.numel() > 0]


class WeightEMA(OptimizerHook):
    """After each step: average <- d average + (1 - d) weight, with d = min(decay, (1 + n) / (10 + n)) at the n-th
    step. A step without gradients, which is a skipped one, does not count.

    The warm-up of d is that of TensorFlow's ExponentialMovingAverage(num_updates). The average lives in
    `optimizer.state[p]["weight_ema"]`: it is sharded, saved and restored with the optimizer.
    """

    entries = ("weight_ema",)

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        # Steps of each parameter as its optimizer counts them. Fused optimizers count on the GPU, where a number that
        # is read makes the host wait; it is read once.
        self.steps: dict[Tensor, int] = {}

    def resume(self):
        self.steps.clear()
        # An average that the run had not so far starts at the present weights.
        for parameter, state in self.optimizer.state.items():
            if state and "weight_ema" not in state:
                state["weight_ema"] = parameter.detach().float().clone()

    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs):
        super().after_step(optimizer, args, kwargs)
        if not with_gradients(optimizer):  # A skipped step.
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                # A parameter that has not been stepped has no state, and nothing to average.
                if not state:
                    continue
                # The average starts at the weights after the first step.
                if "weight_ema" not in state:
                    state["weight_ema"] = parameter.detach().float().clone()
                n = self.count_step(parameter, state["step"])
                # The first steps count more: a young average must not remember the initial weights.
                decay = min(self.decay, (1 + n) / (10 + n))
                state["weight_ema"].lerp_(parameter.detach().float(), 1 - decay)

    def count_step(self, parameter: Tensor, step: Tensor) -> int:
        """Steps of a parameter so far, the present one among them, in which it has a gradient or not."""
        if parameter not in self.steps:
            self.steps[parameter] = int(step)
        elif parameter.grad is not None:
            self.steps[parameter] += 1
        return self.steps[parameter]

    def state_dict_of(self, model: nn.Module, engine=None) -> dict[str, Tensor] | None:
        """The model's state dict with averaged parameters, buffers as they are, fp32, on every process.

        A parameter that has several names has its average under each of them, as the same tensor.

        Args:
            model: the plain model.
            engine: the DeepSpeed engine around it, if any. Under ZeRO this gathers shards: all processes must call it.
        Returns: None before the first step.
        """
        if not any("weight_ema" in state for state in self.optimizer.state.values()):
            return None
        zero = getattr(engine, "optimizer", None)
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            # ZeRO 1 and 2 link parameters to their optimizer state once, after the first group's first step, when the
            # other groups have none yet; link them again.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        # One average per parameter, then under each of its names; buffers come from the model.
        averages = {parameter: self.average_of(parameter).detach() for parameter in model.parameters()}
        named = {name: averages[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
        return {**model.state_dict(), **named}

    def average_of(self, parameter: nn.Parameter) -> Tensor:
        """The whole average of one parameter, gathered where ZeRO shards it; a frozen one is its own."""
        # Whole parameters: without ZeRO the optimizer holds them themselves.
        if parameter in self.optimizer.state:
            return self.optimizer.state[parameter]["weight_ema"]
        if not parameter.requires_grad:
            return whole_parameter(parameter)
        from deepspeed.utils import safe_get_full_optimizer_state

        # Shards: ZeRO's optimizer holds flat pieces, which DeepSpeed gathers into the whole.
        average = safe_get_full_optimizer_state(parameter, "weight_ema")
        assert average is not None, "the engine lost the weight average of a parameter"
        return average


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """A parameter in fp32: itself, or a copy that is gathered where ZeRO-3 shards it. Every process must call it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().float().clone()
