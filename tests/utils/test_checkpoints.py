import json

import pytest

from utils.checkpoints import (
    check_resumable,
    checkpoints_in,
    is_complete,
    mark_complete,
    newest_complete,
    resolve_checkpoint,
    rotate,
)

DATA = {"folder": "cache", "fingerprint": "a"}


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
    with pytest.raises(FileNotFoundError, match="not written to its end"):
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


@pytest.mark.parametrize("zero, ranks, message", [(2, 1, "2 processes, this run has 1"), (-1, 2, "without DeepSpeed")])
def test_resume_that_would_fail_is_refused(tmp_path, zero, ranks, message):
    folder = checkpoint(tmp_path, 5, zero_stage=2, n_ranks=2, data=DATA)
    with pytest.raises(ValueError, match=message):
        check_resumable(folder, zero, ranks, "a")
    check_resumable(folder, 2, 2, "a")


def test_other_number_of_ranks_is_fine_without_sharding(tmp_path):
    check_resumable(checkpoint(tmp_path, 5, zero_stage=-1, n_ranks=2, data=DATA), -1, 1, "a")
    check_resumable(checkpoint(tmp_path, 6, zero_stage=0, n_ranks=2, data=DATA), 0, 1, "a")
