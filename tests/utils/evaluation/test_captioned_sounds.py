"""evaluate.py on models of captions: rows, agreement of a model that makes what the caption says, what is refused."""

import json

import pytest
import torch
from PIL import Image

import evaluate
from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.cache_writer import save_tensors
from pretrain_audio_diffusion import AudioDiffusionStage
from tests.helpers.audio_latent_cache import (
    SETTINGS,
    SMALL_SPEECH,
    make_audio_latents,
    save_audio_vae,
    write_manifest,
)
from tests.helpers.runs import changed, run_stage
from utils.command_line import parse_arguments
from utils.generation.captions import CaptionPipeline

FIELDS = [word for word in SMALL_SPEECH if "=" in word and not word.startswith(("frame_width", "text_dropout"))]
COMMON = changed(SMALL_SPEECH, "--override", *FIELDS)
CAPTIONS = ("a low hum", "a high hum", "a rising tone")


def write_hums(folder, n_clips=42):
    """Log-mels that their captions describe, a seventh for validation."""
    torch.manual_seed(0)
    entries = {"train": [], "validation": []}
    for i in range(n_clips):
        split, caption, n_frames = "validation" if i % 7 == 6 else "train", CAPTIONS[i % 3], 24 + i % 5
        mel = torch.full((SETTINGS.n_mels, n_frames), -8.0)
        rows = {"a low hum": 3, "a high hum": 30, "a rising tone": 0}[caption]
        for frame in range(n_frames):
            row = rows or frame * 30 // n_frames + 3
            mel[row : row + 4, frame] = 0.0
        (folder / split).mkdir(parents=True, exist_ok=True)
        save_tensors(folder / split / f"{i:03}.pt", {"mel": mel + 0.3 * torch.randn(mel.shape)})
        row = {"key": f"{i:03}", "source": f"{i:03}.flac", "copy": 0, "caption": caption, "speaker": ""}
        entries[split].append({**row, "length": n_frames, "seconds": 0.016 * n_frames})
    write_manifest(folder, entries)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hums, a VAE, their latents, and a run of a few steps."""
    folder = tmp_path_factory.mktemp("sounds")
    mels, vae = write_hums(folder / "mels"), save_audio_vae(folder / "vae")
    make_audio_latents(mels, vae, folder / "latents", "--conditioning", "caption", "--max_tokens", "32")
    run_stage(AudioDiffusionStage, COMMON, folder / "latents", folder / "runs", "run", 2)
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """run(*words) -> the report."""

    def call(*words, name="out"):
        words = ["--checkpoint", folder / "runs/audio_diffusion/run", "--output_dir", tmp_path / name, *words]
        return evaluate.main([str(word) for word in words])

    return call


def test_rows_sheets_sounds_and_the_curve(run, tmp_path, folder, capsys):
    words = ["--n_steps", 2, "--contact_sheet", 1, "--curve", "--curve_steps", 1, 2, "--curve_scales", 2]
    report = run(*words)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    scores = report["scores"]
    assert set(scores) == {"training", "reconstruction", "generated", "shuffled", "chance"}
    assert scores["chance"] == {"agreement": pytest.approx(1 / 3), "words": 0.5}
    assert report["captions"]["remark"].startswith("agreement with only 3 distinct captions: chance is 0.333")
    assert scores["generated"]["kid"] > scores["training"]["kid"] and "kid" not in scores["reconstruction"]
    assert report["sampling"]["n_steps"] == 2 and report["sampling"]["guidance_scale"] == 3
    assert [point["n_steps"] for point in report["curve"]["points"]] == [1, 2]
    key = AudioLatentDataset(folder / "latents", "validation").entries[0]["key"]
    files = {path.name for path in (tmp_path / "out" / "sounds").iterdir()}
    assert files == {f"{key}_reconstruction.wav", f"{key}_generated.wav"}
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 200
    text = capsys.readouterr().out
    assert all(phrase in text for phrase in ("Captions to sound", "shuffled captions", "agreement", "Curve"))


class OraclePipeline(CaptionPipeline):
    """Gives the latents of a training clip with the same caption."""

    training: AudioLatentDataset

    def text_inputs(self, captions):
        return {"caption_states": captions}

    def latents(self, inputs, n_frames, seeds, settings):
        places = {entry["caption"]: index for index, entry in enumerate(self.training.entries)}
        rows = [self.training[places[caption]]["mean"] for caption in inputs["caption_states"]]
        L = int((n_frames.max() + 1) // 2)
        return torch.stack([row[torch.arange(L).clamp_max(len(row) - 1)] for row in rows])


def test_sounds_that_are_what_the_caption_says_agree_with_it_alone(folder):
    words = ["--checkpoint", str(folder / "runs/audio_diffusion/run")]
    evaluator = evaluate.build_evaluator(parse_arguments(evaluate.EvaluateArguments, words, ""))
    dataset, model = evaluator.build_dataset(), evaluator.pipeline
    evaluator.pipeline = OraclePipeline(model.model, model.vae, clip_seconds=model.clip_seconds)
    evaluator.pipeline.training = evaluator.training
    with torch.inference_mode():
        scores = evaluator.measure(dataset, list(range(len(dataset)))).metrics["scores"]
    assert scores["reconstruction"]["agreement"] == 1 and scores["generated"]["agreement"] == 1
    assert scores["generated"]["words"] == 1 and scores["shuffled"]["agreement"] == 0
    assert scores["generated"]["kid"] < 5


def test_seeds_decide_and_unusable_captions_are_said(run, folder, tmp_path, caplog):
    kid = [
        run("--n_steps", 2, "--seed", seed, name=str(n))["scores"]["generated"]["kid"] for n, seed in enumerate("001")
    ]
    assert kid[0] == kid[1] != kid[2]
    report = run("--n_steps", 2, "--training_samples", 4)
    assert report["scores"]["generated"]["agreement"] is None and "no word occurs" in report["captions"]["problem"]
    assert "agreement with the captions cannot be measured" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sentences", "3"], "--sentences: no effect"),
        (["--metrics", "wer"], "--metrics: no effect"),
        (["--n_steps", "0"], "n_steps=0 must be > 0"),
        (["--curve_steps", "4"], "--curve_steps has no effect"),
        (["--text_encoder", "x"], "--text_encoder x has no effect"),
    ],
)
def test_flags_that_do_not_fit_are_refused(run, words, message, caplog, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2 and message in caplog.text + capsys.readouterr().err
