"""A checkpoint of a small text-to-image model without training, for what reads checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion
from utils.checkpoints import EMA, STAGE, mark_complete, provenance, write_json


def save_diffusion_checkpoint(run_dir: Path, cache: Path, step: int = 4, with_average: bool = True) -> Path:
    """Write `checkpoint-STEP` as a run on the latents does; captions matter to both kinds of weights, which differ."""
    latents = ImageLatentDataset(cache, "train")
    settings = latents.manifest["settings"]
    channels, side, _ = settings["latent_shape"]
    torch.manual_seed(0)
    size = {"widths": [32, 64], "n_blocks": [1, 1], "conditioning_width": 64, "text_width": 32, "n_text_layers": 1}
    fitting = {"latent_channels": channels, "latent_size": side, "max_tokens": settings["max_tokens"]}
    model = ImageDiffusion.from_preset("tiny", **size, **fitting)
    averaged = {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
    for parameter in model.parameters():  # Away from the zeros that it starts with.
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = run_dir / f"checkpoint-{step}"
    model.save_pretrained(folder)
    if with_average:
        save_file(averaged, folder / EMA)
    data = {"folder": str(cache), "fingerprint": latents.fingerprint}
    record = {"stage": "image_diffusion", "preset": "tiny", "arguments": {}, "data": data, "latents": settings}
    write_json(folder / STAGE, {**record, **provenance()})
    mark_complete(folder)
    return folder
