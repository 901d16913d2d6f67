"""Loading of the VAE of latents by path, its fingerprint, and standardised posteriors.

B batch, C channels, Y X rows and columns, Z latent channels, y x latent rows and columns; M mel bins,
F mel frames, m latent rows, L latent frames.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dataset_loading.files import digest_file, fingerprint_of_bytes
from model.audio.vae import AudioVAE
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.vae import VAE
from utils.checkpoints import EMA, load_model, read_stage, resolve_checkpoint

Media = Literal["image", "audio"]
# Stages whose checkpoints are VAEs, by what they encode.
VAE_CLASSES: dict[Media, dict[str, type[VAE]]] = {
    "image": {"image_vae": ImageVAE, "recurrent_vae": RecurrentVAE},
    "audio": {"audio_vae": AudioVAE},
}


def load_vae(path: str | Path, preset: str = "", *, media: Media = "image", needs_statistics: bool = True) -> Any:
    """The VAE of a checkpoint or run folder with averaged weights, if any, in fp32 and eval mode, on the CPU.

    Args:
        preset: the preset that the checkpoint must have; "" accepts any.
        media: what the VAE encodes.
        needs_statistics: raise if the VAE has no latent statistics, which every use of its latents needs.
    Raises:
        FileNotFoundError: no complete checkpoint.
        ValueError: a checkpoint of a stage that trains no VAE of these media, of another preset, or without latent
            statistics.
    """
    folder = resolve_checkpoint(path)
    record = read_stage(folder)
    classes = VAE_CLASSES[media]
    if record["stage"] not in classes:
        raise ValueError(
            f"{folder} is of stage {record['stage']!r}, which trains no VAE of type {media}; stages that do: "
            f"{', '.join(classes)}"
        )
    if preset and preset != record["preset"]:
        raise ValueError(f"{folder} was trained with preset {record['preset']!r}, not {preset!r}")
    vae = load_model(classes[record["stage"]], folder)
    # Mean 0 and std 1 are the initial values of the buffers.
    if needs_statistics and not vae.latent_mean.any() and (vae.latent_std == 1).all():
        raise ValueError(
            f"{folder} has no latent statistics (mean 0 and std 1 in every channel): they are measured while a "
            f"VAE trains; use a later checkpoint, or train it with pretrain_{record['stage']}.py"
        )
    return vae


def vae_fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits of a hash of a VAE's configuration and of the weights that `load_vae` loads.

    Raises: FileNotFoundError: no complete checkpoint.
    """
    folder = resolve_checkpoint(path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)  # does not change the latents
    # Averaged weights where there are any, as in `load_vae`.
    averaged = folder / EMA
    files = [averaged] if averaged.is_file() else sorted(folder.glob("model*.safetensors"))
    return fingerprint_of_bytes([json.dumps(config, sort_keys=True).encode(), *map(digest_file, files)])


def standardized_posterior(vae: VAE, sample: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Posteriors, standardised with the VAE's latent statistics.

    Args:
        sample: images (B, C, Y, X) in [-1, 1] or log-mels (B, M, F) on the VAE's device.
        kwargs: further arguments of the VAE's `encode`, such as the speaker.
    Returns: mean and std, each (B, Z, y, x), of log-mels (B, Z, L) or (B, Z, m, L), fp32.
    Raises: ValueError: a value that is not finite, or outside the range of float16.
    """
    mean, logvar = vae.encode(sample, **kwargs)
    std = torch.exp(0.5 * logvar) / vae.latent_std.view(-1, *[1] * (logvar.ndim - 2))
    mean = vae.normalize_latents(mean)
    # Caches store float16.
    maximum = torch.stack([mean.abs().amax(), std.amax()]).nan_to_num(torch.inf).amax().item()
    if maximum > torch.finfo(torch.float16).max:
        raise ValueError(f"a standardised latent of {maximum:.3g} does not fit into float16; this VAE is not usable")
    return mean, std


def check_vae(path: str | Path, expected: str, latents: str, *, media: Media = "image") -> None:
    """Check that a VAE is the one that encoded some latents.

    Args:
        expected: fingerprint of the VAE that encoded them.
        latents: their name in the message.
        media: what the VAE encodes, for the remedy.
    Raises: ValueError: it has another fingerprint.
    """
    fingerprint = vae_fingerprint(path)
    if fingerprint != expected:
        raise ValueError(
            f"the VAE at {path} has fingerprint {fingerprint}, but {latents} come from the VAE {expected}; give that "
            f"one with --vae_checkpoint, or make latents of this one with preprocess_{media}_diffusion_dataset.py"
        )
