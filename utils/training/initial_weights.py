"""A new run that starts from the weights of another one: which fields of the configuration it may change."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.adapters.lora import add_adapters, default_alpha
from utils.checkpoints import load_model, read_stage, resolve_checkpoint, warn_of_former_data
from utils.distributed import launched_rank
from utils.generation.foreign_weights import foreign_model
from utils.options import declared_fields
from utils.strict_config import StrictConfig

logger = logging.getLogger(__name__)


def initial_model(
    model_class: type, path: str | Path, config: StrictConfig, *, stage: str, presets: Mapping[str, Any]
) -> nn.Module:
    """A model of this run's configuration with the weights of `--init_from`: of a run of the same stage, see
    `model_with_weights`, or of another library's folder, see `foreign_model`.

    Raises: FileNotFoundError, ValueError: no such folder, of another stage, or its fields do not fit.
    """
    if (model := foreign_model(model_class, path, config, presets)) is not None:
        return model
    read_stage(path, stage)  # Raises for checkpoints of another stage.
    if launched_rank() == 0:
        warn_of_former_data(resolve_checkpoint(path))
    return model_with_weights(model_class, path, config)


def model_with_weights(model_class: type, path: str | Path, config: StrictConfig) -> nn.Module:
    """A model of this run's configuration with the weights of another run, averaged ones where there are some.

    Fields that shape no weights may differ from that run's, such as a dropout or the number of a vocoder's
    projections; a warning names them. Random number generators keep their states.

    Args:
        path: run or checkpoint folder of the same stage.
    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: fields differ that shape weights, or belong to them (`StrictConfig.OF_WEIGHTS`); names them.
    """
    source = load_model(model_class, path)
    names = [field.name for field in declared_fields(config)]
    changes = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(source.config, name)}
    if not changes:
        return source
    shown = ", ".join(f"{name}={value!r} (there {getattr(source.config, name)!r})" for name, value in changes.items())
    # A model of this run's configuration, and a new one of that run's, whose buffers say what its fields determine.
    with torch.random.fork_rng():  # Initial weights are overwritten at once.
        original, model = model_class(source.config), model_class(config)
        refused = [name for name in changes if name in config.OF_WEIGHTS]
        if not refused and have_other_weights(original, model):
            refused = shaping_fields(original, changes) or list(changes)
    if refused:
        values = ", ".join(f"{name}={getattr(source.config, name)!r}" for name in refused)
        raise ValueError(
            f"--init_from {path} has other {', '.join(refused)}, which its weights depend on: this run has {shown}. "
            f"Give --config and --override of {values}, or train a new model without --init_from"
        )
    logger.warning("the run goes on from the weights of %s with %s", path, shown)
    model.load_state_dict(source.state_dict())
    return model.eval()


def adapt(model: nn.Module, args: Any, *, has_weights: bool) -> list[str]:
    """Freeze a model and give it the adapters that `--lora_rank` asks for, in place; nothing where it is 0.

    Args:
        args: flags of the stage; some stages have no adapters.
        has_weights: whether the model has trained weights, or gets those of the checkpoint that is resumed.
    Returns: full names of the layers that have adapters.
    Raises: ValueError: it has none, or a name of `--lora_modules` does not fit.
    """
    rank = getattr(args, "lora_rank", 0)
    if not rank:
        return []
    if not has_weights:
        raise ValueError(
            f"--lora_rank={rank} needs trained weights to adapt, and the run {args.run_name} has no checkpoint to "
            "resume; give --init_from"
        )
    alpha = default_alpha(rank) if args.lora_alpha is None else args.lora_alpha
    return add_adapters(model, rank=rank, alpha=alpha, names=args.lora_modules)


def have_other_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two new models differ in names or shapes of weights, or in a saved buffer's initial value."""
    states = [model.state_dict() for model in (first, second)]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        return True
    buffers = [name for name, _ in first.named_buffers() if name in states[0]]
    return any(not torch.equal(states[0][name], states[1][name]) for name in buffers)


def shaping_fields(original: nn.Module, changes: dict[str, Any]) -> list[str]:
    """Those changes that alone, where they are valid alone, give a new model other weights."""
    names = []
    for name, value in changes.items():
        try:
            changed = type(original)(original.config.replace(**{name: value}))
        except ValueError:
            continue
        if have_other_weights(original, changed):
            names.append(name)
    return names
