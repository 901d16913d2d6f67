"""One process or many: launch settings for plain python, torchrun and deepspeed, and small collectives."""

import contextlib
import gc
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.options import import_extra

logger = logging.getLogger(__name__)

# One of several processes on a CPU calls its device "cpu:0", "cpu:1", ..., and loads optimizer states to it by that
# name, which `torch.load` knows of other devices only.
torch.serialization.register_package(
    5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched_rank() -> int:
    """The rank that the launcher set in the environment, known before the process group exists."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    """The number of processes that the launcher set in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def end_processes() -> None:
    """Leave the process group and end its threads, once nothing of the run refers to it.

    A thread of the group that releases its last work item while Python exits aborts the process.
    """
    if dist.is_available() and dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        gc.collect()  # A trainer and its parts refer to each other, and to the group.
        time.sleep(0.2)  # DeepSpeed keeps the group and its threads: they release the barrier meanwhile.


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Around a run: the processes leave their group together at its end, and where a FloatingPointError or a signal
    (SystemExit) ends it, which all of them raise at the same step."""
    try:
        yield
    except (FloatingPointError, SystemExit) as error:
        traceback.clear_frames(error.__traceback__)  # They refer to the trainer.
        end_processes()
        raise
    end_processes()


def mean_across_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def any_across_ranks(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    return bool(maximum_across_ranks(flag, device))  # The maximum of 0 and 1 is a logical or.


def maximum_across_ranks(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(float(number), device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 shards the weights of a model, which numbers them by `ds_id`. Each forward gathers them from all
    processes, which must therefore call it equally often."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def broadcast_tensors(tensors: list[torch.Tensor]) -> None:
    """Overwrite the tensors with those of rank 0, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def from_main(value: Any) -> Any:
    """The value (any picklable object) as rank 0 has it."""
    if world_size() == 1:
        return value
    box = [value]  # Overwritten in place, except on rank 0.
    dist.broadcast_object_list(box, 0)
    return box[0]


def load_deepspeed_config(file: str) -> dict[str, Any]:
    """The content of a DeepSpeed configuration file. Raises: ValueError: it is no JSON object; names the file."""
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed_config={file} is no JSON ({error}); see ds_config_zero-2.json") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed_config={file} holds no JSON object; see ds_config_zero-2.json")
    return config


def read_deepspeed_config(file: str, bf16: bool) -> dict:
    """The DeepSpeed configuration with the autocast section that `--bf16` means.

    Raises:
        ValueError: the file declares what the command line owns (optimizer, scheduler, precision), computes no
            gradient norm, or asks for int8 communication that cannot take effect: without a GPU, below stage 3, or
            of gradients alone on one node.
    """
    config = load_deepspeed_config(file)
    for section in ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast"):
        if section in config:
            raise ValueError(f"{file} declares {section!r}, which the stage's own flags set; remove it from the file")
    # The guard against non-finite gradients reads their norm.
    if not config.get("zero_optimization", {}).get("compute_grad_norm", True):
        raise ValueError(
            f'{file}: "compute_grad_norm": false lets non-finite gradients reach the weights; remove it from the file'
        )
    # ZeRO++: int8 collectives exist for CUDA, and for sharded parameters (stage 3) only.
    zero = config.get("zero_optimization", {})
    int8_keys = [key for key in INT8_KEYS if zero.get(key)]
    if int8_keys and not torch.cuda.is_available():
        raise ValueError(
            f"{file} asks for int8 collectives ({', '.join(int8_keys)}), which DeepSpeed implements for CUDA only, "
            "and this machine has no GPU; use ds_config_zero-3.json for the same sharding without int8"
        )
    if int8_keys and zero.get("stage") != 3:
        raise ValueError(
            f"{file}: {', '.join(int8_keys)} take effect at stage 3 only, not at stage={zero.get('stage')}"
        )
    # DeepSpeed quantizes gradients between nodes, which it counts so.
    if "zero_quantized_gradients" in int8_keys and launched_world_size() // torch.cuda.device_count() < 2:
        problem = f"{file}: zero_quantized_gradients has no effect on one node, where gradients stay in full precision"
        if int8_keys == ["zero_quantized_gradients"]:
            raise ValueError(f"{problem}; use ds_config_zero-3.json")
        if launched_rank() == 0:
            logger.warning("%s; the weights are gathered in int8", problem)
    # Autocast over fp32 weights, as without DeepSpeed; its own bf16 section would train and save bfloat16 weights.
    if bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


INT8_KEYS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def launch_settings(use_deepspeed: bool, deepspeed_config: str, bf16: bool) -> dict:
    """TrainingArguments' keywords that make any launcher work on CPU (gloo) and CUDA (nccl).

    On a machine without a GPU, accelerate derives a world size of 1 for DeepSpeed; a process state made beforehand
    with the gloo backend avoids that, and leaving out the compiled shared-memory op avoids a compiler and its lock
    files.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Else importing DeepSpeed warns that it finds no GPU.
    from accelerate import PartialState
    from accelerate.utils import is_deepspeed_available, other

    # accelerate would import DeepSpeed, where it is installed, whenever it unwraps a model.
    other.is_deepspeed_available = is_deepspeed_available if use_deepspeed else lambda: False
    if not use_deepspeed:
        distributed = "LOCAL_RANK" in os.environ and not has_gpu
        # One process trains on Apple's GPU; gloo, which connects several, knows the CPU alone.
        is_cpu = distributed or not (has_gpu or torch.backends.mps.is_available())
        return {"bf16": bf16, "use_cpu": is_cpu, **({"ddp_backend": "gloo"} if distributed else {})}

    config = read_deepspeed_config(deepspeed_config, bf16)
    # Imported before a group of processes exists: functions that are defined later would keep it alive for ever.
    deepspeed = import_extra("deepspeed", "deepspeed", "--use_deepspeed (without it, start the run by torchrun)")
    # Plain python: DeepSpeed still reads a launcher's variables. This is a group of one process, on a free port.
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(single)
    settings = {"deepspeed": config}
    # CPU: make the gloo group before the Trainer does.
    if not has_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        settings.update(use_cpu=True, accelerator_config={"use_configured_state": True})
    return settings
