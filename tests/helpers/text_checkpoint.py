"""A checkpoint of a small language model without training, for what reads checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from utils.checkpoints import EMA, STAGE, mark_complete, provenance, without_copies, write_json


def save_text_checkpoint(
    run_dir: Path, cache: Path, preset: str, *, step: int = 4, with_average: bool = True, spread: float = 0.1, **fields
) -> Path:
    """Write `checkpoint-STEP` as a run on the texts does; both kinds of weights are random, and differ.

    Args: spread: deviation of what is added to every weight; more makes predictions surer.
    """
    texts = TextDataset(cache, "train", 32)
    torch.manual_seed(0)
    special = {"hidden_size": 64, "vocab_size": texts.vocab_size, "eos_token_id": texts.tokenizer.eos_token_id}
    model = MegaTransformerForCausalLM.from_preset(preset, **{**special, **fields})
    for parameter in model.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    averaged = {name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}
    folder = run_dir / f"checkpoint-{step}"
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    if with_average:
        save_file(without_copies(model, averaged), folder / EMA)
    data = {"folder": str(cache), "fingerprint": texts.fingerprint}
    record = {"stage": "multimodal", "preset": preset, "arguments": {"sequence_length": 32}, "data": data}
    write_json(folder / STAGE, {**record, **provenance()})
    mark_complete(folder)
    return folder
