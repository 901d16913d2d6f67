"""Gradient checkpointing of a layer."""

from functools import partial
from typing import Any

from torch import nn


class GradientCheckpointingLayer(nn.Module):
    """A layer whose activations are computed again in the backward pass after `gradient_checkpointing_enable()` of a
    transformers model; tensors that need gradients are passed by position.

    It does what `transformers.modeling_layers.GradientCheckpointingLayer` does for layers without a cache, but for
    `every_n_layers`. Importing that one loads text generation and all it can use (scikit-learn, pandas, librosa): 110
    MB in every process that does not train; the `Trainer` loads it too.
    """

    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            # `gradient_checkpointing_enable()` sets this function on every such layer.
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a layer's activations are computed again. A model's own property for it has two names in transformers:
    `is_gradient_checkpointing`, later `is_activation_checkpointing`."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
