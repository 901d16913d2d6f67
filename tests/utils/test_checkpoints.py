import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.causal import MegaTransformerForCausalLM
from utils.checkpoints import (
    EMA,
    checkpoints_in,
    is_complete,
    load_model,
    mark_complete,
    newest_complete,
    resolve_checkpoint,
    rotate,
    without_copies,
)


def checkpoint(run, step, complete=True, **record):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "stage.json").write_text(json.dumps(record))
    if complete:
        mark_complete(folder)
    return folder


def test_half_written_is_passed_over(tmp_path):
    whole = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 10, complete=False)
    assert newest_complete(tmp_path) == whole == resolve_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="not written completely"):
        resolve_checkpoint(tmp_path / "checkpoint-10")


def test_truncated_or_missing_file_is_not_complete(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "model.safetensors").write_bytes(b"wei")
    assert not is_complete(folder)
    (folder / "model.safetensors").unlink()
    assert not is_complete(folder)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_rotation_counts_complete_ones_only(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 1000, complete=False)
    rotate(tmp_path, 2)
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-1000"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_written_once_and_loaded_under_both_names(tmp_path, is_tied):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    model = MegaTransformerForCausalLM.from_preset("tiny", hidden_size=64, n_layers=1, tie_word_embeddings=is_tied)
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    folder = tmp_path / "checkpoint-1"
    model.save_pretrained(folder)
    save_file(without_copies(model, averaged), folder / EMA)
    mark_complete(folder)
    assert len(set(names) & load_file(folder / EMA).keys()) == (1 if is_tied else 2)
    for kind, state in (("raw", model.state_dict()), ("ema", averaged)):
        loaded = load_model(MegaTransformerForCausalLM, folder, kind).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert torch.equal(*(loaded[name] for name in names)) == is_tied
