"""What tabs of audio share: waveforms for players, and checkpoints of one log-mel.

M mel bins, F mel frames, S samples.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset_loading.audio.signal import fit_full_scale
from model.audio.spectral import MelSettings
from utils.app.runs import Checkpoint, Runs
from utils.checkpoints import load_config, read_stage
from utils.drawing.alignment import aligned_mel
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group
from utils.exporting.stages import MODELS

logger = logging.getLogger(__name__)

GRIFFIN_LIM = "Griffin-Lim"  # The choice of no vocoder.
FULL_SCALE = 2**15  # of 16 bits


def for_player(waveform: Tensor, sample_rate: int) -> tuple[int, np.ndarray]:
    """A waveform (S,) in 16 bits, otherwise as `save_waveform` writes it: the rate in Hz, and (S,) int16."""
    fitting, gain = fit_full_scale(waveform)
    if gain < 1:
        logger.warning("peaks were %.2f times full scale; played at a gain of %.3f", 1 / gain, gain)
    return sample_rate, (fitting * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).numpy().astype(np.int16)


def mel_sheet(mels: Mapping[str, Tensor], settings: MelSettings) -> Image.Image:
    """Log-mels (M, F) below each other, each with its caption, at one scale of time."""
    longest, no_tokens = max(mel.shape[1] for mel in mels.values()), torch.zeros(0, dtype=torch.long)
    return strip_sheet(
        [Group([aligned_mel(mel, no_tokens, settings, max_frames=longest)], caption) for caption, mel in mels.items()]
    )


def mel_of(checkpoint: Checkpoint) -> MelSettings:
    """The log-mel that a checkpoint of audio reads or writes.

    Raises: OSError, ValueError: it is damaged, or gone.
    """
    if checkpoint.kind in ("audio_diffusion", "captioned_sounds"):
        return MelSettings(**read_stage(checkpoint.folder)["latents"]["mel"])
    if checkpoint.kind == "multimodal":
        return MelSettings(**read_stage(checkpoint.folder)["latents"]["audio"]["mel"])
    return load_config(MODELS[checkpoint.kind].model_class.config_class, checkpoint.folder).mel


def names_of_mel(runs: Runs, kind: str, mel: MelSettings) -> list[str]:
    """Names of the checkpoints of a kind that read or write a log-mel, the newest first."""
    names = []
    for checkpoint in runs.checkpoints(kind):
        try:
            names += [checkpoint.name] if mel_of(checkpoint) == mel else []
        except (OSError, ValueError):  # It was deleted, or will be refused where it is chosen.
            continue
    return names
