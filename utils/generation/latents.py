"""Loading of the VAE of latents by path or fingerprint, its copy beside what needs it, and standardised posteriors.

Latents mean nothing without the VAE that encoded them, and a VAE's run deletes its older checkpoints. So the folder of
the latents and every run that trains on them hold a copy of the VAE in `vae/` (`pin_vae`). `find_vae` looks there
first, then at recorded paths; what it returns has the fingerprint of the latents' VAE.

B batch, C channels, Y X rows and columns, Z latent channels, y x latent rows and columns; M mel bins,
F mel frames, m latent rows, L latent frames.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dataset_loading.files import fingerprint_of_bytes, read_record, remove_leftovers, replacing
from model.audio.vae import AudioVAE
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.vae import VAE
from utils.checkpoints import (
    COMPLETE,
    CONFIG,
    STAGE,
    check_files,
    checkpoints_in,
    damage_of,
    digest_in,
    is_complete,
    load_model,
    mark_complete,
    places,
    read_stage,
    remedy,
    resolve_checkpoint,
    step_of,
    warn_of_former_data,
    weight_files,
    write_card,
)

logger = logging.getLogger(__name__)

# The folder of the copy of a VAE, in a cache of latents and in a run.
PINNED = "vae"
N_LISTED = 5  # VAEs that do not fit, in a message.
Media = Literal["image", "audio"]
# Stages whose checkpoints are VAEs, by what they encode.
VAE_CLASSES: dict[Media, dict[str, type[VAE]]] = {
    "image": {"image_vae": ImageVAE, "recurrent_vae": RecurrentVAE},
    "audio": {"audio_vae": AudioVAE},
}


def latents_script(media: Media) -> str:
    """The script that makes latents."""
    return f"preprocess_{media}_diffusion_dataset.py"


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
    check_files(folder, [CONFIG])
    config = read_record(folder / CONFIG, remedy(folder))
    config.pop("transformers_version", None)  # does not change the latents
    # Averaged weights where there are any, as in `load_vae`, which compares them with their digests.
    digests = [digest_in(folder, file.name) for file in weight_files(folder)]
    return fingerprint_of_bytes([json.dumps(config, sort_keys=True).encode(), *digests])


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


# ---- The VAE of some latents: found by its fingerprint, and kept.


def find_vae(
    latents: Mapping[str, Any],
    name: str,
    *,
    given: str | Path = "",
    folders: Sequence[Path] = (),
    media: Media = "image",
) -> Path:
    """The checkpoint of the VAE that encoded some latents, wherever it is now.

    Args:
        latents: settings of the cache's manifest, with `vae_fingerprint` and `vae_checkpoint`, the recorded path.
        name: of the latents, in messages.
        given: the run or checkpoint folder that the user names. Empty: the copies in `folders`, then the recorded path
            and the runs beside it, also where all of them have moved together.
        folders: runs and caches that may hold a copy, see `pin_vae`.
        media: what the VAE encodes.
    Returns: a complete checkpoint folder whose VAE has the fingerprint.
    Raises:
        FileNotFoundError: no VAE was found that fits; the message lists those that do not.
        ValueError: the VAE that the user names has another fingerprint; the message names the one that fits.
    """
    expected, seen = latents["vae_fingerprint"], {}
    pins = [checkpoint for folder in folders for checkpoint in checkpoints_at(folder / PINNED)]
    recorded = recorded_checkpoints(latents["vae_checkpoint"], folders)
    if given:
        # Any checkpoint of the run that the user names, or the one checkpoint; no other one takes its place.
        if vae := matching(checkpoints_at(Path(given)), expected, seen):
            return vae
        elsewhere = matching(pins, expected, {}) or matching(recorded, expected, {})
        advice = "give that one with --vae_checkpoint, or make latents of this one with " + latents_script(media)
        if elsewhere:
            advice = f"it is at {elsewhere}: give that folder, or leave --vae_checkpoint out"
        state = next(iter(seen.values()), "no complete checkpoint")
        raise ValueError(f"the VAE at {given} has {state}, but {name} come from the VAE {expected}; {advice}")
    vae = matching(pins, expected, seen) or matching(recorded, expected, seen)
    if vae is None:
        listed = "".join(f"\n  {path}: {state}" for path, state in list(seen.items())[:N_LISTED])
        copies = " or ".join(str(folder / PINNED) for folder in folders)
        raise FileNotFoundError(
            f"the VAE {expected}, which {name} come from, is neither in {copies} nor at {latents['vae_checkpoint']}. "
            "Give its run, its checkpoint or a backup with --vae_checkpoint, or make latents of another VAE with "
            f"{latents_script(media)}{listed and f'. These do not fit:{listed}'}"
        )
    return vae


def check_vae(path: str | Path, expected: str, latents: str, *, media: Media = "image") -> None:
    """Check that a VAE is the one that encoded some latents.

    Args:
        expected: fingerprint of the VAE that encoded them.
        latents: their name in the message.
        media: what the VAE encodes, for the remedy.
    Raises: ValueError: it has another fingerprint.
    """
    find_vae({"vae_fingerprint": expected, "vae_checkpoint": path}, latents, given=path, media=media)


def warn_of_other_vae(folder: Path, fingerprint: str) -> None:
    """Log which VAE the latents in a cache come from, where it has a copy of another one than that with the
    fingerprint."""
    seen: dict[Path, str] = {}
    if not matching(checkpoints_at(folder / PINNED), fingerprint, seen) and seen:
        logger.warning(
            "%s has latents of another VAE (%s) than this one (%s); go on with that one by --vae_checkpoint %s",
            folder,
            next(iter(seen.values())),
            fingerprint,
            folder / PINNED,
        )


def checkpoints_at(path: Path) -> list[Path]:
    """The complete checkpoints that a path means: those of a run, the newest first, or the one checkpoint."""
    if (path / COMPLETE).is_file():
        return [path] if is_complete(path) else []
    return list(filter(is_complete, reversed(checkpoints_in(path))))


def recorded_checkpoints(recorded: str | Path, folders: Iterable[Path]) -> Iterator[Path]:
    """Checkpoints at a recorded path, of its run, and of the runs beside it, wherever these may be now."""
    run_dir = Path(recorded).parent if step_of(Path(recorded)) >= 0 else Path(recorded)
    for near in folders or (Path(),):
        for place in places(recorded, near):
            yield from checkpoints_at(place)
        # The run may have been renamed, or the checkpoint within it.
        for stage_dir in places(run_dir.parent, near):
            for run in sorted(path for path in stage_dir.glob("*") if path.is_dir()):
                yield from checkpoints_at(run)


def matching(checkpoints: Iterable[Path], expected: str, seen: dict[Path, str]) -> Path | None:
    """The first checkpoint with a fingerprint that is not damaged; what the others are is added to `seen`."""
    for checkpoint in checkpoints:
        if checkpoint in seen:
            continue
        try:
            fingerprint = vae_fingerprint(checkpoint)
            seen[checkpoint] = f"fingerprint {fingerprint}"
            if fingerprint == expected:
                damage = damage_of(checkpoint, [*(file.name for file in weight_files(checkpoint)), STAGE])
                if not damage:
                    return checkpoint
                seen[checkpoint] = damage
                logger.warning("ignoring a copy of the VAE: %s", damage)
        except (OSError, ValueError) as error:  # Something that is no VAE, or deleted at this moment.
            seen[checkpoint] = str(error)
    return None


def pin_vae(checkpoint: Path, folder: Path, *, may_replace: bool = True) -> Path:
    """Keep a copy of a VAE in `folder/vae`, unless it is there: the weights that `load_vae` loads, its configuration
    and its record. A VAE's own run may then delete the checkpoint, move or vanish. Warns where the VAE's data set
    holds other files now than it was trained on.

    Args:
        checkpoint: a complete checkpoint folder.
        folder: a run or a cache; one process at a time may call this for it.
        may_replace: whether the copy of another VAE may be replaced.
    Returns: the copy, a complete checkpoint folder.
    Raises: ValueError: the folder holds the copy of another VAE, or the checkpoint is damaged.
    """
    warn_of_former_data(checkpoint)
    expected, target = vae_fingerprint(checkpoint), folder / PINNED
    seen: dict[Path, str] = {}
    if copy := matching(checkpoints_at(target), expected, seen):
        return copy
    others = [state for state in seen.values() if state.startswith("fingerprint")]
    if others and not may_replace:
        raise ValueError(
            f"{folder} was trained on latents of the VAE at {target} ({others[0]}), these are of the VAE "
            f"{expected}; give its own latents with --cached_dataset, or another --run_name"
        )
    # Written under a temporary name: a copy is complete or absent.
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with replacing(target) as temporary:
        copy = temporary / f"checkpoint-{max(step_of(checkpoint), 0)}"
        copy.mkdir(parents=True)
        for file in (*weight_files(checkpoint), checkpoint / CONFIG, checkpoint / STAGE):
            shutil.copyfile(file, copy / file.name)
        stage = read_stage(checkpoint)["stage"]
        all_classes = {name: vae for classes in VAE_CLASSES.values() for name, vae in classes.items()}
        write_card(copy, all_classes[stage], stage, target / copy.name)
        mark_complete(copy)
        if vae_fingerprint(copy) != expected:
            check_files(checkpoint)
            raise ValueError(f"{checkpoint} changed while it was copied; start again")
        if target.exists():
            shutil.rmtree(target)
    logger.info("copied the VAE %s to %s", checkpoint, target)
    return target / copy.name
