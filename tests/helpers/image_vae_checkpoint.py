"""A checkpoint of a small image VAE without training, for what reads checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from dataset_loading.image.pixels import ImageDataset
from model.image.vae import ImageVAE
from utils.checkpoints import EMA, STAGE, mark_complete, provenance, write_json


def save_checkpoint(run_dir: Path, cache: Path, step: int = 4, with_average: bool = True) -> Path:
    """Write `checkpoint-STEP` as a run on the cache does; raw weights give a black image, averaged ones do not."""
    torch.manual_seed(0)
    model = ImageVAE.from_preset("tiny", image_size=32)
    for parameter in model.parameters():  # Away from the working codec that it starts as.
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    folder = run_dir / f"checkpoint-{step}"
    for layer in (model.decoder.head, model.decoder.code):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.constant_(model.decoder.head.bias, -1.0)
    model.save_pretrained(folder)
    if with_average:
        save_file(averaged, folder / EMA)
    data = {"folder": str(cache), "fingerprint": ImageDataset(cache, "validation").fingerprint}
    write_json(folder / STAGE, {"stage": "image_vae", "preset": "tiny", "arguments": {}, "data": data, **provenance()})
    mark_complete(folder)
    return folder
