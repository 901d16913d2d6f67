"""LoRA (arXiv 2106.09685): low-rank adapters on linear layers, y = W x + b + alpha / r * B A x, of which A and B alone
are trained. The package peft wraps the layers; the names of weights are its.

r rank, D inputs, D' outputs: W (D', D), A (r, D), B (D', r). B starts at zero, so that the first step starts from the
given model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.options import suggest

# Classes of attention and feed-forward networks, whose linear layers are adapted where no names are given.
ADAPTED_CLASSES = (
    *("MegaTransformerSelfAttention", "SimpleFFN"),  # of the transformer
    *("Attention", "TextLayer"),  # of the UNets and their text encoder
    *("LDMCrossAttention", "LDMTransformer"),  # of the layout `ldm`
)
ADAPTER = "default"  # peft's name of the only adapter
BASE = ".base_layer."  # in the names of the weights of a wrapped layer
FACTORS = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")  # ends of the names of A and B


def default_alpha(rank: int) -> float:
    """The alpha of a rank where none is given: the update has the factor 2."""
    return 2.0 * rank


def linear_layers(model: nn.Module, names: Sequence[str] = ()) -> list[str]:
    """Full names of the linear layers that get adapters.

    Args: names: ends of full names, such as `qkv_proj` or `text_attention.query`; none: all of attention and
        feed-forward networks.
    Raises: ValueError: a name is of no linear layer, or of one that shares its weight; the model has none.
    """
    parents = {name: type(module).__name__ for name, module in model.named_modules()}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        chosen = [name for name in layers if parents[name.rpartition(".")[0]] in ADAPTED_CLASSES]
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no attention or feed-forward layers; give --lora_modules")
        return chosen
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    for name in names:
        if not any(is_end(name, layer) for layer in layers):
            raise ValueError(f"--lora_modules {name!r} names no linear layer of this model{suggest(name, ends)}")
    chosen = [layer for layer in layers if any(is_end(name, layer) for name in names)]
    # A tied weight would change in both places once adapters are merged.
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for shared in owners.values():
        tied = [name for name in chosen if f"{name}.weight" in shared]
        if tied and len(shared) > 1:
            raise ValueError(
                f"--lora_modules: {tied[0]} shares its weight ({' = '.join(shared)}), which adapters would separate; "
                "name other layers"
            )
    return chosen


def is_end(name: str, layer: str) -> bool:
    """Whether a name is the end of a layer's full name, in whole parts."""
    return name == layer or layer.endswith(f".{name}")


def add_adapters(model: nn.Module, *, rank: int, alpha: float, names: Sequence[str] = ()) -> list[str]:
    """Freeze a model and wrap linear layers with adapters, in place.

    Args: names: see `linear_layers`.
    Returns: full names of the layers.
    Raises: ValueError: see `linear_layers`.
    """
    from peft import LoraConfig, inject_adapter_in_model  # Training with adapters alone needs it.

    layers = linear_layers(model, names)
    pattern = "|".join(map(re.escape, layers))  # peft matches whole names with a pattern, ends of them with a list.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, model, ADAPTER)  # It freezes all other weights.
    return layers


def adapters_of(model: nn.Module) -> dict[str, Any] | None:
    """Rank and alpha of a model's adapters, as a checkpoint keeps them; None where it has none."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    return None if config is None else {"rank": config.r, "alpha": config.lora_alpha}


def is_of_adapter(name: str) -> bool:
    """Whether a weight is the factor A or B of an adapter."""
    return name.endswith(FACTORS)


def merged_weights(state: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model that computes what an adapted one does, W + alpha / r * B A in fp32, one by one.

    Args:
        state: of the adapted model.
        adapters: see `adapters_of`.
    """
    scale = adapters["alpha"] / adapters["rank"]
    for name, value in state.items():
        if is_of_adapter(name):
            continue
        layer, is_wrapped, end = name.partition(BASE)
        if is_wrapped and end == "weight":
            down, up = (state[f"{layer}{factor}"].float() for factor in FACTORS)  # A and B
            value = value.float() + scale * (up @ down)
        yield f"{layer}.{end}" if is_wrapped else name, value


def merge_adapters(state: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> dict[str, Tensor]:
    """`merged_weights` as the state dict of the plain model."""
    return dict(merged_weights(state, adapters))


@torch.no_grad()
def load_merged(model: nn.Module, state: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> None:
    """Give a plain model the `merged_weights` of an adapted one, layer by layer: beside the model's own there is never
    more than one merged weight in memory.

    Raises: ValueError: the models are not the same but for the adapters; names a weight.
    """
    own = model.state_dict()
    for name, value in merged_weights(state, adapters):
        if name not in own:
            raise ValueError(f"{name} of the adapted model is no weight of the plain one")
        own.pop(name).copy_(value)
    if own:
        raise ValueError(f"{next(iter(own))} of the plain model is no weight of the adapted one")
