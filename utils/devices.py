"""The device of this process, and how exactly it computes in fp32."""

import torch


def compute_device() -> torch.device:
    """The GPU where there is one, computing fp32 exactly, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    set_fp32_precision(use_tf32=False)
    return torch.device("cuda")


def set_fp32_precision(use_tf32: bool) -> None:
    """Choose what NVIDIA GPUs do with fp32 matrix products and convolutions.

    TensorFloat-32 keeps 10 bits of the mantissa. PyTorch uses it for convolutions unless told otherwise, so that a GPU
    differs from a CPU by about 1e-3.
    """
    precision = "tf32" if use_tf32 else "ieee"
    backends = torch.backends
    for backend in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        backend.fp32_precision = precision
