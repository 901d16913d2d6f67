"""The GPU's benchmark at tiny sizes on a CPU: every part runs and writes its rows."""

import json
import signal
import time
from pathlib import Path

import pytest

from benchmarks import cuda
from utils.command_line import parse_arguments

FAST = ("audio_vae", "generation", "multimodal")


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[] if part in FAST else [pytest.mark.slow]) for part in cuda.PARTS if part != "train"],
)
def test_a_part_runs_and_writes_its_rows(part, tmp_path):
    words = ["--part", part, "--device", "cpu", "--repeats", "1", "--output", str(tmp_path / "rows.json")]
    cuda.main(parse_arguments(cuda.BenchmarkArguments, words, ""))
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["part"] == part and content["rows"] and content["gpu"] == "none" and content["is_complete"]
    measured = [row for row in content["rows"] if "median_s" in row]
    assert measured and all(row["median_s"] > 0 and row["peak_gib"] == 0 for row in measured)


def test_without_a_gpu_the_remedy_is_named():
    if cuda.torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(ValueError, match=r"--device=cuda.*--device cpu"):
        cuda.BenchmarkArguments().validate_gpu()


def test_a_part_that_the_time_cuts_off_keeps_its_rows(tmp_path, monkeypatch):
    """The part measures one side, then goes on longer than the limit."""

    def measure_for_long(results):
        results.add("nothing", "ours", lambda: None, unit="units", n_units=1)
        time.sleep(60)

    monkeypatch.setitem(cuda.PARTS, "fits", measure_for_long)
    file = tmp_path / "rows.json"
    words = ["--part", "fits", "--device", "cpu", "--limit_minutes", "0.005", "--output", str(file)]
    former = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        cuda.main(parse_arguments(cuda.BenchmarkArguments, words, ""))
    assert end.value.code == 128 + signal.SIGALRM
    content = json.loads(file.read_text())
    assert not content["is_complete"] and [row["what"] for row in content["rows"]] == ["nothing"]
    # Nothing of the limit is left in this process.
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)] == former
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.slow
def test_a_stage_is_trained_and_evaluated(image_cache, tmp_path):
    flags = "--override image_size=32 --batch_size 4 --perceptual_weight 0 --gan_weight 0"
    words = ["--part", "train", "--device", "cpu", "--cached_dataset", str(image_cache), "--minutes", "0.05"]
    cuda.main(
        parse_arguments(cuda.BenchmarkArguments, [*words, "--flags", flags, "--output", str(tmp_path / "o.json")], "")
    )
    content = json.loads((tmp_path / "o.json").read_text())
    (row,) = content["rows"]
    assert content["is_complete"] and row["steps"] > 0 and row["scores"]["model"]["psnr_db"] > 0


def test_training_needs_a_cache(tmp_path):
    words = ["--part", "train", "--device", "cpu", "--cached_dataset", str(tmp_path)]
    with pytest.raises(ValueError, match=r"--cached_dataset=.*preprocess"):
        cuda.main(parse_arguments(cuda.BenchmarkArguments, words, ""))


@pytest.mark.parametrize(
    "stage, named, trained, evaluated",
    [("multimodal", False, False, False), ("multimodal", True, True, False), ("vocoder", True, True, True)],
)
def test_caches_that_training_and_evaluation_are_given(stage, named, trained, evaluated, tmp_path, monkeypatch):
    """Streams have caches of their own flags; of scripts that are not run, their command lines."""
    commands = []

    def note(results, script, *words, run=None):
        commands.append(words)
        folder = run / "checkpoint-1" if run else Path(words[words.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
        (folder / "metrics.json").write_text("{}")

    monkeypatch.setattr("benchmarks.cuda_training.run_script", note)
    (tmp_path / "manifest.json").write_text("{}")
    words = ["--part", "train", "--device", "cpu", "--stage", stage]
    cuda.main(parse_arguments(cuda.BenchmarkArguments, [*words, *["--cached_dataset", str(tmp_path)] * named], ""))
    assert ["--cached_dataset" in words for words in commands] == [trained, evaluated]
