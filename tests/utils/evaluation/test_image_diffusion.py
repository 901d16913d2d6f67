"""evaluate.py on a small untrained text-to-image checkpoint: what it writes, what it measures, what it refuses."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from dataset_loading.image.latents import ImageLatentDataset
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import changed
from tests.helpers.text_encoder_folder import save_clip
from utils.evaluation.generated_images import PairedLatentDataset, generation_metrics, train_probe
from utils.evaluation.image_diffusion import distinct_captions
from utils.evaluation.source_images import SourceImageDataset
from utils.generation.arguments.image import SamplingArguments
from utils.generation.text_to_image import TextToImagePipeline
from utils.metrics.caption_agreement import N_POOLED, ImageFeatures
from utils.metrics.feature_sets import compare_sets
from utils.seeds import seed_of

CURVE = ["--curve", *"--curve_steps 1 2 --curve_scales 1 3 --curve_samplers euler heun --curve_samples 4".split()]  # noqa: SIM905


@pytest.fixture(scope="module")
def checkpoint(latent_cache, tmp_path_factory):
    return save_diffusion_checkpoint(tmp_path_factory.mktemp("runs") / "image_diffusion" / "small", latent_cache)


@pytest.fixture(scope="module")
def report(checkpoint):
    words = ["--checkpoint", str(checkpoint.parent), "--contact_sheet", "3", "--batch_size", "5", "--n_steps", "2"]
    return evaluate.main([*words, *CURVE])


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(*words): evaluate one sampling step, which is quick, into `tmp_path`; returns the report."""
    words = ["--checkpoint", str(checkpoint), "--n_steps", "1", "--output_dir", str(tmp_path / "out")]
    return lambda *more: evaluate.main(changed(words, *map(str, more)))


@pytest.fixture
def refused(run, caplog, capsys):
    """refused(*words): the message of an evaluation that ends with status 2."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2
        return caplog.text + capsys.readouterr().err

    return call


def test_the_report_is_complete(report, checkpoint, latent_cache):
    assert json.loads((checkpoint.parent / "metrics.json").read_text()) == report
    assert report["stage"] == "image_diffusion" and report["step"] == 4 and report["weights"] == "ema"
    assert report["data"]["is_the_runs_own"] and report["reference"] == "real"
    assert report["data"]["n_samples"] == len(ImageLatentDataset(latent_cache, "validation"))
    assert report["scores"].keys() == {"real", "training", "reconstruction", "generated", "shuffled", "chance"}
    assert report["scores"]["chance"] == {"agreement": 1 / report["captions"]["n_distinct"], "words": 0.5}
    assert report["definitions"].keys() >= {"reference", "rows", "frechet", "precision", "memorisation", "agreement"}
    assert report["sampling"]["sampler"] == "dpmpp_2m" and report["sampling"]["n_steps"] == 2
    assert report["model"]["seconds_per_image"] > 0 and report["memorisation"]["n_training"] > 50
    numbers = [value for row in report["scores"].values() for value in row.values()]
    assert all(math.isfinite(number) for number in numbers)


def test_numbers_are_those_of_images_generated_one_by_one(report, checkpoint, latent_cache):
    pipeline, extractor = TextToImagePipeline.load(checkpoint), ImageFeatures()
    latents = ImageLatentDataset(latent_cache, "validation")
    source, settings = SourceImageDataset(latents), SamplingArguments(n_steps=2)
    real, generated = [], []
    for index, entry in enumerate(latents.entries):
        real.append(extractor(source[index][None]))
        image = pipeline.images([entry["caption"]], [seed_of(0, f"{entry['key']} 0")], settings)
        generated.append(extractor(image))
    expected = compare_sets(torch.cat(generated)[:, :N_POOLED], torch.cat(real)[:, :N_POOLED])
    for name in ("frechet", "kid", "precision", "recall"):
        assert report["scores"]["generated"][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


def test_source_images_are_what_the_latents_were_made_of(checkpoint, latent_cache):
    latents = ImageLatentDataset(latent_cache, "train")
    vae, source = TextToImagePipeline.load(checkpoint).vae, SourceImageDataset(latents)
    for index in (0, len(latents) - 1):
        mean = vae.normalize_latents(vae.encode(source[index][None])[0])[0]
        assert (mean - latents[index]["mean"]).abs().max() < 0.01 * mean.abs().max()


def test_curve_sheet_and_tensorboard(report, checkpoint):
    points = report["curve"]["points"]
    settings = [(point["sampler"], point["guidance_scale"], point["n_steps"]) for point in points]
    assert settings == [(name, scale, n) for name in ("euler", "heun") for scale in (1, 3) for n in (1, 2)]
    assert [point["n_evaluations"] for point in points[4:6]] == [1, 3] and report["curve"]["n_samples"] == 4
    # One step of Heun is one of Euler.
    assert points[0]["kid"] == pytest.approx(points[4]["kid"], rel=1e-6) and points[0]["kid"] != points[2]["kid"]
    events = EventAccumulator(str(checkpoint.parent)).Reload()
    group = "evaluation_image_diffusion_validation_ema"
    curve = events.Scalars(f"{group}/curve_kid/heun_guidance_3")
    assert [(event.step, event.value) for event in curve] == [
        (point["n_steps"], pytest.approx(point["kid"], rel=1e-5)) for point in points[6:]
    ]
    assert f"{group}/curve" in events.Tags()["images"] and f"{group}/agreement" in events.Tags()["scalars"]
    assert Image.open(checkpoint.parent / "curve.png").width > 2 * 128
    assert Image.open(checkpoint.parent / "contact_sheet.png").width > 10 * 128  # Two captions, five images each.


def test_a_clip_folder_gives_distances_and_the_clip_score(run, tmp_path):
    few = ["--max_samples", 5, "--training_samples", 12]
    plain, report = run(*few), run(*few, "--features", save_clip(tmp_path / "clip"), *CURVE)
    assert report["features"]["kind"] == "clip" and report["features"]["width"] == 8
    for name, row in plain["scores"].items():
        assert report["scores"][name].items() >= row.items(), name
    generated, shuffled = report["scores"]["generated"], report["scores"]["shuffled"]
    assert generated["features_frechet"] > 0 and "features_frechet" not in shuffled
    assert 0 <= generated["clip_score"] <= 100 and generated["clip_score"] != shuffled["clip_score"]
    assert all({"features_kid", "clip_score"} <= set(point) for point in report["curve"]["points"])


def test_seeds_and_batches(run):
    few = ["--max_samples", 5, "--training_samples", 12]
    first, second, other = (run(*few, *more) for more in (["--batch_size", 2], [], ["--seed", 1]))
    for name in ("frechet", "kid"):
        value = first["scores"]["generated"][name]
        assert second["scores"]["generated"][name] == pytest.approx(value, rel=1e-4)
    value = first["scores"]["generated"]["frechet"]
    assert abs(other["scores"]["generated"]["frechet"] - value) > 1e-3 * value


def test_bf16_changes_little(run):
    few = ["--max_samples", 5, "--training_samples", 12]
    exact, rough = run(*few), run(*few, "--bf16")
    assert rough["precision"] == "bf16 autocast"
    value = exact["scores"]["generated"]["frechet"]
    assert 0 < abs(rough["scores"]["generated"]["frechet"] - value) < 0.05 * value


def test_the_table_explains_itself(run, capsys):
    run()
    text = capsys.readouterr().out
    for phrase in (
        "held-out captions",
        "(high)",
        "(low)",
        "shuffled captions",
        "read KID",
        "chance",
        "seed 0",
    ):
        assert phrase in text


def test_reconstructions_stand_for_images_that_are_gone(run, refused, latent_cache, caplog):
    raw, hidden = latent_cache.parent / "raw", latent_cache.parent / "hidden"
    raw.rename(hidden)
    try:
        report = run()
        assert "raw images cannot be read" in caplog.text
        assert "does not exist" in refused("--compare_with", "real")
    finally:
        hidden.rename(raw)
    assert report["reference"] == "reconstruction"
    assert report["scores"].keys() == {"training", "reconstruction", "generated", "shuffled", "chance"}
    assert run("--compare_with", "reconstruction")["scores"]["generated"] == report["scores"]["generated"]


def test_a_folder_of_captioned_images(run, latent_cache):
    report = run("--dataset", latent_cache.parent / "raw", "--max_samples", 5, "--contact_sheet", 2)
    assert report["data"]["folder"].endswith("raw") and report["data"]["n_samples"] == 5
    assert report["scores"]["generated"]["kid"] is not None


def test_agreement_with_few_captions_comes_with_chance_and_a_warning(run, caplog, capsys):
    report = run("--max_samples", 2)
    remark = "agreement with only 2 distinct captions: chance is 0.500, the same caption for all scores up"
    assert report["captions"]["remark"].startswith(remark) and remark in caplog.text
    assert report["scores"]["chance"]["agreement"] == 0.5
    assert "Few captions: agreement with only 2 distinct" in " ".join(capsys.readouterr().out.split())


def test_captions_that_are_all_equal_are_named(run, latent_cache, tmp_path, caplog, capsys):
    folder = shutil.copytree(latent_cache, tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in [entry for entries in manifest["entries"].values() for entry in entries]:
        entry["caption"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = run("--cached_dataset", folder)
    assert report["scores"]["generated"]["agreement"] is None and "shuffled" not in report["scores"]
    assert report["scores"]["generated"]["kid"] is not None
    assert "captions are empty" in report["captions"]["problem"] and "captions are empty" in caplog.text
    assert "No agreement" in capsys.readouterr().out


def test_flags_of_another_stage_are_refused(refused, image_cache, tmp_path):
    assert "--references: no effect on" in refused("--references", "jpeg")
    vae = save_checkpoint(tmp_path / "vae", image_cache)
    message = refused("--checkpoint", vae, "--curve", "--seed", "1")  # `run` gives --n_steps.
    assert f"--curve, --n_steps, --seed: no effect on {vae}, which is of stage 'image_vae'" in message


def test_flags_without_effect_are_refused(refused):
    assert "--curve_steps has no effect with curve=False" in refused("--curve_steps", 5)
    assert "--curve_scales is empty" in refused("--curve", "--curve_scales")


def test_latents_of_another_vae_are_refused(refused, latent_cache, tmp_path):
    folder = shutil.copytree(latent_cache, tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["vae_fingerprint"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "was made with vae_fingerprint='another'" in refused("--cached_dataset", folder)


def test_metrics_during_training(checkpoint, latent_cache):
    pipeline, settings = TextToImagePipeline.load(checkpoint), SamplingArguments(n_steps=1)
    train, held_out = (ImageLatentDataset(latent_cache, split) for split in ("train", "validation"))
    indices = list(range(len(held_out)))
    metrics = generation_metrics(pipeline, held_out, indices, settings=settings)
    assert metrics.keys() == {"frechet", "kid"}
    probe = train_probe(pipeline, train)
    again = generation_metrics(pipeline, held_out, indices, settings=settings, probe=probe, batch_size=3)
    assert again.keys() == {"frechet", "kid", "agreement", "agreement_chance", "words"}
    assert again["agreement_chance"] == 1 / len({entry["caption"] for entry in held_out.entries})
    assert again["kid"] == pytest.approx(metrics["kid"], rel=1e-4)


def test_rows_of_the_contact_sheet_have_different_captions():
    samples = [{"caption": caption} for caption in "aabbccdd"]
    assert distinct_captions(samples, 2) == [0, 4] and distinct_captions(samples, 9) == [0, 2, 4, 6]
    assert distinct_captions(samples, 0) == []


def test_latents_without_source_have_no_image(latent_cache):
    assert PairedLatentDataset(ImageLatentDataset(latent_cache, "train"))[0].keys() == {"mean", "index"}
