"""Complete checkpoints in a folder of runs, by names relative to it."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from utils.checkpoints import COMPLETE, checkpoints_in, is_complete, read_stage
from utils.exporting.stages import kind_of

logger = logging.getLogger(__name__)

MAX_DEPTH = 4  # of checkpoints in the folder of runs: `<stage>/<run>/checkpoint-STEP`, and a folder around stages

IMAGE_VAE = (
    "python preprocess_image_vae_dataset.py --dataset_name my_images --image_size 64",
    "python pretrain_image_vae.py --config tiny --run_name base",
)
IMAGE_LATENTS = (
    *IMAGE_VAE,
    "python preprocess_image_diffusion_dataset.py --dataset_name my_images --vae_checkpoint runs/image_vae/base",
)
AUDIO_VAE = (
    "python preprocess_audio_vae_dataset.py --dataset_name my_speech",
    "python pretrain_audio_vae.py --config tiny --run_name base",
)
SPEECH_LATENTS = (
    *AUDIO_VAE,
    "python preprocess_audio_diffusion_dataset.py --dataset_name my_speech --vae_checkpoint runs/audio_vae/base",
)
# What makes a checkpoint of each kind (`utils.exporting.stages.MODELS`) of raw data, in this order; --help of each
# script says more, and README.md how the folders of data look.
TRAINED_BY = {
    "image_vae": IMAGE_VAE,
    "recurrent_vae": (
        IMAGE_VAE[0],
        "python pretrain_recurrent_vae.py --config tiny --run_name base",
    ),
    "image_diffusion": (*IMAGE_LATENTS, "python pretrain_image_diffusion.py --config tiny --run_name base"),
    "vocoder": (
        "python preprocess_audio_vocoder_dataset.py --dataset_name my_speech",
        "python pretrain_vocoder.py --config tiny --run_name base",
    ),
    "audio_vae": AUDIO_VAE,
    "audio_diffusion": (*SPEECH_LATENTS, "python pretrain_audio_diffusion.py --config tiny --run_name base"),
    "captioned_sounds": (
        "python preprocess_audio_vae_dataset.py --dataset_name my_sounds --output_dir cached_datasets/sounds",
        "python pretrain_audio_vae.py --config tiny --run_name sounds --cached_dataset cached_datasets/sounds",
        "python preprocess_audio_diffusion_dataset.py --dataset_name my_sounds --vae_checkpoint runs/audio_vae/sounds "
        "--conditioning caption --output_dir cached_datasets/sound_latents",
        "python pretrain_audio_diffusion.py --config tiny --run_name sounds "
        "--cached_dataset cached_datasets/sound_latents",
    ),
    "multimodal": (
        *IMAGE_LATENTS,
        *SPEECH_LATENTS,
        "python pretrain_multimodal.py --config multimodal-tiny --run_name base --include_modes text image audio",
    ),
    "text": ("python pretrain_multimodal.py --config tiny --run_name base --text_dataset python-topics",),
}
DEMO = "make demo"  # Trains small models of every kind.


def subfolders(folder: Path, root: Path) -> list[Path]:
    """The folders in a folder that are not hidden, by name; none where it cannot be read or is gone.

    Args: root: of all folders; what a link elsewhere leads to is not looked at.
    """
    try:
        children = [child for child in folder.iterdir() if not child.name.startswith(".")]
        return sorted(child for child in children if is_within(child, root) and child.is_dir())
    except OSError:
        return []


def is_within(path: Path, root: Path) -> bool:
    """Whether a path that lies in a folder does so after its own link is followed, too."""
    return not path.is_symlink() or path.resolve().is_relative_to(root.resolve())


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        name: its path relative to the folder of runs, with slashes.
        kind: of its model, a key of `utils.exporting.stages.MODELS`.
    """

    name: str
    folder: Path
    kind: str


class Runs:
    """The complete checkpoints under a folder, which is read anew by each call.

    Checkpoints of other places that a link in the folder leads to are not listed, nor are copies that belong to a run,
    such as that of its VAE.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def checkpoints(self, *kinds: str) -> list[Checkpoint]:
        """Those of some kinds of models, the newest first."""
        dated = []
        for folder in self.folders(self.root, MAX_DEPTH):
            # A checkpoint may be deleted or replaced at any time; what is no whole one is not listed.
            with contextlib.suppress(OSError, ValueError):
                if self.is_inside(folder) and is_complete(folder):
                    kind = kind_of(read_stage(folder), folder)
                    name = folder.relative_to(self.root).as_posix()
                    dated.append(((folder / COMPLETE).stat().st_mtime_ns, Checkpoint(name, folder, kind)))
        dated.sort(key=lambda pair: (-pair[0], pair[1].name))
        return [checkpoint for _, checkpoint in dated if checkpoint.kind in kinds]

    def names(self, *kinds: str) -> list[str]:
        """The names of `checkpoints`."""
        return [checkpoint.name for checkpoint in self.checkpoints(*kinds)]

    def choose(self, name: str | None, *kinds: str) -> Checkpoint:
        """The listed checkpoint of this name; no other path leads anywhere.

        Raises: ValueError: there is none of these kinds under that name; says what to do.
        """
        checkpoints = self.checkpoints(*kinds)
        for checkpoint in checkpoints:
            if checkpoint.name == name:
                return checkpoint
        if not checkpoints:
            raise ValueError(self.advice(*kinds))
        raise ValueError(
            f"{name!r} is no complete checkpoint of {' or '.join(kinds)} in {self.root}; choose one of the list, "
            f"such as {checkpoints[0].name}"
        )

    def advice(self, *kinds: str) -> str:
        """What to do where there is no checkpoint of these kinds."""
        ways = " or with ".join(", then ".join(f"`{line}`" for line in TRAINED_BY[kind]) for kind in kinds)
        return (
            f"{self.root} has no complete checkpoint of {' or '.join(kinds)}; train one with {ways}. "
            f"`{DEMO}` trains small models of every kind."
        )

    def advice_of_page(self, *kinds: str) -> str:
        """`advice` as Markdown, a command per line."""
        blocks = [
            f"```bash\n{chain}\n```" for chain in ("\n".join(TRAINED_BY[kind]).replace("`", "") for kind in kinds)
        ]
        head = (
            f"`{self.root}` has no complete checkpoint of {' or '.join(kinds)}. `{DEMO}` trains small models of every "
        )
        return head + "kind; of your own data, one comes from\n\n" + "\n\nor\n\n".join(blocks)

    def folders(self, folder: Path, depth: int) -> Iterator[Path]:
        """Folders that may be checkpoints: those of runs, and others that have their mark."""
        if (folder / COMPLETE).is_file():
            yield folder
        elif checkpoints := checkpoints_in(folder):
            yield from checkpoints
        elif depth:
            for child in subfolders(folder, self.root):
                with contextlib.suppress(OSError):  # It is gone since, or cannot be read.
                    yield from self.folders(child, depth - 1)

    def is_inside(self, folder: Path) -> bool:
        """Whether a folder is under the root, also after its links are followed."""
        return folder.resolve().is_relative_to(self.root.resolve())
