"""What a GPU is given and fed with, by what the settings become."""

from types import SimpleNamespace

import pytest
import torch

from utils.devices import compute_device, computes_bf16, feeding, local_processes, set_fp32_precision
from utils.distributed import launch_settings
from utils.megatransformer_utils import StageArguments, training_arguments


@pytest.mark.parametrize(
    "num_workers, has_gpu, n_cores, n_processes, expected",
    [
        *((-1, False, 64, 1, 0), (-1, True, 16, 1, 4), (-1, True, 16, 8, 1), (-1, True, 1, 1, 0)),
        *((3, False, 2, 1, 3), (0, True, 16, 1, 0)),
    ],
)
def test_loading_processes(num_workers, has_gpu, n_cores, n_processes, expected):
    settings = feeding(num_workers, has_gpu=has_gpu, n_cores=n_cores, n_processes=n_processes)
    assert settings["dataloader_num_workers"] == expected
    assert settings["dataloader_persistent_workers"] == (expected > 0)
    assert settings["dataloader_prefetch_factor"] == (4 if expected else None)
    assert settings["dataloader_pin_memory"] == settings["accelerator_config"]["non_blocking"] == has_gpu


@pytest.mark.parametrize(
    "variables, expected", [({"LOCAL_WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, 8), ({"LOCAL_SIZE": "4"}, 4), ({}, 1)]
)
def test_processes_on_this_machine(variables, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert local_processes() == expected


@pytest.mark.parametrize(
    "flags, expected",
    [("flags: fpu avx2 avx512f", False), ("flags: fpu avx512_bf16", True), ("Features : asimd bf16 sve", True)],
)
def test_processors_with_bf16(flags, expected):
    assert computes_bf16(flags) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_bf16_on_a_cpu_without_instructions_for_it_is_warned_of_by_the_first_process(
    rank, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("RANK", str(rank))
    for bf16 in (True, False):
        training_arguments(StageArguments(bf16=bf16), tmp_path)
    warnings = [record.getMessage() for record in caplog.records if "--bf16" in record.getMessage()]
    assert len(warnings) == (rank == 0 and compute_device().type == "cpu" and not computes_bf16())


@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_on_a_gpu_has_them(tf32, tmp_path, monkeypatch, caplog):
    """Of a run whose arguments are made where PyTorch sees a GPU."""
    given = SimpleNamespace(n_gpu=2)  # As of a machine with two, without a launcher.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.TrainingArguments", lambda **keywords: vars(given).update(keywords) or given)
    try:
        arguments = training_arguments(StageArguments(tf32=tf32), tmp_path)
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")
        assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if tf32 else "ieee")
    finally:
        set_fp32_precision(use_tf32=False)
    assert given.dataloader_pin_memory and given.accelerator_config == {"non_blocking": True}
    assert given.optim == "adamw_torch_fused" and not given.use_cpu
    assert arguments._n_gpu == 1 and "torchrun" in caplog.text and "deepspeed" in caplog.text


@pytest.mark.parametrize("tf32", [True, False])
def test_readers_of_the_older_switches_find_the_same_precision(tf32):
    try:
        set_fp32_precision(tf32)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")  # As inductor's cache asks.
        levels = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        assert {level.fp32_precision for level in levels} == {"tf32" if tf32 else "ieee"}
        torch.export.export(torch.nn.Conv1d(2, 2, 3), (torch.zeros(1, 2, 8),))
        assert {level.fp32_precision for level in levels} == {"tf32" if tf32 else "ieee"}
    finally:
        set_fp32_precision(use_tf32=False)


def test_a_run_on_a_cpu_loads_in_its_process(tmp_path):
    arguments = training_arguments(StageArguments(), tmp_path)
    assert arguments.dataloader_num_workers == 0 and not arguments.dataloader_pin_memory
    assert not arguments.accelerator_config.non_blocking


@pytest.mark.parametrize(
    "has_mps, is_launched, uses_cpu", [(True, False, False), (True, True, True), (False, False, True)]
)
def test_apples_gpu_is_used_by_one_process(has_mps, is_launched, uses_cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if is_launched:  # gloo, which connects the processes, knows the CPU alone.
        monkeypatch.setenv("LOCAL_RANK", "0")
    assert compute_device().type == ("mps" if has_mps else "cpu")
    assert launch_settings(False, "", False)["use_cpu"] == uses_cpu
