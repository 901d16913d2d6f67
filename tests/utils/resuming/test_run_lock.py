import os

import pytest

from dataset_loading.locks import LOCK, only_writer


def test_a_second_run_in_the_same_folder_is_refused_before_it_writes(train, tmp_path):
    run_dir = tmp_path / "image_vae" / "one"
    with only_writer(run_dir, "wait"):
        with pytest.raises(OSError, match=rf"{run_dir} is being written by process {os.getpid()} .*--run_name"):
            train("one", 1)
        assert os.listdir(run_dir) == [LOCK]
    # The lock ends with the run, whether it fails or not; a failed run leaves no folder.
    with pytest.raises(ValueError, match="no field"):
        train("one", 1, "--override", "image_sise=32")
    assert not (tmp_path / "image_vae").exists()
    train("one", 1, "--batch_size", "8")
    assert not (run_dir / LOCK).exists()
    train("one", 1, "--batch_size", "8", "--resume_from_checkpoint")
