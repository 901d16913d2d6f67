"""The device of this process: how exactly it computes, how it is fed, what is compiled for it."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows
    resource = None

MAX_LOADERS = 4  # Processes that load data for one GPU, unless --num_workers says how many.
PREFETCHED = 4  # Batches that each of them holds ready.


def compute_device() -> torch.device:
    """The NVIDIA GPU where there is one, computing fp32 exactly, else Apple's, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    set_fp32_precision(use_tf32=False)
    return torch.device("cuda")


def set_fp32_precision(use_tf32: bool) -> None:
    """Choose what NVIDIA GPUs do with fp32 matrix products and convolutions.

    TensorFloat-32 keeps 10 bits of the mantissa. PyTorch uses it for convolutions unless told otherwise, so that a GPU
    differs from a CPU by about 1e-3. Each level is set, since the eager kernels read the lowest of them and compiled
    convolutions the one of the whole library. The older switches `allow_tf32` are set first: torch.export and inductor
    still read them, and PyTorch raises an error where old and new settings disagree.
    """
    backends = torch.backends
    # On the CPU, exact in either case; otherwise the global level would reach it.
    for level in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn):
        level.fp32_precision = "ieee"
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = use_tf32
    # Global, matrix products, cuDNN as a whole, and its convolutions and recurrent layers.
    for level in (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn):
        level.fp32_precision = "tf32" if use_tf32 else "ieee"


def computes_bf16(processor_flags: str | None = None) -> bool:
    """Whether the CPU has instructions for bf16; without them autocast to bf16 takes several times as long as fp32.

    Args: processor_flags: the names in Linux' /proc/cpuinfo; None: those of this machine. Other systems do not say.
    """
    if processor_flags is None:
        try:
            processor_flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            return True
    # x86's names, and ARM's.
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(processor_flags.split()))


def use_deterministic_kernels() -> None:
    """Make PyTorch choose kernels that give the same bits in every run, and refuse operations that have none.

    Call it before the first CUDA computation: cuBLAS reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def feeding(num_workers: int, *, has_gpu: bool, n_cores: int, n_processes: int) -> dict[str, Any]:
    """How batches reach the device, and which AdamW runs there, as keywords of transformers' `TrainingArguments`.

    A GPU is fed by processes of its own, from pinned memory while it computes, and steps with one kernel for many
    parameters. A CPU has no cores to spare for such processes, and nothing to copy to.

    Args:
        num_workers: of `--num_workers`; -1: as many as suit the device.
        n_cores: of this machine that may be used.
        n_processes: training processes on this machine.
    """
    if num_workers < 0:
        # One core is left to the training process, which launches the kernels.
        num_workers = min(MAX_LOADERS, max(0, n_cores // n_processes - 1)) if has_gpu else 0
    return {
        "dataloader_num_workers": num_workers,
        "dataloader_persistent_workers": num_workers > 0,
        "dataloader_prefetch_factor": PREFETCHED if num_workers else None,
        "dataloader_pin_memory": has_gpu,
        "accelerator_config": {"non_blocking": has_gpu},
        "optim": "adamw_torch_fused",
    }


def describe_device(device: torch.device) -> str:
    """The device of a measurement, for tables and files."""
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def usable_cpus() -> int:
    """CPUs that this process may use."""
    # The affinity, where the system knows it: a container may have fewer CPUs than the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes() -> int:
    """Processes of this run on this machine, as the launcher says: torchrun, SLURM's recipe, or deepspeed."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the NVIDIA GPU where there is one, else of this process, with which Apple's shares it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        import psutil  # accelerate brings it

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30  # The peak is known on Windows alone.
    if sys.platform == "linux" and (peak := status_peak_gib()) is not None:
        return peak
    # macOS counts bytes, other systems kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def status_peak_gib() -> float | None:
    """Peak memory of this process in GiB, from /proc/self/status; None: it has no such line. On Linux the value of
    `getrusage` includes the memory of the parent process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(peak[1]) / 2**20 if peak else None


def compile_in_place(model: nn.Module, backend: str = "inductor") -> None:
    """Compile a model's repeated blocks, each by itself, or the whole model where it names none.

    A block that occurs many times is compiled once, and a loop over blocks whose length changes needs no new graph.

    Args: backend: of torch.compile.
    """
    # Graphs of one block, such as one per input shape. Beyond the limit, 8 by default, PyTorch runs it uncompiled.
    torch._dynamo.config.recompile_limit = 64
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for module in blocks or [model]:
        module.compile(backend=backend)
