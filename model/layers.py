"""Layers that several families of models share, and copies to a device.

B batch, Y X rows and columns, D width of a stage.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from model.checkpointing import GradientCheckpointingLayer

WITHOUT_FLOAT64 = {"mps"}  # Types of devices: Apple's GPUs.
LEAST_PINNED = 1 << 14  # Bytes; smaller copies are staged by the driver at once.


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero: the last one of a residual branch, which starts as the identity."""


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: the last one of a residual branch, or one that makes scales and shifts."""


def init_layer(module: nn.Module) -> None:
    """What `_init_weights` of every model does with one layer of a usual kind.

    ZeroConv2d, ZeroLinear      weight, bias 0
    other convolutions, Linear  weight uniform in +-1/sqrt(fan in) (PyTorch's own), bias 0
    LayerNorm, GroupNorm        weight 1, bias 0
    """
    if isinstance(module, ZeroConv2d | ZeroLinear):
        initialization.zeros_(module.weight)
        initialization.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.Linear):
        initialization.kaiming_uniform_(module.weight, a=5**0.5)  # bound 1 / sqrt(fan in)
        if module.bias is not None:
            initialization.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        initialization.ones_(module.weight)
        if module.bias is not None:
            initialization.zeros_(module.bias)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position, (B, D, Y, X) -> the same shape; free with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Downsample(GradientCheckpointingLayer):
    """Half the resolution: space-to-channel, then a 1x1 convolution, beside the mean of groups of channels."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.out_width = out_width
        self.conv = nn.Conv2d(4 * width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> (B, out_width, Y/2, X/2)."""
        x = F.pixel_unshuffle(x, 2)  # (B, 4 D, Y/2, X/2)
        # Shortcut: means of groups of 4 D / out_width channels.
        return self.conv(x) + x.unflatten(1, (self.out_width, -1)).mean(dim=2)


class Upsample(GradientCheckpointingLayer):
    """Twice the resolution: a 1x1 convolution beside repeated channels, then channel-to-space."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.n_repeats = 4 * out_width // width
        self.conv = nn.Conv2d(width, 4 * out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> (B, out_width, 2Y, 2X)."""
        # Shortcut: every channel `n_repeats` times, 4 out_width channels in all.
        return F.pixel_shuffle(self.conv(x) + x.repeat_interleave(self.n_repeats, dim=1), 2)


def widen(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A tensor in float64, or in float32 where its device (or `device`, to which it goes) has no float64."""
    device = torch.device(tensor.device if device is None else device)
    return to_device(tensor.to(torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64), device)


def in_double(tensor: Tensor) -> Tensor:
    """A tensor in float64, moved to the CPU where its device has none: for sums and metrics, which end there."""
    return tensor.to(home_of_doubles(tensor.device)).double()


def home_of_doubles(device: torch.device | str) -> torch.device:
    """The device, or the CPU where it has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device, as `tensor.to(device)`.

    Such a copy from common memory makes the host wait until the GPU has done all that was asked of it before; one from
    pinned memory, whose pages PyTorch keeps until the copy is done, does not.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type == "cuda" and tensor.nbytes >= LEAST_PINNED and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class FrozenModule(nn.Module):
    """A network that is never trained: no parameter takes a gradient, `train()` leaves it in evaluation mode."""

    def train(self, mode: bool = True) -> "FrozenModule":
        return super().train(False)

    def freeze(self) -> None:
        """Called at the end of a subclass's constructor."""
        self.requires_grad_(False)
        self.eval()
