"""The VAE that other stages build on: loaded by path, whatever stage trained it, and named by its content."""

import json
from pathlib import Path

import torch
from torch import Tensor

from dataset_loading.files import digest_file, fingerprint_of_bytes
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.vae import VAE
from utils.checkpoints import EMA, load_model, read_stage, resolve_checkpoint

VAE_CLASSES: dict[str, type[VAE]] = {"image_vae": ImageVAE, "recurrent_vae": RecurrentVAE}


def load_vae(path: str | Path, preset: str = "", *, needs_statistics: bool = True) -> VAE:
    """The VAE of a checkpoint or run folder with averaged weights, in fp32 and eval mode, on the CPU.

    Args:
        preset: the size that the checkpoint must have been trained with; "" accepts any.
        needs_statistics: refuse a VAE whose latents were not measured, as everything that works on latents must.
    Raises:
        FileNotFoundError: no complete checkpoint.
        ValueError: a checkpoint of a stage that trains no VAE, of another preset, or whose latents were not measured.
    """
    folder = resolve_checkpoint(path)
    record = read_stage(folder)
    if record["stage"] not in VAE_CLASSES:
        known = ", ".join(VAE_CLASSES)
        raise ValueError(f"{folder} is of stage {record['stage']!r}, which trains no VAE; stages that do: {known}")
    if preset and preset != record["preset"]:
        raise ValueError(f"{folder} was trained with preset {record['preset']!r}, not {preset!r}")
    vae = load_model(VAE_CLASSES[record["stage"]], folder)
    if needs_statistics and not vae.latent_mean.any() and (vae.latent_std == 1).all():
        raise ValueError(
            f"{folder} has no latent statistics (mean 0 and deviation 1 in every channel): they are measured while a "
            f"VAE trains; use a later checkpoint, or train it with pretrain_{record['stage']}.py"
        )
    return vae


def vae_fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits that name a VAE's configuration and the weights that `load_vae` takes; not the path.

    Raises: FileNotFoundError: no complete checkpoint.
    """
    folder = resolve_checkpoint(path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    averaged = folder / EMA
    files = [averaged] if averaged.is_file() else sorted(folder.glob("model*.safetensors"))
    return fingerprint_of_bytes([json.dumps(config, sort_keys=True).encode(), *map(digest_file, files)])


def standardized_posterior(vae: VAE, image: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior of images in units of the VAE's latent statistics.

    Args: image: (B, C, Y, X) in [-1, 1] on the VAE's device.
    Returns: mean and deviation, each (B, Z, y, x) fp32.
    Raises: ValueError: a value that is not finite, or that float16 cannot hold.
    """
    mean, logvar = vae.encode(image)
    mean, std = vae.normalize_latents(mean), torch.exp(0.5 * logvar) / vae.latent_std.view(-1, 1, 1)
    largest = torch.stack([mean.abs().amax(), std.amax()]).nan_to_num(torch.inf).amax().item()
    if largest > torch.finfo(torch.float16).max:
        raise ValueError(f"a standardised latent of {largest:.3g} does not fit into float16; this VAE is not usable")
    return mean, std


def check_vae(path: str | Path, wanted: str, what: str) -> None:
    """ValueError where the VAE at `path` is not the one with the fingerprint `wanted`, which made `what`."""
    found = vae_fingerprint(path)
    if found != wanted:
        raise ValueError(
            f"the VAE at {path} has fingerprint {found}, but {what} come from the VAE {wanted}; give that one with "
            "--vae_checkpoint, or make latents of this one with preprocess_image_diffusion_dataset.py"
        )
