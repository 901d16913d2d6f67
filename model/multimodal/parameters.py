"""Parts of a multimodal model by name: which are frozen, and which have a learning rate of their own."""

from collections.abc import Sequence

import torch
from torch import nn

from utils.options import suggest

# Beginnings of the names of a part's parameters. What begins with another part's longer name belongs to that one.
PARTS = {
    "trunk": ("model",),
    "text": ("model.embed_tokens", "lm_head"),
    "image": ("encoder.encoders.image", "decoders.image"),
    "audio": ("encoder.encoders.audio", "decoders.audio"),
}


def parameters_of(model: nn.Module, part: str, flag: str) -> list[nn.Parameter]:
    """The parameters of a part: `trunk` (all layers and norms of the transformer), `text` (embeddings of tokens and
    head), `image`, `audio` (their encoder and decoder), or those whose names begin with a module's.

    Args: flag: that names the part, for the message.
    Raises: ValueError: the model has no such part.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # Tied weights have several names.
    prefixes = PARTS.get(part, (part,))
    others = PARTS["text"] if part == "trunk" else ()
    chosen = [
        parameter
        for name, parameter in named.items()
        if is_below(name, prefixes) and not is_below(name, others) and part
    ]
    if not chosen:
        known = [name for name in PARTS if any(is_below(row, PARTS[name]) for row in named)]
        raise ValueError(
            f"--{flag} {part!r} names no part of this model{suggest(part, known)}; it has {', '.join(known)}, and "
            f"modules such as {next(iter(named)).rpartition('.')[0]}"
        )
    return list(dict.fromkeys(chosen))


def is_below(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a parameter is one of the modules, or within one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts from training.

    Raises: ValueError: an unknown part, one of which nothing is trained anyway, or nothing would be trained.
    """
    chosen = {part: parameters_of(model, part, "freeze") for part in parts}
    for part, own in chosen.items():
        if not any(parameter.requires_grad for parameter in own):
            raise ValueError(
                f"--freeze {part} has no effect: nothing of it is trained, since it has no adapters of --lora_rank; "
                "leave it out"
            )
    for own in chosen.values():
        for parameter in own:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {' '.join(parts)} freezes the whole model: nothing would be trained; name fewer")


def rate_factors(model: nn.Module, pairs: Sequence[str]) -> dict[nn.Parameter, float]:
    """Factors of the learning rate by parameter, from pairs such as `trunk:0.1`; of several that name a parameter the
    last one counts.

    Raises: ValueError: a pair that is none, a factor that is not above 0, an unknown part, a part without effect.
    """
    factors: dict[nn.Parameter, float] = {}
    owners: dict[nn.Parameter, str] = {}
    for pair in pairs:
        part, _, text = pair.partition(":")
        factor = factor_of(text, pair)
        own = parameters_of(model, part, "learning_rates")
        trained = [parameter for parameter in own if parameter.requires_grad]
        if not trained:
            raise ValueError(
                f"--learning_rates {pair} has no effect: --freeze excludes {part} from training, or --lora_rank gives "
                "it no adapters"
            )
        factors |= dict.fromkeys(trained, factor)
        owners |= dict.fromkeys(trained, pair)
    if unused := [pair for pair in pairs if pair not in owners.values()]:
        raise ValueError(f"--learning_rates {unused[0]} has no effect: later entries name all that it names")
    return factors


def factor_of(text: str, pair: str) -> float:
    """The factor of a pair. Raises: ValueError: it is no number above 0."""
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ValueError(
            f"--learning_rates {pair}: {text!r} must be a number above 0, as in trunk:0.1; --freeze trains not at all"
        )
    return factor


def split_groups(optimizer: torch.optim.Optimizer, factors: dict[nn.Parameter, float]) -> None:
    """Split an optimizer's groups by the factors of their learning rate; groups at the full rate come first, whose
    rate is logged. Empty groups, which engines cannot flatten, are dropped."""
    groups = []
    for group in optimizer.param_groups:
        own = {parameter: factors.get(parameter, 1.0) for parameter in group["params"]}
        for factor in sorted(set(own.values())):
            chosen = [parameter for parameter in group["params"] if own[parameter] == factor]
            groups.append((factor, {**group, "params": chosen, "lr": group["lr"] * factor}))
    groups.sort(key=lambda pair: pair[0] != 1)
    optimizer.param_groups[:] = [group for _, group in groups]
