"""Sound for listening: what every player and file takes."""

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def playable(waveform: Tensor) -> Tensor:
    """A waveform (S,) that every player takes: on the CPU, fp32, clamped to [-1, 1], silent where it is not finite."""
    return torch.nan_to_num(torch.as_tensor(waveform).detach().float().cpu(), 0.0, 0.0, 0.0).clamp(-1, 1)


def add_sound(writer: SummaryWriter, name: str, waveform: Tensor, rate: int, step: int) -> None:
    """A player of a waveform (S,) in TensorBoard."""
    writer.add_audio(name, playable(waveform)[None], step, sample_rate=rate)
