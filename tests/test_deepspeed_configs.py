"""The five DeepSpeed files: accepted by DeepSpeed's own configuration class, nothing declared twice."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.two_processes import skip_without_deepspeed
from utils.distributed import read_deepspeed_config

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "ds_config.json": 0,
    "ds_config_zero-1.json": 1,
    "ds_config_zero-2.json": 2,
    "ds_config_zero-3.json": 3,
    "ds_config_int8.json": 3,
}
KNOWN_TO_THE_TRAINER = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}


def test_every_file_is_here():
    assert {path.name for path in ROOT.glob("ds_config*.json")} == set(STAGES)


@pytest.mark.parametrize("file", STAGES)
def test_deepspeed_accepts_it(file):
    skip_without_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = json.loads((ROOT / file).read_text())
    assert {name for name, value in raw.items() if value == "auto"} == set(KNOWN_TO_THE_TRAINER)
    config = DeepSpeedConfig({**raw, **KNOWN_TO_THE_TRAINER})
    assert config.zero_config.stage == STAGES[file]
    for name, value in raw["zero_optimization"].items():
        attribute = name if hasattr(config.zero_config, name) else name.removeprefix("stage3_")
        assert getattr(config.zero_config, attribute) == value
    assert config.optimizer_name is None and config.scheduler_name is None
    assert not config.bfloat16_config.enabled and not config.float16_config.enabled


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "bf16", "fp16", "torch_autocast"])
def test_what_the_command_line_owns_is_refused(tmp_path, section):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({section: {}}))
    with pytest.raises(ValueError, match=f"declares '{section}'"):
        read_deepspeed_config(str(file), bf16=False)


def test_a_file_without_gradient_norms_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}))
    with pytest.raises(ValueError, match=r'config.json: "compute_grad_norm": false.*remove it'):
        read_deepspeed_config(str(file), bf16=False)


def test_bf16_is_autocast_over_fp32_weights():
    config = read_deepspeed_config(str(ROOT / "ds_config_zero-2.json"), bf16=True)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and "bf16" not in config


@pytest.mark.skipif(torch.cuda.is_available(), reason="int8 collectives run where a GPU is")
def test_int8_without_gpu_says_what_it_needs():
    with pytest.raises(
        ValueError, match="implements for CUDA only, and this machine has no GPU; use ds_config_zero-3"
    ):
        read_deepspeed_config(str(ROOT / "ds_config_int8.json"), bf16=False)


def test_int8_that_could_not_take_effect_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="take effect at stage 3 only, not at stage=2"):
        read_deepspeed_config(str(file), bf16=False)


@pytest.mark.parametrize("n_processes, keys", [("16", []), ("8", ["zero_quantized_weights"]), ("8", [])])
def test_int8_gradients_need_two_nodes(n_processes, keys, tmp_path, monkeypatch, caplog):
    """Eight GPUs on each node; with int8 weights it is a warning, as those take effect."""
    file = tmp_path / "config.json"
    settings = {"stage": 3, **dict.fromkeys([*keys, "zero_quantized_gradients"], True)}
    file.write_text(json.dumps({"zero_optimization": settings}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", n_processes)
    message = "zero_quantized_gradients has no effect on one node"
    if n_processes == "8" and not keys:
        with pytest.raises(ValueError, match=f"{file}: {message}.*use ds_config_zero-3"):
            read_deepspeed_config(str(file), bf16=False)
        return
    read_deepspeed_config(str(file), bf16=False)
    assert (message in caplog.text) == bool(keys)


@pytest.mark.parametrize("content", ["{'stage': 2}", "[]", ""])
def test_a_file_that_is_no_json_object_is_named(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"--deepspeed_config={file} .*JSON.*ds_config_zero-2"):
        read_deepspeed_config(str(file), bf16=False)
