"""A second device without hardware: tensors that say they are on a GPU, and whose values are computed by the CPU.

Everything else is real: modules move, factories make tensors there, autograd and optimizers run. As on a GPU, an
operation on tensors of both devices is an error, and so is a CPU's generator of random numbers. What would make the
host wait for the GPU is recorded with the line of this repository that asks for it: reading a value, boolean indexing
and its like, copies to the host, and copies from it without `non_blocking=True`.

PyTorch's FakeTensorMode knows shapes alone; with values, decisions that a program takes by them can be followed, and
results compared with the CPU's.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from model.layers import WITHOUT_FLOAT64

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT}/{folder}/" for folder in ("model", "utils", "dataset_loading", "inference"))
NAME = "standin"
aten = torch.ops.aten
# Operations whose result has as many elements as values say, or that read lengths on the host.
READS_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten.equal.default,
    aten._local_scalar_dense.default,
    aten._ctc_loss.Tensor,
    aten._linalg_eigh.default,
    aten.linalg_eig.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COMPOSITE = "CompositeImplicitAutograd"
# These take no mixture at all; the others take a CPU's number (0-dim) as CUDA does.
STRICT = {aten.cat.default, aten.stack.default, aten.gather.default, aten.index_select.default}


class Backend:
    """What PyTorch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers come of the CPU's generator."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs in the background."""


class Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    is_built = is_available

    def has_primary_context(self, index: int) -> bool:
        return True


_setup_privateuseone_for_python_backend(NAME, Backend(), Hooks(), Guard())  # type: ignore[arg-type]
DEVICE = torch.device(NAME, 0)


class StandInTensor(torch.Tensor):
    """A tensor on the stand-in device; `values` are its content on the CPU."""

    values: Tensor
    is_cuda = True  # Code that asks takes the way of a GPU.

    @staticmethod
    def __new__(cls, values: Tensor):
        keywords = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **keywords)  # type: ignore
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        note("tolist")
        return self.values.tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError("can't convert a tensor of the stand-in device to numpy; use .cpu() first")
        return self.cpu().numpy()

    def __repr__(self, **kwargs):
        return f"StandIn({self.values})"

    # Files hold the values: they are compared with those of a run on the CPU.
    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)

    def untyped_storage(self):
        return self.values.untyped_storage()

    def data_ptr(self):
        return self.values.data_ptr()

    def __deepcopy__(self, memo):
        copied = StandInTensor(self.values.clone()).requires_grad_(self.requires_grad)
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied


def on_device(values: Tensor) -> StandInTensor:
    """The values as a tensor of the stand-in device."""
    return StandInTensor(values)


# ---- What makes the host wait.

NOTES: Counter[tuple[str, str]] = Counter()  # (kind, file:line function) -> times


def note(kind: str) -> None:
    """Count what makes the host wait, by the innermost line of this repository."""
    frame: Any = sys._getframe(1)
    line = "elsewhere"
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            line = f"{code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {code.co_name}"
            break
        frame = frame.f_back
    NOTES[kind, line] += 1


def is_here(tensor: Any) -> bool:
    return isinstance(tensor, StandInTensor)


def check_devices(func, tensors: list[Tensor]) -> None:
    """Raise RuntimeError for an operation on tensors of both devices, as CUDA does."""
    foreign = [tensor for tensor in tensors if not is_here(tensor) and (tensor.dim() > 0 or func in STRICT)]
    if foreign and len(foreign) < len(tensors):
        shapes = [tuple(tensor.shape) for tensor in foreign]
        raise RuntimeError(f"{func}: tensors on {DEVICE} and, of shape {shapes}, on the CPU")


def check_floats(tensors: list[Any]) -> None:
    """Raise TypeError for numbers that Apple's GPUs do not have, while `WITHOUT_FLOAT64` names the stand-in."""
    if NAME in WITHOUT_FLOAT64 and any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors):
        raise TypeError(f"{DEVICE} has no float64")


def dispatch(func, args: tuple, kwargs: dict) -> Any:
    """Compute an operation on the CPU, for tensors or a result on the stand-in device."""
    # Inference mode hands over operations that autograd would have decomposed.
    if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
        with StandInMode():
            return func.decompose(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return False  # Modules take new parameters when they move.
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = any(map(is_here, tensors))
    goes_here, to = here, kwargs.get("device")
    if to is not None:
        goes_here = torch.device(to).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if not here and not goes_here:
        return func(*args, **kwargs)

    # Copies between the devices, and indexing by a CPU's indices, are the only mixtures that CUDA allows.
    if func is aten._to_copy.default:
        if here and not goes_here:
            note("copy to the host")
        elif not here and not kwargs.get("non_blocking"):
            note("blocking copy to the device")
    elif func in (aten.copy_.default, aten.copy.default):
        if is_here(args[0]) != is_here(args[1]) and args[1].dim() + args[0].dim() > 0:
            if is_here(args[1]):
                note("copy to the host")
            elif not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                note("blocking copy to the device")
    elif func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        check_devices(func, [args[0], *args[2:3]])
        if here and any(not is_here(index) for index in indices):
            note("blocking copy to the device")
        fills = func is not aten.index.Tensor and args[2].numel() == 1
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:
            note("boolean indexing")
    elif here and to is None:
        check_devices(func, tensors)
    generator = kwargs.get("generator")
    if generator is not None and goes_here and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {DEVICE}")
    if here and func in READS_VALUES:
        note(func._schema.name.removeprefix("aten::"))
    if func is aten._fused_sdp_choice.default:
        return 0  # The definition, which decomposes.

    def unwrap(tensor: Tensor) -> Tensor:
        return tensor.values if isinstance(tensor, StandInTensor) else tensor

    with torch.no_grad():
        result = func(*tree_map_only(Tensor, unwrap, args), **tree_map_only(Tensor, unwrap, kwargs))
    if not goes_here:
        return result
    check_floats([leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)])
    # Views of tensors from outside of inference mode are such tensors; what is new is as the mode says.
    is_inference = all(tensor.is_inference() for tensor in tensors) if tensors else torch.is_inference_mode_enabled()
    with torch.inference_mode(is_inference):
        result = tree_map_only(Tensor, wrap, result)
    if not here:
        return result
    if torch.is_inference_mode_enabled():  # No views are tracked.
        returned = func._schema.returns
        writes = bool(returned) and returned[0].alias_info is not None and returned[0].alias_info.is_write
        return args[0] if writes and is_here(args[0]) else result
    return return_and_correct_aliasing(func, args, kwargs, result)


def wrap(values: Tensor) -> Tensor:
    """The values on the stand-in device, which knows nothing of the lazy conjugation of complex numbers."""
    return values if is_here(values) else StandInTensor(values.resolve_conj().resolve_neg())


class StandInMode(TorchDispatchMode):
    """Factories make tensors on the stand-in device where it is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def stand_in_device() -> Iterator[Counter[tuple[str, str]]]:
    """Within it, tensors and modules can go to `DEVICE`; yields what made the host wait, (kind, line) -> times."""
    NOTES.clear()
    former = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # Parameters keep their identity, as on a GPU.
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` is a copy of one on the CPU.
    try:
        with StandInMode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield NOTES
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(former)


@contextlib.contextmanager
def trainer_on_stand_in() -> Iterator[Counter[tuple[str, str]]]:
    """As `stand_in_device`, for whole stages: transformers and accelerate train there."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    set_up: Any = TrainingArguments.__dict__["_setup_devices"].func

    def device_of(arguments: TrainingArguments) -> torch.device:
        if "device_is_set" not in vars(arguments):
            vars(arguments)["device_is_set"] = True
            arguments.accelerator_config.non_blocking = True  # As where there is a GPU, see `training_arguments`.
            set_up(arguments)
            PartialState._shared_state["device"] = DEVICE
        return DEVICE

    PartialState._reset_state()
    AcceleratorState._reset_state()
    with stand_in_device() as notes, mock.patch.object(TrainingArguments, "_setup_devices", property(device_of)):
        try:
            yield notes
        finally:
            PartialState._reset_state()
            AcceleratorState._reset_state()
