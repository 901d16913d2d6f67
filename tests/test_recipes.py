"""A recipe run from its first to its last line, with a few steps of every stage."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import soundfile

from dataset_loading.embedded.speech import build_speech
from utils.reporting.times import read_steps

ROOT = Path(__file__).resolve().parent.parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
OUTPUTS = ("runs", "cached_datasets", "data", "generated", ".*")


def copy_repository(tmp_path: Path) -> Path:
    """A copy of the repository, since a recipe writes into its own."""
    return shutil.copytree(ROOT, tmp_path / "repository", ignore=shutil.ignore_patterns(*OUTPUTS))


@pytest.mark.slow
def test_audio_recipe_speaks_three_sentences(tmp_path):
    repository = copy_repository(tmp_path)
    build_speech(tmp_path / "speech", limit=48)
    steps = {f"{name}_STEPS": "3" for name in ("VOCODER", "VAE", "TUNING", "SPEECH")}
    sizes = {"SIZE": "tiny", "MEL": "16k", "BATCH": "2", "SEGMENT": "32", "FRAMES": "300", "DISCRIMINATOR": "thin"}
    starts = {"GAN_START": "1", "VAE_GAN_START": "1", "GAN_RAMP": "1", "EVERY": "2", "CLIPS": "1"}
    variables = {"DATASET": str(tmp_path / "speech/train"), "GPUS": "0", "PATH": PATH, **steps, **sizes, **starts}
    environment = {**os.environ, **variables}
    subprocess.run(["bash", "recipes/audio.sh"], cwd=repository, env=environment, check=True)
    runs = repository / "runs"
    waveforms = [soundfile.read(runs / f"audio_diffusion/voice/sentences/{number:03}.wav")[0] for number in range(3)]
    assert all(len(waveform) > 8000 and abs(waveform).max() > 0 for waveform in waveforms)
    record = json.loads((runs / "vocoder/voice_through_vae/checkpoint-3/stage.json").read_text())
    manifest = json.loads((repository / "cached_datasets/voice_through_vae/manifest.json").read_text())
    assert record["vae_fingerprint"] == manifest["settings"]["vae_fingerprint"] != ""
    assert record["arguments"]["init_from"] == "runs/vocoder/voice"
    scores = json.loads((runs / "vocoder/voice_through_vae/after_vae/metrics.json").read_text())
    assert "voice_through_vae" in scores["model"]["vocoder"]
    # A second call evaluates nothing again, and names all files in the end.
    command = ["bash", str(repository / "recipes/audio.sh")]
    options = {"capture_output": True, "text": True, "check": True}
    again = subprocess.run(command, cwd=tmp_path, env={**environment, "DATASET": "speech/train"}, **options)
    assert again.stdout.count("evaluated: runs/") == 4
    (file,) = re.findall(r"^vocoder +(\S+\.onnx)$", again.stdout, re.MULTILINE)
    assert (repository / file).is_file()


PARTS = [f"demo/{part}" for part in ("image", "audio", "text", "multimodal")]


@pytest.mark.parametrize("name", ["audio", "image", "multimodal", "text", *PARTS])
def test_recipes_have_a_heading_per_stage_and_end_with_the_next_command(name):
    lines = (ROOT / "recipes" / f"{name}.sh").read_text().splitlines()
    headings = [number for number, line in enumerate(lines) if line.startswith("heading ")]
    stages = [number for number, line in enumerate(lines) if "pretrain_" in line and not line.startswith("#")]
    # Between two stages there is a heading, and one before the first.
    for first, second in zip([-1, *stages], stages):
        assert any(first < number < second for number in headings), lines[second]
    script = f". recipes/heading.sh; {next(line for line in lines if line.startswith('next ')).rstrip(chr(92))}"
    last = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert last.startswith("next: python inference/")


def recipe(lines: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run lines with the functions of recipes in a folder."""
    script = f"set -euo pipefail\n. {ROOT}/recipes/heading.sh\n{lines}"
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("my_speech", "{caller}/my_speech"),
        ("user/name", "user/name"),
        ("docs", "docs"),  # of the repository
        ("python-topics", "python-topics"),
        ("/a/b", "/a/b"),
    ],
)
def test_a_folder_is_that_of_the_callers_folder(tmp_path, value, found):
    (tmp_path / "my_speech").mkdir()
    done = recipe('to_repository DATASET\necho "$DATASET"\npwd', tmp_path, DATASET=value)
    assert done.stdout.splitlines() == [found.format(caller=tmp_path), str(ROOT)], done.stderr


@pytest.mark.parametrize("name", ["audio", "image", "text"])
def test_a_folder_that_is_nowhere_is_refused_at_once(tmp_path, name):
    command = ["bash", str(ROOT / f"recipes/{name}.sh")]
    environment = {**os.environ, "DATASET": "my_speach"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"DATASET=my_speach: there is no {tmp_path}/my_speach, ")


def test_a_checkpoint_is_evaluated_once(tmp_path):
    lines = """
    python() { echo "$@" >> log && mkdir -p out && touch out/metrics.json; }
    once out python evaluate.py --checkpoint run --max_samples 8"""
    checkpoint = tmp_path / "run/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").touch()

    def n_evaluations() -> int:
        done = recipe(lines, tmp_path)
        assert done.returncode == 0, done.stderr
        log = (tmp_path / "log").read_text().splitlines()
        assert set(log) == {"evaluate.py --checkpoint run --max_samples 8"}
        return len(log)

    assert [n_evaluations(), n_evaluations()] == [1, 1]
    moment = time.time() + 5
    os.utime(checkpoint / "COMPLETE.json", (moment, moment))
    assert n_evaluations() == 2


@pytest.mark.slow
def test_the_demo_makes_every_part_and_does_nothing_twice(tmp_path):
    repository = copy_repository(tmp_path)
    environment = {**os.environ, "PATH": PATH, "SHORTER": "100", "OMP_NUM_THREADS": "1"}
    command = ["bash", "recipes/demo.sh"]
    subprocess.run(command, cwd=repository, env=environment, check=True)
    page = (repository / "runs/demo/report.html").read_text()
    assert "Not there yet" not in page and "no complete checkpoint" not in page and "not evaluated" not in page
    assert page.count("<audio") > 20 and page.count("<img") > 10 and page.count("<svg") >= 7
    assert len(page) < 15_000_000
    steps = read_steps(repository / "runs/demo")
    assert len(steps) == 28 and all(step.is_complete for step in steps)

    def times() -> dict[Path, int]:
        files = [path for folder in ("runs", "cached_datasets", "data") for path in (repository / folder).rglob("*")]
        return {path: path.stat().st_mtime_ns for path in files if path.is_file() and path.parent.name != "demo"}

    before = times()
    second = subprocess.run(command, cwd=repository, env=environment, check=True, capture_output=True, text=True)
    assert second.stdout.count("complete: ") == 28
    assert times() == before and read_steps(repository / "runs/demo") == steps


def run_steps(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess:
    """Run lines of a recipe in a folder, with `heading` and `step`."""
    lines = f"set -euo pipefail\n. {ROOT}/recipes/heading.sh\n. {ROOT}/recipes/demo/steps.sh\n{script}"
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", "-c", lines], cwd=folder, env=environment, capture_output=True, text=True)


COUNT = """
heading Counting
step out/result bash -c 'mkdir -p out && cat in/manifest.json >> log && echo "$0" > out/result' {word} in/
"""


def test_a_step_is_made_once_for_the_same_words_and_inputs(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/manifest.json").write_text("one\n")

    def log(word: str) -> list[str]:
        done = run_steps(tmp_path, COUNT.format(word=word))
        assert done.returncode == 0, done.stderr
        return (tmp_path / "log").read_text().split()

    assert log("a") == log("a") == ["one"]
    assert log("b") == log("b") == ["one"] * 2  # other words
    (tmp_path / "in/manifest.json").write_text("two\n")
    assert log("b") == log("b") == ["one", "one", "two"]  # another input
    (tmp_path / "out/result").unlink()
    assert log("b") == log("b") == ["one", "one", "two", "two"]  # no output
    (step,) = read_steps(tmp_path / "runs/demo")
    assert (step.stage, step.output, step.is_complete) == ("Counting", "out/result", True)


def test_an_interrupted_step_is_made_again_and_its_seconds_are_added(tmp_path):
    script = "heading A\nstep b/out bash -c 'sleep 2; [ -e go ] && mkdir -p b && touch b/out' {}\nstep c/out touch c"
    assert run_steps(tmp_path, script).returncode != 0
    (step,) = read_steps(tmp_path / "runs/demo")
    assert not step.is_complete and step.seconds >= 1
    (tmp_path / "go").touch()
    assert run_steps(tmp_path, script).returncode == 0
    first = read_steps(tmp_path / "runs/demo")[0]
    assert first.is_complete and first.output == "b/out" and first.seconds >= step.seconds + 1


def test_results_of_an_earlier_state_are_removed_before_a_step_is_made_again(tmp_path):
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/settings.json").write_text("{}")
    assert run_steps(tmp_path, "step out/x bash -c '[ ! -e out/x ] && mkdir out/x'").returncode == 0


FOLDER = """
step runs/vae/demo bash -c 'mkdir -p runs/vae/demo && echo "$0" >> runs/vae/demo/manifest.json; [ ! -e stop ]' {word}
step cache bash -c 'mkdir -p cache && cat runs/vae/demo/manifest.json >> cache/manifest.json' runs/vae/demo
"""


def test_a_run_of_other_words_and_what_was_made_of_it_are_kept_aside(tmp_path):
    def make(word: str) -> str:
        run_steps(tmp_path, FOLDER.format(word=word))
        return (tmp_path / "cache/manifest.json").read_text()

    assert make("short") == make("short") == "short\n"
    assert make("long") == make("long") == "long\n"
    assert make("short") == "short\n"
    formers = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_former_*"))
    names = [f"{name}_former_{number}" for name in ("cache", "runs/vae/demo") for number in (1, 2)]
    assert [str(path) for path in formers] == names
    assert [(tmp_path / name / "manifest.json").read_text() for name in names] == ["short\n", "long\n"] * 2


def test_an_interrupted_command_whose_input_has_changed_begins_anew(tmp_path):
    script = FOLDER.replace("' runs/vae/demo", "; [ ! -e stop ]' runs/vae/demo")
    run_steps(tmp_path, "step runs/vae/demo mkdir -p runs/vae/demo")
    (tmp_path / "stop").touch()
    assert run_steps(tmp_path, script.split("\n")[2]).returncode != 0
    (tmp_path / "stop").unlink()
    (tmp_path / "runs/vae/demo/manifest.json").write_text("long\n")
    assert run_steps(tmp_path, script.split("\n")[2]).returncode == 0
    assert (tmp_path / "cache/manifest.json").read_text() == "long\n"


def test_an_interrupted_run_goes_on_in_its_folder(tmp_path):
    (tmp_path / "stop").touch()
    assert run_steps(tmp_path, FOLDER.format(word="a")).returncode != 0
    (tmp_path / "stop").unlink()
    assert run_steps(tmp_path, FOLDER.format(word="a")).returncode == 0
    assert (tmp_path / "runs/vae/demo/manifest.json").read_text() == "a\na\n"
    assert not list(tmp_path.rglob("*_former_*"))


def test_numbers_of_training_steps_become_smaller_on_demand(tmp_path):
    words = "--max_steps 2000 --perceptual_start_step 1500 --gan_start_step 1650 --gan_ramp_steps 4 --batch_size 800"
    done = run_steps(tmp_path, f"step a/b echo {words} --save_steps 500", SHORTER="100")
    expected = "--max_steps 20 --perceptual_start_step 15 --gan_start_step 17 --gan_ramp_steps 1 --batch_size 800"
    assert done.stdout.strip() == f"{expected} --save_steps 500"


def test_numbers_of_samples_become_smaller_down_to_a_limit(tmp_path):
    words = "--limit 2304 --max_samples 288 --training_samples 97 --reader_steps 96 --max_samples 12"
    done = run_steps(tmp_path, f"step a/b echo {words}", SHORTER="10")
    assert done.stdout.strip() == (
        "--limit 2304 --max_samples 96 --training_samples 96 --reader_steps 96 --max_samples 12"
    )


BESIDE = """
beside a/out bash -c 'while [ ! -e b/out ]; do sleep 0.1; done; mkdir a; echo made; touch a/out; [ ! -e bad ]'
step b/out bash -c 'mkdir -p b && touch b/out'
meet
step c/out bash -c 'mkdir -p c && touch c/out'
"""


def test_a_command_beside_others_runs_with_them_and_is_made_once(tmp_path):
    done = run_steps(tmp_path, BESIDE)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "made", done.stderr
    steps = read_steps(tmp_path / "runs/demo")
    assert [step.output for step in steps] == ["b/out", "a/out", "c/out"] and all(step.is_complete for step in steps)
    assert run_steps(tmp_path, BESIDE).stdout.count("complete: ") == 3


def test_a_failure_beside_ends_the_recipe(tmp_path):
    (tmp_path / "bad").touch()
    done = run_steps(tmp_path, BESIDE)
    assert done.returncode == 1 and "made" in done.stdout and "failed with status 1: bash -c" in done.stderr
    assert [step.output for step in read_steps(tmp_path / "runs/demo")] == ["b/out"] and not (tmp_path / "c").exists()


def test_an_interrupted_recipe_ends_what_runs_beside(tmp_path):
    script = """
beside a/out bash -c 'sleep 60 & echo $! > pid; wait'
step b/out bash -c 'until [ -s pid ]; do sleep 0.1; done; exit 3'
"""
    assert run_steps(tmp_path, script).returncode == 3
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the command beside goes on")


def test_recipes_at_the_same_time_keep_all_rows(tmp_path):
    lines = "\n".join(
        f"step {{name}}/{number} bash -c 'mkdir -p {{name}} && touch {{name}}/{number}'" for number in range(20)
    )
    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(lambda name: run_steps(tmp_path, lines.format(name=name)), "abcd"):
            assert done.returncode == 0, done.stderr
    assert len(read_steps(tmp_path / "runs/demo")) == 80


def test_the_log_says_why_a_run_is_made_anew(tmp_path):
    assert run_steps(tmp_path, FOLDER.format(word="a")).returncode == 0
    (tmp_path / "runs/vae/demo/manifest.json").write_text("changed\n")
    log = run_steps(tmp_path, FOLDER.format(word="a")).stdout
    assert "cache is made anew, since what it was made of has changed: runs/vae/demo; the former one is now" in log
    log = run_steps(tmp_path, FOLDER.format(word="b")).stdout
    assert "runs/vae/demo is made anew, since another command made it" in log


def test_the_demo_has_every_part_and_refuses_others():
    makefile, recipe = (ROOT / "Makefile").read_text(), (ROOT / "recipes/demo.sh").read_text()
    for part in PARTS:
        assert part.replace("/", "-") in makefile and part.removeprefix("demo/") in recipe
    for part in ("steps", "video"):
        done = subprocess.run(["bash", "recipes/demo.sh", part], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and f"unknown part {part}" in done.stderr
