"""Models of the layout `ldm` as folders that diffusers opens by itself: an image VAE as AutoencoderKL, a text-to-image
model as UNet2DConditionModel with the scheduler of its process. diffusers writes the files."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dataset_loading.files import sync_to_disk
from model.image import ldm_unet, ldm_vae
from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.image.ldm_scheduler import scheduler_of
from model.image.vae import ImageVAE, ImageVAEConfig
from utils.generation.foreign_weights import NULL_CONDITION

# Stages whose models have the layout, and their classes in diffusers.
CLASSES = {"image_vae": "AutoencoderKL", "image_diffusion": "UNet2DConditionModel"}


def check_layout(stage: str, model: nn.Module) -> None:
    """Raises: ValueError: diffusers has no such model; says which has, and what to do."""
    architecture = getattr(model.config, "architecture", None)
    if stage in CLASSES and architecture == "ldm":
        return
    kind = f"architecture={architecture!r}" if architecture else "a layout of its own"
    raise ValueError(
        f"--format diffusers: this model of stage {stage!r} has {kind}. diffusers has the layout of image_vae and "
        "image_diffusion with architecture='ldm': train one with --config ldm, or export this one without --format"
    )


def write_diffusers(model: ImageVAE | ImageDiffusion, folder: Path, dtype: torch.dtype) -> None:
    """Write a model of architecture "ldm" into a folder for diffusers' `from_pretrained`.

    Raises:
        ValueError: diffusers is not installed, or has no equal of its configuration; names the command or the field.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("--format diffusers needs the package diffusers: pip install 'diffusers>=0.37'") from error
    if isinstance(model, ImageVAE):
        fields = vae_fields(model.config, model.latent_mean, model.latent_std)
        names, state = ldm_vae.rename_diffusers_weights, model.state_dict()
        theirs: Any = diffusers.AutoencoderKL(**fields)
        state = {name: value for name, value in state.items() if not name.startswith("latent_")}
    else:
        scheduler, settings = scheduler_of(model.config)
        theirs = diffusers.UNet2DConditionModel(**unet_fields(model.config))
        names, state = ldm_unet.rename_diffusers_weights, model.network.state_dict()
        getattr(diffusers, scheduler)(**settings).save_pretrained(folder)
        save_file({"state": model.null.state.detach().clone()}, folder / NULL_CONDITION)
    theirs.load_state_dict(under_their_names(state, theirs, names))
    nn.Module.to(theirs, dtype)  # That of diffusers warns of layers that are to stay in float32; there are none.
    theirs.save_pretrained(folder)
    for file in folder.iterdir():
        if file.is_file():
            sync_to_disk(file)


def diffusers_opening(name: str, model: ImageVAE | ImageDiffusion) -> str:
    """How the folder opens, for the model card."""
    if isinstance(model, ImageVAE):
        return f"""```python
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained("{name}").eval()
mean = vae.encode(images).latent_dist.mean  # images (B, 3, Y, X) in [-1, 1]
reconstruction = vae.decode(mean).sample
```

Standardised latents are (mean - shift_factor) * scaling_factor, or (mean - latents_mean) / latents_std where
`config.json` has one of these for each channel."""
    scheduler, _ = scheduler_of(model.config)
    text = "the states of its frozen text encoder"
    if model.config.text_encoder == "bytes":
        text = "states of the model's own text encoder, `ImageDiffusion.encode_text`, which this folder lacks"
    return f"""```python
from diffusers import {scheduler}, UNet2DConditionModel
from safetensors.torch import load_file
unet = UNet2DConditionModel.from_pretrained("{name}").eval()
scheduler = {scheduler}.from_pretrained("{name}")
prediction = unet(latents, time, encoder_hidden_states=states).sample  # (B, Z, y, x), standardised latents
```

`states` are {text}, (B, T, {model.config.text_width}). Without a caption they are the vector in `{NULL_CONDITION}`,
as (1, 1, {model.config.text_width})."""


def under_their_names(state: dict[str, Tensor], theirs: nn.Module, rename: Any) -> dict[str, Tensor]:
    """A state dict under the names that `rename` gives ours for."""
    names = theirs.state_dict()
    return {their: state[our] for their, our in zip(names, rename(names), strict=True)}


def vae_fields(config: ImageVAEConfig, mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Keywords of diffusers' AutoencoderKL.

    Latent statistics that are the same for all channels become shift_factor and scaling_factor, others latents_mean
    and latents_std, with a scaling_factor of 1.
    Raises: ValueError: it has no equal; names the field.
    """
    blocks, widths = config.n_encoder_blocks[0], config.encoder_widths
    expected = {
        "decoder_widths": widths,
        "n_encoder_blocks": [blocks] * len(widths),
        "n_decoder_blocks": [blocks + 1] * len(widths),
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)} has no equal in diffusers' AutoencoderKL, which has {name}={value} "
                f"for encoder_widths={widths} with {blocks} blocks; export without --format"
            )
    is_uniform = bool((mean == mean[0]).all() and (std == std[0]).all())
    statistics: dict[str, Any] = {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0}
    if is_uniform:
        statistics = {"shift_factor": mean[0].item() or None, "scaling_factor": 1 / std[0].item()}
    return {
        **statistics,
        "sample_size": config.image_size,
        "latent_channels": config.latent_channels,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": blocks,
        "norm_num_groups": config.n_norm_groups,
        "use_quant_conv": config.use_quant_conv,
        "use_post_quant_conv": config.use_quant_conv,
    }


def unet_fields(config: ImageDiffusionConfig) -> dict[str, Any]:
    """Keywords of diffusers' UNet2DConditionModel."""
    attention, widths = config.use_attention, config.widths
    heads: Any = config.n_heads  # diffusers counts heads, of all levels or of each.
    return {
        "sample_size": config.latent_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attention[::-1]],
        "layers_per_block": config.n_blocks if len(set(config.n_blocks)) > 1 else config.n_blocks[0],
        "attention_head_dim": heads or [width // config.head_width for width in widths],
        "cross_attention_dim": config.text_width,
        "norm_num_groups": config.n_norm_groups,
        "use_linear_projection": config.use_linear_projection,
    }
