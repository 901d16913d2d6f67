"""The image VAE stage in one process: exactness under accumulation, checkpointing, resume; clear refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, changed, equal, largest_difference
from utils.checkpoints import checkpoints_in, is_complete, mark_complete, newest_complete

ROOT = Path(__file__).resolve().parent.parent


def test_record_and_files_of_a_checkpoint(train, image_cache):
    run = train("record", 4)
    record = json.loads((run.folder / "stage.json").read_text())
    assert record["stage"] == "image_vae" and record["preset"] == "tiny" and record["zero_stage"] == -1
    assert record["data"]["fingerprint"] == json.loads((image_cache / "manifest.json").read_text())["fingerprint"]
    assert is_complete(run.folder)
    weights = run.weights()
    assert weights.keys() == run.weights("ema").keys()
    assert not torch.equal(weights["latent_std"], torch.ones_like(weights["latent_std"]))
    assert (run.folder.parent / "tensorboard").is_dir()


def test_accumulation_equals_one_batch(train):
    whole = train("whole", 10, "--batch_size", "8")
    parts = train("parts", 10, "--batch_size", "2", "--gradient_accumulation_steps", "4")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert largest_difference(whole.adversary["discriminator"], parts.adversary["discriminator"]) <= 1e-5
    assert whole.adversary["updates"] == 8


def test_gradient_checkpointing_changes_nothing(train):
    plain = train("plain", 4, "--batch_size", "8")
    recomputed = train("recomputed", 4, "--batch_size", "8", "--use_gradient_checkpointing")
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)


def test_compiled_model_trains_the_same_or_is_refused(train):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--compile_model needs a GPU"):
            train("compiled", 4, "--compile_model")
        return
    plain = train("plain", 4, "--batch_size", "8")
    compiled = train("compiled", 4, "--batch_size", "8", "--compile_model")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)
    assert compiled.weights().keys() == plain.weights().keys()


@pytest.mark.parametrize("filter_name", ["grokfast_ema", "grokfast_ma"])
def test_gradient_filters_act(train, filter_name):
    window = ["--grokfast_window", "2"] if filter_name == "grokfast_ma" else []
    plain = train("plain", 4, "--batch_size", "8")
    filtered = train("filtered", 4, "--batch_size", "8", "--trainer", filter_name, *window)
    assert filtered.losses[0] == plain.losses[0]
    assert largest_difference(plain.weights(), filtered.weights()) > 1e-5


def run_script(script: str, *words: str, **kwargs) -> subprocess.Popen:
    """A python process with this repository on its path; `argv` holds the words."""
    head = f"import sys; argv = sys.argv[1:]\n{script}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", head, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **kwargs)


KILLED_WHILE_SAVING = """
import os, signal
from pretrain_image_vae import ImageVAEStage
from utils.training_utils import ImageVAEGANTrainer

class Dies(ImageVAEGANTrainer):
    def save_extras(self, folder):
        if self.state.global_step == 6:
            self.write(os.kill, os.getpid(), signal.SIGKILL)  # After model and optimizer.
        super().save_extras(folder)

class DyingStage(ImageVAEStage):
    trainer_class = Dies

DyingStage.main(argv)
"""


@pytest.mark.parametrize("saving", [[], ["--async_save"]])
def test_killed_and_resumed_equals_straight_through(saving, train, image_cache, tmp_path):
    flags = ["--batch_size", "8", "--save_steps", "2", "--save_total_limit", "9", "--trainer", "grokfast_ema"]
    straight = train("straight", 10, *flags)
    flags = [*flags, *saving]
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--run_name", "killed"]
    process = run_script(KILLED_WHILE_SAVING, *changed(SMALL_RUN, *words, "--max_steps", "10", *flags))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    folders = [folder.name for folder in checkpoints_in(tmp_path / "image_vae" / "killed")]
    assert folders == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert newest_complete(tmp_path / "image_vae" / "killed").name == "checkpoint-4"

    resumed = train("killed", 10, *flags, "--resume_from_checkpoint")
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    for file in ("optimizer.pt", "scheduler.pt", "stage_state.pt"):
        first, second = (torch.load(run.folder / file, weights_only=True) for run in (straight, resumed))
        assert equal(first, second), file
    first, second = (torch.load(run.folder / "rng_state.pth", weights_only=False) for run in (straight, resumed))
    assert torch.equal(first["cpu"], second["cpu"])
    assert straight.losses[4:] == resumed.losses[4:]


def test_sigterm_saves_and_ends_with_its_status(image_cache, tmp_path):
    """Also where a process loads the data, which gets the signal too."""
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--run_name", "stopped"]
    script = "from pretrain_image_vae import ImageVAEStage; ImageVAEStage.main(argv)"
    words += ["--max_steps", "100000", "--batch_size", "8", "--save_steps", "3", "--num_workers", "1"]
    process = run_script(script, *changed(SMALL_RUN, *words), start_new_session=True)
    run_dir = tmp_path / "image_vae" / "stopped"
    deadline = time.monotonic() + 100
    while not checkpoints_in(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, log[-2000:]
    assert "signal received: saving at step" in log and "stopped by SIGTERM" in log
    last = checkpoints_in(run_dir)[-1]
    assert is_complete(last) and json.loads((last / "trainer_state.json").read_text())["global_step"] < 100000


FULL_DISK = """
import resource, signal
from pretrain_image_vae import ImageVAEStage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # Files can grow no further, as on a full disk.
ImageVAEStage.main(argv)
"""


def test_full_disk_keeps_earlier_checkpoints(train, image_cache, tmp_path):
    constant = ["--batch_size", "8", "--lr_scheduler_type", "constant"]
    earlier = train("full", 3, *constant)
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--run_name", "full"]
    flags = ["--max_steps", "6", *constant, "--resume_from_checkpoint"]
    process = run_script(FULL_DISK, *changed(SMALL_RUN, *words, *flags))
    _, log = process.communicate(timeout=120)
    assert process.returncode == 2, log[-2000:]
    assert "could not write" in log and "earlier checkpoints are kept" in log
    assert checkpoints_in(earlier.folder.parent) == [earlier.folder] and is_complete(earlier.folder)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--config tiyn", "unknown preset 'tiyn'; did you mean 'tiny'"),
        ("--override image_sise=32", "no field 'image_sise'; did you mean 'image_size'"),
        ("--override image_size=64", "image_size=32"),
        ("--cached_dataset nowhere", "preprocess_image_vae_dataset.py"),
        ("--batch_size 500", "make no optimizer step of 500"),
        ("--batch_size 500 --dry_run", "make no optimizer step of 500"),
        ("--init_from nowhere", "no checkpoint at nowhere"),
        ("--resume_from_checkpoint nowhere", "no checkpoint at nowhere"),
        ("--use_deepspeed --deepspeed_config ds_config_int8.json", "implements for CUDA only"),
    ],
)
def test_bad_input_is_a_clear_error(words, message, image_cache, tmp_path, caplog, capsys):
    if "int8" in words and torch.cuda.is_available():
        pytest.skip("int8 collectives run where a GPU is")
    common = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--max_steps", "2"]
    with pytest.raises(SystemExit) as stop:
        ImageVAEStage.main(changed([*SMALL_RUN, *common], *words.split()))
    assert stop.value.code == 2
    assert message in caplog.text + capsys.readouterr().err


def test_a_run_is_not_overwritten(train):
    train("once", 2)
    with pytest.raises(ValueError, match="already holds checkpoint-2; pass --resume_from_checkpoint"):
        train("once", 4)


@pytest.mark.parametrize("n_steps", [4, 8])  # Within an epoch and at its end.
def test_a_finished_run_is_only_evaluated_again(train, n_steps):
    run = train("done", n_steps, "--batch_size", "8")
    before = {path: path.read_bytes() for path in sorted(run.folder.parent.rglob("checkpoint-*/*"))}
    train("done", n_steps, "--batch_size", "8", "--resume_from_checkpoint")
    assert {path: path.read_bytes() for path in sorted(run.folder.parent.rglob("checkpoint-*/*"))} == before
    with pytest.raises(ValueError, match=f"is at step {n_steps}, beyond this run's {n_steps - 1}; raise --max_steps"):
        train("done", n_steps - 1, "--batch_size", "8", "--resume_from_checkpoint")


def test_changed_data_are_refused_on_resume(train, image_cache, tmp_path):
    run = train("data", 3)
    record = json.loads((run.folder / "stage.json").read_text())
    record["data"]["fingerprint"] = "other"
    (run.folder / "stage.json").write_text(json.dumps(record))
    mark_complete(run.folder)
    with pytest.raises(ValueError, match="was trained on a former content"):
        train("data", 4, "--resume_from_checkpoint")


def test_init_from_takes_the_averaged_weights(train):
    first = train("first", 2)
    second = train("second", 1, "--init_from", str(first.folder), "--learning_rate", "1e-12")
    assert largest_difference(first.weights("ema"), {**second.weights()}) < 1e-2
    changed = {name: value for name, value in second.weights().items() if not name.startswith("latent_")}
    assert largest_difference({name: first.weights("ema")[name] for name in changed}, changed) < 1e-8
