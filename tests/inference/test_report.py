"""inference/report.py on small runs: one self-contained page, whatever the runs lack."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from inference.generate_text import generate
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from pretrain_image_vae import ImageVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_cache import SMALL_VOCODER, write_clips
from tests.helpers.runs import SMALL_RUN, run_stage
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from utils.checkpoints import mark_complete
from utils.command_line import parse_arguments
from utils.generation.arguments.text import GenerateTextArguments
from utils.reporting.page import Report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(image_cache, tmp_path_factory) -> Path:
    """Runs of images, audio and text, the first two trained for some steps, all evaluated."""
    folder = tmp_path_factory.mktemp("project")
    runs = folder / "runs"
    run_stage(ImageVAEStage, SMALL_RUN, image_cache, runs, "demo", 4, "--gan_weight", "0", "--eval_steps", "2")
    # Clips that say what a page must not run.
    raw = write_clips(folder / "clips", 24)
    metadata = raw / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("clip ", f"{SCRIPT} "))
    words = ["--dataset_name", str(raw), "--output_dir", str(folder / "audio"), "--num_workers", "0"]
    AudioVocoderPreprocess.main([*words, "--validation_fraction", "0.2"])
    run_stage(VocoderStage, SMALL_VOCODER, folder / "audio", runs, "demo", 2, "--gan_weight", "0", "--batch_size", "4")
    texts = make_text(folder / "texts")
    text_run = runs / "multimodal" / "demo_text"
    save_text_checkpoint(text_run, texts, "tiny")
    evaluate.main(["--checkpoint", str(runs / "image_vae/demo"), "--contact_sheet", "2", "--max_samples", "4"])
    quick = ["--metrics", "mel", "--max_samples", "2", "--contact_sheet", "2"]
    evaluate.main(["--checkpoint", str(runs / "vocoder/demo"), *quick])
    evaluate.main(["--checkpoint", str(text_run), "--max_samples", "4", "--speed_tokens", "0"])
    prompts = ["--prompts", f"a list {SCRIPT}", "--max_new_tokens", "4", "--output_dir", str(text_run / "texts")]
    generate(parse_arguments(GenerateTextArguments, ["--checkpoint", str(text_run), *prompts], ""))
    (runs / "demo").mkdir()
    (runs / "demo" / "steps.tsv").write_text(f"Image VAE-GAN\t{runs}/image_vae/demo\t95\t1-1\tpython train.py\n")
    (runs / "demo" / "machine.txt").write_text("2 cores of <a processor>\n")
    return runs


@pytest.fixture(scope="module")
def page(runs) -> str:
    return Report(runs, ["demo", "demo_text"]).html()


def test_the_page_needs_nothing_from_elsewhere(page):
    sources = re.findall(r'(?:src|href|srcset|data|action)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:image/", "data:audio/flac;", "#")) for source in sources)
    assert not re.search(r"<(script|link|iframe|object)|url\(|@import|https?://", page)
    assert len(page) < 15_000_000
    # Links lead to sections.
    targets = re.findall(r'href="#([^"]*)"', page)
    assert len(targets) >= 5 and all(f'id="{target}"' in page for target in targets)


def test_the_page_shows_what_was_trained(page, runs):
    assert page.count("<section") == 3 + 1 + 1 + 1  # stages, what is missing, times, what next
    assert page.count("<svg") >= 2  # curves of the trained runs
    assert page.count("<audio") == 2 * 3  # recording, Griffin-Lim, vocoder of two clips
    assert page.count("<img") >= 2  # contact sheets
    assert "PSNR dB" in page and "JPEG, quality 10" in page and "bits per byte" in page and "mel-L1" in page
    assert "1 min 35 s" in page and "2 cores of &lt;a processor&gt;" in page
    assert f"inference/generate_text.py --checkpoint {runs}/multimodal/demo_text" in page


def test_texts_of_the_data_are_escaped(page):
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # captions of two clips, their players, a prompt


def test_missing_stages_are_named_with_the_command_that_makes_them(page, runs):
    assert "<code>make demo-image</code>" in page and "<code>make demo-multimodal</code>" in page
    other = Report(runs, ["base"]).html()
    assert "python pretrain_vocoder.py --run_name base" in other and "<audio" not in other


def test_the_page_says_what_runs_began_with_and_how_a_stopped_one_goes_on(page, runs, tmp_path):
    assert re.search(r"3 of \d models, trained from random weights in ", page)
    copy = shutil.copytree(runs, tmp_path / "runs")
    record_file = copy / "vocoder/demo/checkpoint-2/stage.json"
    record = json.loads(record_file.read_text())
    record["arguments"]["init_from"], record["run_lengths"] = "runs/vocoder/<b>", [[0, 9]]
    record_file.write_text(json.dumps(record))
    mark_complete(record_file.parent)
    assert "trained from random weights, but Vocoder from runs/vocoder/&lt;b&gt;" in Report(copy, ["demo"]).html()
    (copy / "vocoder/demo").rename(copy / "vocoder/own")
    page = Report(copy, ["own"]).html()
    assert "1 of 7 models, trained from given weights (Vocoder from " in page
    assert "step 2 of 9: the command that began it goes on where it has --resume_from_checkpoint latest" in page


def test_the_script_writes_the_page_and_prints_a_table(runs, tmp_path):
    command = [sys.executable, "inference/report.py", "--runs", str(runs), "--output", str(tmp_path / "a/page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert "Image VAE-GAN tiny" in text and "JPEG, quality 10" in text and "bits per byte" in text
    assert "missing: make demo-audio" in text and "1 min 35 s" in text
    assert (tmp_path / "a/page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "nowhere"], "--runs nowhere is no folder"),
        (["--run_names", "a/b"], "is no name of a run"),
        (["--output", "page.pdf"], "does not end in .html"),
    ],
)
def test_what_is_refused(words, message):
    command = [sys.executable, "inference/report.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_half_written_runs_are_shown_as_far_as_they_are(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    image_vae, vocoder = copy / "image_vae/demo", copy / "vocoder/demo"
    for file in (image_vae / "metrics.json", image_vae / "contact_sheet.png", *image_vae.glob("events*")):
        cut(file)
    cut(next((vocoder / "sounds").glob("*.wav")))
    (vocoder / "metrics.json").write_text('{"scores": {"model": 3}}')
    (vocoder / "checkpoint-2" / "COMPLETE.json").unlink()
    (copy / "audio_vae/demo/checkpoint-1").mkdir(parents=True)
    (copy / "audio_diffusion/demo/sentences").mkdir(parents=True)
    (copy / "audio_diffusion/demo/sentences/settings.json").write_text('{"files": [3, {"text": "a"}], "answers": 5}')
    report = Report(copy, ["demo", "demo_text"])
    page = report.html()
    for problem in ("metrics.json cannot be read", "metrics.json has another form", "checkpoint-2 was not written"):
        assert problem in page, problem
    assert page.count("no complete checkpoint yet") == 3
    table = [[str(cell) for cell in column.cells] for column in report.summary().columns]
    assert any("no complete checkpoint: make demo-audio" in cell for cell in table[-1])
