"""Exponential moving average of the weights, kept in fp32 beside the optimizer's state, exact under DDP and ZeRO."""

import torch
from torch import Tensor, nn

from utils.grokfast import OptimizerHook


class WeightEMA(OptimizerHook):
    """After each step: average <- d average + (1 - d) weight, with d = min(decay, (1 + n) / (10 + n)) at the n-th
    step.

    The warm-up of d is that of TensorFlow's ExponentialMovingAverage(num_updates). The average lives in
    `optimizer.state[p]["weight_ema"]`: it is sharded, saved and restored with the optimizer.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs):
        super().after_step(optimizer, args, kwargs)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if not state:
                    continue
                if "weight_ema" not in state:
                    state["weight_ema"] = parameter.detach().float().clone()
                n = float(state["step"])
                decay = min(self.decay, (1 + n) / (10 + n))
                state["weight_ema"].lerp_(parameter.detach().float(), 1 - decay)

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
        averages = {parameter: self.average_of(parameter).detach() for parameter in model.parameters()}
        named = {name: averages[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
        return {**model.state_dict(), **named}

    def average_of(self, parameter: nn.Parameter) -> Tensor:
        """The whole average of one parameter, gathered where ZeRO shards it."""
        if parameter in self.optimizer.state:
            return self.optimizer.state[parameter]["weight_ema"]
        from deepspeed.utils import safe_get_full_optimizer_state

        average = safe_get_full_optimizer_state(parameter, "weight_ema")
        assert average is not None, "the engine lost the weight average of a parameter"
        return average
