"""Folders that inference/export_model.py wrote, beside the checkpoints of runs: where what belongs to them lies."""

from pathlib import Path

from utils.checkpoints import EXPORTED, read_stage, resolve_checkpoint, step_of

# Subfolders of what an exported model needs, beside the VAE in `vae` (`utils.generation.latents.PINNED`).
VOCODER = "vocoder"
TEXT_ENCODER = "text_encoder"


def home_of(checkpoint: Path) -> Path:
    """The folder of what belongs to a checkpoint, such as the copy of its VAE: its run, or an exported folder."""
    checkpoint = checkpoint.absolute()
    return checkpoint if read_stage(checkpoint).get(EXPORTED) else checkpoint.parent


def trained_steps(checkpoint: Path) -> int:
    """The optimizer steps that the weights of a checkpoint or of an exported folder were trained for; -1: unknown."""
    return read_stage(checkpoint).get(EXPORTED, {}).get("step", step_of(checkpoint))


def vocoder_of(checkpoint: Path, given: str) -> str:
    """The vocoder of generated audio: the one that the user names, or that of an exported folder; "" for none."""
    included = checkpoint / VOCODER
    if given:
        return str(resolve_checkpoint(given))
    return str(included) if read_stage(checkpoint).get(EXPORTED) and included.is_dir() else ""
