"""Memory of a run that does not depend on its batches: weights, gradients, moments, averages, frozen networks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.adapters.lora import is_of_adapter
from utils.distributed import load_deepspeed_config

FP32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a run's states are distributed.

    Attributes:
        stage: of ZeRO; -1: without DeepSpeed.
        n_ranks: processes.
        bucket: values of the buffers in which gradients travel; 0: as many as there are gradients.
    """

    stage: int = -1
    n_ranks: int = 1
    bucket: int = 0

    @classmethod
    def of(cls, args: Any, n_ranks: int) -> "Engine":
        """The engine that the flags of a run describe."""
        if not args.use_deepspeed:
            return cls(n_ranks=n_ranks)
        zero = load_deepspeed_config(args.deepspeed_config).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        # DeepSpeed's default of the bucket; communication that overlaps takes two of them below stage 3.
        n_buckets = 2 if zero.get("overlap_comm") and stage < 3 else 1
        return cls(stage, n_ranks, n_buckets * int(zero.get("reduce_bucket_size", 5e8)))

    def share(self, from_stage: int) -> float:
        """The share of a process in what ZeRO shards from a stage on."""
        return 1 / self.n_ranks if self.stage >= from_stage else 1.0


def n_bytes(*networks: nn.Module) -> int:
    """Bytes of parameters and buffers, those of a tensor with several names once."""
    tensors = {tensor for network in networks for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def plain_bytes(network: nn.Module) -> int:
    """`n_bytes` of a network without its adapters, as it is once they are merged."""
    tensors = (*network.named_parameters(), *network.named_buffers())  # Those with several names come once.
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if not is_of_adapter(name))


def n_trained(network: nn.Module) -> int:
    """Number of parameters that take gradients."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def average_entries(args: Any) -> int:
    """Values that averages keep for each trained parameter in the optimizer's state: of weights, and of gradients for
    GrokFast."""
    filters = {"grokfast_ema": 1, "grokfast_ma": args.grokfast_window}
    return int(args.use_ema) + filters.get(args.trainer, 0)


def memory_of(model: nn.Module, parts: Mapping[str, Any], args: Any, engine: Engine) -> dict[str, float]:
    """Bytes of one process by what holds them; activations, batches and layers that ZeRO-3 gathers come on top.

    Args:
        model: on any device.
        parts: the trainer's, see `Stage.build_trainer_parts`: `criterion`, a module, and `adversary`.
        args: flags of the run.
    """
    trained = FP32 * n_trained(model)
    rows = {
        "weights": n_bytes(model) * engine.share(3),
        "gradients": trained * engine.share(2),
        "Adam's two moments": 2 * trained * engine.share(1),
        "averages of weights and gradients": average_entries(args) * trained * engine.share(1),
    }
    # ZeRO steps with a flat copy of its share of the weights, and sums gradients in buckets, as DDP does.
    if engine.stage >= 1:
        rows["flat copy of the weights"] = trained * engine.share(1)
        rows["buckets of gradients"] = FP32 * engine.bucket
    elif engine.stage == -1 and engine.n_ranks > 1:
        rows["buckets of gradients"] = trained
    if args.use_ema:
        # Adapters are merged into it, layer by layer.
        rows["copy with averaged weights, for evaluation"] = plain_bytes(model)
    # Every process holds the whole discriminator, and the frozen networks of the losses.
    if (adversary := parts.get("adversary")) is not None:
        discriminator = adversary.discriminator
        rows["discriminator"] = n_bytes(discriminator)
        rows["its gradients and moments"] = 3 * FP32 * n_trained(discriminator)
    if isinstance(criterion := parts.get("criterion"), nn.Module):
        rows["networks of the losses"] = n_bytes(criterion)
    return {name: size for name, size in rows.items() if size}


def parameter_counts(model: nn.Module, parts: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the networks of a run, by name."""
    networks: dict[str, Any] = {"model": model}
    if (adversary := parts.get("adversary")) is not None:
        networks["discriminator"] = adversary.discriminator
    if (perceptual := getattr(parts.get("criterion"), "perceptual", None)) is not None:
        networks["perceptual network"] = perceptual
    return {name: sum(map(torch.numel, network.parameters())) for name, network in networks.items()}
