"""Audio for playback in TensorBoard and in files."""

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def playable(waveform: Tensor) -> Tensor:
    """A waveform (S,) on the CPU, fp32, clamped to [-1, 1], silent where it is not finite."""
    return torch.nan_to_num(torch.as_tensor(waveform).detach().float().cpu(), 0.0, 0.0, 0.0).clamp(-1, 1)


# Players of a clip stand on TensorBoard's page in the order of their names: truth, baseline, model.
KINDS = ("real", "griffin_lim", "generated")


def sound_tag(group: str, number: int, kind: str) -> str:
    """The name of a clip's player: `sounds/00_1_real` before `sounds/00_3_generated`."""
    return f"{group}/{number:02d}_{KINDS.index(kind) + 1}_{kind}"


def add_audio(writer: SummaryWriter, name: str, waveform: Tensor, *, rate: int, step: int) -> None:
    """Add a waveform (S,) to TensorBoard, with a player."""
    # TensorBoard expects (1, S).
    writer.add_audio(name, playable(waveform)[None], step, sample_rate=rate)
