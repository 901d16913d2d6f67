"""Checkpoints that a thread writes while training goes on."""

import time
from pathlib import Path

import pytest
import torch

from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, equal, run_stage
from utils.checkpoints import checkpoints_in, damage_of, is_complete
from utils.saving import BackgroundWriter, snapshot
from utils.training_utils import ImageVAEGANTrainer

FLAGS = ["--batch_size", "4", "--save_steps", "2", "--save_total_limit", "2"]


class SlowStage(ImageVAEStage):
    """Its checkpoints are written once the step after has changed what they hold."""

    class trainer_class(ImageVAEGANTrainer):
        def before_saving(self):
            super().before_saving()
            if self.stage_arguments.async_save:
                self.background.add(self.await_step, self.state.global_step + 1)

        def await_step(self, step: int) -> None:
            deadline = time.monotonic() + 5
            while self.state.global_step < min(step, self.state.max_steps) and time.monotonic() < deadline:
                time.sleep(0.01)


class FailingStage(ImageVAEStage):
    """A file of its first checkpoint cannot be written."""

    class trainer_class(ImageVAEGANTrainer):
        def before_saving(self):
            super().before_saving()
            folder = Path(self.args.output_dir) / "missing"
            self.background.add(torch.save, {}, folder / "state.pt")


def test_a_thread_writes_what_the_step_had(image_cache, tmp_path, fresh_logging):
    arguments = (SMALL_RUN, image_cache, tmp_path)
    run_stage(SlowStage, *arguments, "now", 5, *FLAGS)
    run_stage(SlowStage, *arguments, "later", 5, *FLAGS, "--async_save")
    now, later = (checkpoints_in(tmp_path / "image_vae" / name) for name in ("now", "later"))
    assert [folder.name for folder in later] == [folder.name for folder in now] == ["checkpoint-4", "checkpoint-5"]
    for first, second in zip(now, later):
        assert is_complete(second) and not damage_of(second)
        names = {file.name for file in first.iterdir()}
        assert names == {file.name for file in second.iterdir()}
        # Weights bit for bit; states of training by their content.
        for name in ("model.safetensors", "ema.safetensors", "config.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
        for name in ("optimizer.pt", "scheduler.pt", "stage_state.pt"):
            assert equal(*(torch.load(folder / name, weights_only=True) for folder in (first, second))), name


def test_what_a_thread_cannot_write_ends_the_run(image_cache, tmp_path, fresh_logging):
    with pytest.raises(OSError, match=r"could not write .*checkpoint-2: .*missing.*--resume_from_checkpoint latest"):
        run_stage(FailingStage, SMALL_RUN, image_cache, tmp_path, "failing", 1000, *FLAGS, "--async_save")
    assert checkpoints_in(tmp_path / "image_vae" / "failing") == []


def test_a_snapshot_shares_nothing():
    tensor, numbers = torch.zeros(3), [1, (2, torch.ones(2))]
    copied = snapshot({"a": {"b": tensor}, "c": numbers})
    tensor += 1
    numbers[1][1].mul_(5)
    numbers[0] = 7
    assert equal(copied, {"a": {"b": torch.zeros(3)}, "c": [1, (2, torch.ones(2))]})


def test_one_process_waits_for_the_files_of_the_others(tmp_path):
    first, second = BackgroundWriter(), BackgroundWriter()
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    first.add((folder / "a").write_text, "a")
    first.start(folder, n_ranks=2, number=0, limit=1)
    time.sleep(0.2)
    first.check()  # Neither done nor failed.
    assert not is_complete(folder)
    second.add((folder / "b").write_text, "b")
    second.start(folder, n_ranks=2, number=1, limit=0)
    second.wait()
    first.wait()
    assert is_complete(folder) and {file.name for file in folder.iterdir()} == {"a", "b", "COMPLETE.json"}


def test_a_process_whose_peer_has_failed_or_gone_discards_its_part(tmp_path, monkeypatch, caplog):
    first, second = BackgroundWriter(), BackgroundWriter()
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    first.start(folder, n_ranks=2, number=0, limit=1)
    second.add((folder / "nowhere" / "b").write_text, "b")
    second.start(folder, n_ranks=2, number=1, limit=0)
    for writer in (first, second):
        with pytest.raises(OSError, match=r"could not write .*checkpoint-2"):
            writer.wait()
    assert not folder.exists()
    # The other process has ended: a run that fails does not wait for ever.
    monkeypatch.setattr("utils.saving.PATIENCE", 0.1)
    folder.mkdir()
    with pytest.raises(ValueError, match="cause"), first:
        first.start(folder, n_ranks=2, number=0, limit=1)
        raise ValueError("cause")
    assert "another process has ended" in caplog.text and not folder.exists()
