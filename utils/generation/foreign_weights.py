"""Folders of other libraries as initial weights: diffusers' AutoencoderKL for image VAEs, its UNet2DConditionModel for
text-to-image models, and transformers' LlamaForCausalLM for language models.

A run takes over the weights where its configuration has the fields that the folder states. Fields that shape no
weights, such as the side of the images or the maximum length of a text, are those of the run.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig

from model.causal import MegaTransformerForCausalLM
from model.image import ldm_unet, ldm_vae
from model.image.diffusion import ImageDiffusion
from model.image.ldm_scheduler import process_of
from model.image.vae import ImageVAE
from model.text.llama_weights import config_from_llama, rename_llama_weights
from utils.checkpoints import COMPLETE, CONFIG, explained_loading, weight_files
from utils.options import from_preset
from utils.strict_config import StrictConfig

logger = logging.getLogger(__name__)

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
NULL_CONDITION = "null_condition.safetensors"  # The learned condition for no caption, of an exported model.
# Fields that a folder states and a run may have otherwise: they shape no weights.
FREE = {"image_size", "latent_size", "text_encoder", "text_embedding_width"}
# Fields that may be None -> the property that says what None means.
RESOLVED = {"n_query_groups": "groups", "head_width": "width_per_head", "conditioning_width": "time_width"}


@dataclass(frozen=True)
class ForeignFormat:
    """A kind of folder.

    Attributes:
        name: for messages.
        model_class: ours, which takes the weights.
        flags: of the script that trains it.
        subfolder: where pipelines keep it.
        read_fields: folder -> fields of the configuration.
        read_weights: copies the weights of a folder into a model.
    """

    name: str
    model_class: type
    flags: str
    subfolder: str
    read_fields: Callable[[Path], dict[str, Any]]
    read_weights: Callable[[Any, Path], None]


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json; {} where there is none that can be read."""
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def format_of(path: str | Path, model_class: type | None = None) -> tuple[ForeignFormat, Path] | None:
    """The format of another library's folder, and where in it the model is; None for other folders.

    Args: model_class: the model of a pipeline that is meant, which has several.
    """
    folder, formats = Path(path), []
    if (folder / COMPLETE).is_file():  # a checkpoint
        return None
    for kind in FORMATS.values():
        for place in dict.fromkeys((folder, folder / kind.subfolder)):
            config = read_config(place)
            if kind is FORMATS.get(config.get("_class_name") or (config.get("architectures") or [""])[0]):
                formats.append((kind, place))
    meant = [(kind, place) for kind, place in formats if kind.model_class is model_class]
    return next(iter([*meant, *formats]), None)


# ---- Weights of the formats.


def diffusers_file(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of diffusers. Raises: FileNotFoundError, ValueError: missing or damaged."""
    file = folder / DIFFUSERS_WEIGHTS
    if not file.is_file():
        others = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise FileNotFoundError(
            f"{file} is missing ({folder} has {others}); write the folder with diffusers' save_pretrained, without "
            "variant"
        )
    with explained_loading(file):
        return load_file(file)


def vae_fields(folder: Path) -> dict[str, Any]:
    """Fields of `ImageVAEConfig`."""
    fields, _, _ = ldm_vae.config_from_diffusers(read_config(folder))
    return fields


def load_vae_weights(model: ImageVAE, folder: Path) -> None:
    """Weights and latent statistics of an AutoencoderKL."""
    model.load_diffusers_weights(diffusers_file(folder))
    _, mean, std = ldm_vae.config_from_diffusers(read_config(folder))
    Z = model.config.latent_channels
    model.set_latent_statistics(torch.as_tensor(mean).expand(Z), torch.as_tensor(std).expand(Z))


def unet_fields(folder: Path) -> dict[str, Any]:
    """Fields of `ImageDiffusionConfig`; the process from the scheduler's configuration, where there is one."""
    fields = ldm_unet.config_from_diffusers(read_config(folder))
    names = ("scheduler_config.json", "../scheduler/scheduler_config.json")
    files = [file for file in (folder / name for name in names) if file.is_file()]
    for name in ("schedule", "prediction"):
        fields.pop(name)  # The configuration of the network does not say it.
    if files:
        with explained_loading(files[0]):
            fields |= process_of(json.loads(files[0].read_text()))
    else:
        logger.warning("%s has no scheduler_config.json: schedule and prediction are those of this run", folder)
    return fields


def load_unet_weights(model: ImageDiffusion, folder: Path) -> None:
    """Weights of a UNet2DConditionModel; the null condition, where an exported folder has it, else a warning."""
    model.load_diffusers_weights(diffusers_file(folder))
    file = folder / NULL_CONDITION
    if file.is_file():
        with explained_loading(file):
            model.null.load_state_dict(load_file(file))
    else:
        logger.warning(
            "%s has no %s: what stands for no caption is random; it is trained with all weights, and stays so with "
            "--lora_rank, whose adapters learn to read it",
            *(folder, NULL_CONDITION),
        )


def llama_fields(folder: Path) -> dict[str, Any]:
    """Fields of `MegaTransformerConfig`."""
    with explained_loading(folder / CONFIG):
        return config_from_llama(LlamaConfig.from_pretrained(folder))


def load_llama_weights(model: MegaTransformerForCausalLM, folder: Path) -> None:
    """Weights of a LlamaForCausalLM, in one or several files."""
    files = weight_files(folder)
    with explained_loading(files[0] if len(files) == 1 else folder):
        state = {name: value.float() for file in files for name, value in load_file(file).items()}
        model.load_state_dict(rename_llama_weights(state, model.config))


# Class in config.json -> format.
FORMATS = {
    "AutoencoderKL": ForeignFormat(
        *("diffusers' AutoencoderKL", ImageVAE, "pretrain_image_vae.py --config ldm", "vae"),
        read_fields=vae_fields,
        read_weights=load_vae_weights,
    ),
    "UNet2DConditionModel": ForeignFormat(
        *("diffusers' UNet2DConditionModel", ImageDiffusion, "pretrain_image_diffusion.py --config ldm", "unet"),
        read_fields=unet_fields,
        read_weights=load_unet_weights,
    ),
    "LlamaForCausalLM": ForeignFormat(
        *(
            "transformers' LlamaForCausalLM",
            MegaTransformerForCausalLM,
            "pretrain_multimodal.py --config llama-8m",
            "",
        ),
        read_fields=llama_fields,
        read_weights=load_llama_weights,
    ),
}


# ---- A run that starts from one.


def foreign_model(
    model_class: type, path: str | Path, config: StrictConfig, presets: Mapping[str, Any]
) -> nn.Module | None:
    """A model of this run's configuration with the weights of another library's folder; None for other folders.

    Args: presets: of the stage, for the remedy.
    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: the folder is of another kind of model, of a variant that ours does not have, or fields that shape
            its weights differ from this run's; names them and the flags that fit.
    """
    if (source := format_of(path, model_class)) is None:
        return None
    kind, folder = source
    if model_class is not kind.model_class:
        raise ValueError(
            f"--init_from {path} is {kind.name}, which {kind.flags} reads; this run trains {model_class.__name__}"
        )
    fields = kind.read_fields(folder)
    fields |= {name: getattr(config, name) for name in FREE & fields.keys()}  # The run's own, for the remedy.
    differing = [name for name, value in fields.items() if value_of(config, name) != value]
    if differing:
        there = ", ".join(f"{name}={fields[name]!r} (here {getattr(config, name)!r})" for name in differing)
        raise ValueError(
            f"--init_from {path} is {kind.name} with {there}; give "
            f"{fitting_flags(type(config), presets, fields, differing)}"
        )
    model = model_class(config)
    kind.read_weights(model, folder)
    logger.info("the weights are those of %s in %s", kind.name, folder)
    return model.eval()


def value_of(config: StrictConfig, name: str) -> Any:
    """The value of a field, or what None in it stands for."""
    return getattr(config, RESOLVED.get(name, name), getattr(config, name))


def as_override(value: Any) -> str:
    """A value as `--override` reads it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def fitting_flags(config_class: type, presets: Mapping[str, Any], fields: dict[str, Any], differing: list[str]) -> str:
    """`--config` and `--override` for some fields, from the preset that is nearest to them.

    Args: differing: fields in which this run differs; its vocabulary is overridden, whatever the preset says.
    """
    overrides = {}
    for preset in (name for name, row in presets.items() if isinstance(row, dict)):
        config = from_preset(config_class, dict(presets), preset)
        differs = {name for name, value in fields.items() if value_of(config, name) != value}
        names = differs | ({"vocab_size"} & set(differing))
        overrides[preset] = [f"{name}={as_override(fields[name])}" for name in sorted(names)]
    preset = min(overrides, key=lambda name: len(overrides[name]))
    return " ".join([f"--config {preset}", *(["--override", *overrides[preset]] if overrides[preset] else [])])
