"""Flags of inference/export_model.py about the models that the exported one needs."""

import dataclasses

from utils.options import option


@dataclasses.dataclass
class PartsArguments:
    """Which of them the folder holds too."""

    with_parts: bool = option(False, "also the models that this one needs, in subfolders: VAEs, text encoder")
    vae_checkpoint: str = option(
        "", "folder of the latents' VAE; default: its copy in the run or the cache", only_with=("with_parts", True)
    )
    text_encoder: str = option(
        "", "folder or hub name of the captions' text encoder; default: as recorded", only_with=("with_parts", True)
    )
    vocoder_checkpoint: str = option(
        "",
        "vocoder to put into the subfolder vocoder, for models that make audio",
        only_with=("format", "transformers"),
    )
