"""Whether a sample's file is what was written: its size and CRC stand in the manifest's entry of the sample.

The CRC-32 of the whole file costs about 0.2 ms per megabyte. torch does not compare the CRCs within its files.
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_loading.files import crc_of_file

# dtype and shape of a sample's tensors by name; None: any size along this axis.
TensorKinds = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]


# What allocators of torch, of CUDA and of C++ say when memory is full, oneDNN, and torch of a loader that was killed.
FULL = (
    *("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc"),
    *(
        "bad allocation",
        "ALLOC_FAILED",
        "could not create a primitive",
        "failed to map segment",
        "is killed by signal: Killed",
    ),
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, says that memory is full, and not that a file is damaged."""
    while error is not None:
        is_said = not isinstance(error, ValueError) and any(sign in str(error) for sign in FULL)
        if is_said or isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def digest_of(content: bytes) -> dict[str, Any]:
    """Size and CRC of a sample's file, for its entry."""
    return {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}


def changed_bytes(file: Path, entry: Mapping[str, Any]) -> str:
    """How a sample's file differs from the one that was written, in words; "" if it does not.

    Raises: OSError: the file cannot be read.
    """
    # Entries of earlier versions have no digest: the file's own CRCs, which cover the tensors.
    if "crc32" not in entry:
        try:
            with zipfile.ZipFile(file) as archive:
                member = archive.testzip()
        except OSError:
            raise
        except Exception as error:  # Damaged archives raise errors of many types.
            return f"no file of tensors: {error}"
        return f"the CRC of {member} differs" if member else ""
    # The size first, which needs no reading.
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"it has {size} bytes, {entry['bytes']} were written"
    crc = crc_of_file(file)
    return f"its CRC-32 is {crc}, {entry['crc32']} was written" if crc != entry["crc32"] else ""


def wrong_content(sample: Any, kinds: TensorKinds) -> str:
    """What is wrong with the content of a sample's file, in words; "" for nothing.

    Args: kinds: the tensors that it must have; it may have further ones.
    """
    if not isinstance(sample, dict):
        return f"it holds a {type(sample).__name__} instead of a dict of tensors"
    for name, tensor in sample.items():
        if not isinstance(tensor, Tensor):
            return f"{name!r} is a {type(tensor).__name__} instead of a tensor"
    for name, (dtype, shape) in kinds.items():
        if name not in sample:
            return f"it lacks {name!r}, it has {sorted(map(str, sample))}"
        tensor = sample[name]
        fits = len(shape) == tensor.ndim and all(size in (None, n) for size, n in zip(shape, tensor.shape))
        if tensor.dtype != dtype or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            return f"{name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, it must be {dtype} of shape ({sizes})"
    return non_finite(sample)


def non_finite(sample: Mapping[str, Tensor]) -> str:
    """Which tensor holds NaN or infinite values, in words; "" for none."""
    for name, tensor in sample.items():
        # The sum tells at a tenth of the cost, unless it overflows.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            finite = tensor.isfinite()
            if not finite.all():
                count = int((~finite).sum())
                kind = "NaN" if tensor.isnan().any() else "infinite"
                return f"{name!r} holds {kind} values: {count} of {tensor.numel()} are not finite"
    return ""
