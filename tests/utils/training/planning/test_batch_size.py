"""`--batch_size auto`: as a run with the number that is found, which a resumed run takes; all processes take one."""

import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys

import pytest

from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, changed, equal, run_stage
from tests.helpers.two_processes import LIMIT, ROOT, TWO_PROCESSES, environment
from utils.training.planning.batch_size import alone

LARGE = ["--override", "image_size=32", "architecture=ldm", "patch_size=1", "encoder_widths=[64,64,64]"]
LARGE += ["decoder_widths=[64,64,64]", "n_encoder_blocks=[1,1,1]", "n_decoder_blocks=[1,1,1]"]


@pytest.mark.slow
def test_the_run_equals_one_with_the_number(image_cache, tmp_path, fresh_logging):
    runs = {
        size: run_stage(ImageVAEStage, SMALL_RUN, image_cache, tmp_path, size, 4, "--batch_size", size)
        for size in ("auto", "64")
    }
    assert json.loads((runs["auto"].folder / "stage.json").read_text())["arguments"]["batch_size"] == 64
    assert runs["auto"].losses == runs["64"].losses
    assert equal(runs["auto"].weights(), runs["64"].weights()) and equal(runs["auto"].adversary, runs["64"].adversary)


def test_a_resumed_run_takes_the_number_of_its_checkpoint(image_cache, tmp_path, fresh_logging):
    flags = ["--batch_size", "8", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    first = run_stage(ImageVAEStage, SMALL_RUN, image_cache, tmp_path, "run", 3, *flags)
    flags[1] = "auto"
    resumed = run_stage(ImageVAEStage, SMALL_RUN, image_cache, tmp_path, "run", 5, *flags, "--resume_from_checkpoint")
    assert json.loads((resumed.folder / "stage.json").read_text())["arguments"]["batch_size"] == 8
    assert resumed.losses[:3] == first.losses


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size", "auto", "--dry_run"], ["--batch_size=auto", "--measure"]),
        (["--batch_size", "some"], ["--batch_size", "int or auto", "some"]),
        (["--batch_size", "0"], ["--batch_size=0", "> 0"]),
    ],
)
def test_other_words_and_a_dry_run_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        ImageVAEStage.main(flags)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def run_limited(words: list[str], n_bytes: int, file) -> None:
    """A run whose process, and those that it starts, have this much address space beyond what it has now."""
    logging.basicConfig(filename=file, level=logging.INFO, force=True)
    with open("/proc/self/statm") as content:
        size = int(content.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + n_bytes, size + n_bytes))
    ImageVAEStage.main(words)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux alone")
def test_less_memory_gives_a_smaller_batch_with_which_the_run_ends_well(image_cache, tmp_path):
    words = ["--cached_dataset", str(image_cache), "--output_dir", str(tmp_path), "--run_name", "run"]
    words = changed(SMALL_RUN, *words, *LARGE, "--max_steps", "3", "--batch_size", "auto", "--eval_batch_size", "1")
    words = changed(words, "--n_logged_samples", "1")
    # A fresh process: what this one has freed before would be memory beyond the limit.
    process = multiprocessing.get_context("spawn").Process(
        target=run_limited, args=(words, 500_000_000, tmp_path / "log.txt")
    )
    process.start()
    process.join(600)
    process.kill()
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 0, log
    (record,) = (tmp_path / "image_vae" / "run").glob("checkpoint-3/stage.json")
    size = json.loads(record.read_text())["arguments"]["batch_size"]
    assert size < 64 and f"trying {2 * size}" in log and f"--batch_size auto: {size}" in log


@pytest.mark.parametrize("launched", [False, True])
def test_processes_that_try_belong_to_no_launch(launched, monkeypatch):

    if launched:
        for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "5,7"}.items():
            monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with alone():
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)
        assert not launched or os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.launch
def test_processes_take_the_smallest_number_of_all(tmp_path):
    start = [*TWO_PROCESSES, "tests/launched/agreed_batch_size.py", str(tmp_path)]
    run = subprocess.run(start, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stderr[-4000:]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["4", "4"]
