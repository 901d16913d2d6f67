"""Flags of the export of models."""

import dataclasses
from typing import Literal

from utils.flags.choices import WeightsKind
from utils.options import option

DType = Literal["float32", "bfloat16", "float16"]
Format = Literal["transformers", "diffusers"]


@dataclasses.dataclass
class ExportModelArguments:
    """Flags of `inference/export_model.py`."""

    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    output: str = option("", "folder to write; it must not exist, or be empty")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    format: Format = option(
        "transformers", "library whose from_pretrained opens it; diffusers: architecture ldm alone"
    )
    dtype: DType = option("float32", "precision of the stored weights; media models still compute in fp32")
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
    license: str = option("", "licence in the model card, by the hub's name, such as mit or cc-by-4.0")
    push_to_hub: str = option("", "also upload the folder as a new repository of this name, such as my_user/my_model")
    private: bool = option(False, "make the repository private", only_with=("push_to_hub", bool))

    def validate_checkpoint(self):
        if not self.checkpoint or not self.output:
            raise ValueError("--checkpoint and --output are needed: a run folder, and the folder to write")
