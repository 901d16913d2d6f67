"""evaluate.py on a small checkpoint: what it writes, and what it refuses."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from dataset_loading.image.pixels import ImageDataset
from model.image.vae import ImageVAE
from preprocess_image_vae_dataset import ImageVAEPreprocess
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.runs import changed
from tests.helpers.text_encoder_folder import save_torchscript
from utils.checkpoints import COMPLETE, EMA, STAGE, load_model, mark_complete
from utils.command_line import parse_arguments
from utils.metrics.images import psnr


@pytest.fixture(scope="module")
def checkpoint(image_cache, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "image_vae" / "small", image_cache)


@pytest.fixture(scope="module")
def report(checkpoint):
    return evaluate.main(["--checkpoint", str(checkpoint.parent), "--contact_sheet", "3", "--batch_size", "3"])


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(*words): evaluate two samples, which is quick, into `tmp_path`; returns the report."""
    words = ["--checkpoint", str(checkpoint), "--max_samples", "2", "--references", "--output_dir", str(tmp_path)]
    return lambda *more: evaluate.main(changed(words, *map(str, more)))


@pytest.fixture
def refused(run, caplog):
    """refused(*words): the message of an evaluation that ends with status 2."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2
        return caplog.text

    return call


def test_an_output_folder_gets_everything(run, checkpoint, tmp_path):
    before = sorted(checkpoint.parent.rglob("events*"))
    run()
    assert list(tmp_path.glob("events*")) and sorted(checkpoint.parent.rglob("events*")) == before


def test_the_report_is_in_the_run_folder_and_complete(report, checkpoint, image_cache):
    written = json.loads((checkpoint.parent / "metrics.json").read_text())
    assert written == report and written["step"] == 4 and written["weights"] == "ema"
    n_samples = len(ImageDataset(image_cache, "validation"))
    assert written["data"]["n_samples"] == n_samples and written["data"]["is_the_runs_own"]
    assert written["model"]["latent_shape"] == [16, 4, 4] and written["model"]["compression"] == 12.0
    assert written["scores"].keys() == {"model", "jpeg", "thumbnail"}
    assert written["definitions"].keys() >= {"psnr_db", "ssim", "perceptual", "frechet", "kid"}


def test_numbers_are_means_over_all_images(report, checkpoint, image_cache):
    dataset, model = ImageDataset(image_cache, "validation"), load_model(ImageVAE, checkpoint)
    image = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    with torch.no_grad():
        output = model(image=image)
    values = psnr(output.reconstruction, image)
    assert report["scores"]["model"]["psnr_db"] == pytest.approx(values.mean().item(), abs=1e-4)
    assert report["scores"]["model"]["psnr_db_lowest"] == pytest.approx(values.min().item(), abs=1e-4)
    assert report["latents"]["mean"] == pytest.approx(output.mean.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert all(math.isfinite(value) for score in report["scores"].values() for value in score.values())


def test_a_real_codec_scores_better_than_untrained_weights(report):
    model, jpeg = report["scores"]["model"], report["scores"]["jpeg"]
    for name in ("perceptual", "frechet", "kid"):
        assert jpeg[name] < model[name]
    assert jpeg["psnr_db"] > model["psnr_db"] and jpeg["ssim"] > model["ssim"]


def test_tensorboard_and_contact_sheet(report, checkpoint):
    events = EventAccumulator(str(checkpoint.parent)).Reload()
    (event,) = events.Scalars("evaluation_image_vae_validation_ema/psnr_db")
    assert event.step == 4 and event.value == pytest.approx(report["scores"]["model"]["psnr_db"], abs=1e-4)
    assert Image.open(checkpoint.parent / "contact_sheet.png").width > 6 * 128


def test_the_table_explains_itself(run, capsys):
    run()
    text = capsys.readouterr().out
    for phrase in (
        "this model",
        "PSNR dB",
        "(high)",
        "(low)",
        "read KID",
        "16x4x4",
        "12.0 x",
        "metrics.json",
    ):
        assert phrase in text


def test_two_samples_have_no_distance_of_sets(run, tmp_path):
    assert run("--contact_sheet", 8)["scores"]["model"]["kid"] is None
    assert {file.name.partition(".out")[0] for file in tmp_path.iterdir()} == {
        "metrics.json",
        "contact_sheet.png",
        "events",
    }


def test_features_of_a_file_are_compared_too(run, tmp_path, refused):
    plain = run("--max_samples", "6")
    file = save_torchscript(tmp_path / "network.pt")
    report = run("--max_samples", "6", "--features", file, "--references", "jpeg")
    assert report["features"]["width"] == 6 and list(report["features"]["sha256"]) == ["network.pt"]
    model, jpeg = (report["scores"][name] for name in ("model", "jpeg"))
    assert model.items() >= plain["scores"]["model"].items() and "features" not in plain
    assert 0 < jpeg["features_frechet"] < model["features_frechet"] and jpeg["features_kid"] < model["features_kid"]
    assert report["definitions"].keys() >= {"features_frechet", "features_kid"}
    assert run("--features", file)["scores"]["model"]["features_kid"] is None  # Of two images.
    assert "missing.pt does not exist" in refused("--features", tmp_path / "missing.pt")


def test_raw_weights(run):
    raw, averaged = run("--weights", "raw"), run()
    assert raw["weights"] == "raw" and raw["scores"]["model"]["psnr_db"] != averaged["scores"]["model"]["psnr_db"]


def test_bf16_changes_little(run):
    report, reference = run("--bf16"), run()
    assert report["precision"] == "bf16 autocast"
    difference = report["scores"]["model"]["psnr_db"] - reference["scores"]["model"]["psnr_db"]
    assert 0 < abs(difference) < 0.05


def test_a_folder_of_images(run, image_folder):
    data = run("--dataset", image_folder, "--max_samples", 2)["data"]
    assert data == {"folder": str(image_folder), "split": "", "fingerprint": None, "is_the_runs_own": False} | {
        "n_samples": 2
    }


def test_other_images_become_square_as_those_of_the_runs_data(image_folder, tmp_path, caplog):
    raw = tmp_path / "raw"
    raw.mkdir()
    Image.new("RGBA", (64, 32), (255, 0, 0, 0)).save(raw / "a.png")
    words = ["--image_size", 32, "--validation_fraction", 0.5, "--num_workers", 0, "--limit", 9]
    words += ["--dataset_name", image_folder, "--output_dir", tmp_path / "cache"]
    ImageVAEPreprocess.main([str(word) for word in [*words, "--resize_mode", "pad", "--background_color", "#0000ff"]])
    checkpoint = save_checkpoint(tmp_path / "run", tmp_path / "cache")
    common = ["--checkpoint", checkpoint, "--dataset", raw]

    def corner(*more):
        args = parse_arguments(evaluate.EvaluateArguments, [*map(str, [*common, *more])], "")
        return evaluate.build_evaluator(args).build_dataset()[0]["image"][:, [0, 16], [16, 16]].T.tolist()

    assert corner() == [[-1, -1, 1], [-1, -1, 1]]
    assert corner("--background_color", "lime", "--resize_mode", "squash") == [[-1, 1, -1]] * 2
    # Where it is gone, the usual treatment is named.
    shutil.rmtree(tmp_path / "cache")
    assert corner() == [[1, 1, 1]] * 2 and "resize_mode=crop, background_color=white" in caplog.text


def test_a_cache_of_another_size_is_refused_with_both(refused, image_folder, tmp_path):
    words = ["--dataset_name", image_folder, "--output_dir", tmp_path / "cache", "--image_size", 16, "--limit", 9]
    ImageVAEPreprocess.main([str(word) for word in [*words, "--validation_fraction", 0.5, "--num_workers", 0]])
    message = refused("--cached_dataset", tmp_path / "cache")
    assert "image_size=16" in message and "image_size=32" in message


def test_flags_without_effect_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--resize_mode", "pad")
    assert "--resize_mode has no effect with dataset=''" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--cached_dataset", "x", "--dataset", "y")
    assert "--dataset has no effect with cached_dataset='x'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([])
    assert "--checkpoint is missing" in capsys.readouterr().err


def test_absent_averaged_weights_are_refused_only_where_asked_for(image_cache, tmp_path, caplog):
    folder = save_checkpoint(tmp_path / "run", image_cache, with_average=False)
    words = ["--checkpoint", str(folder), "--max_samples", "1", "--references"]
    caplog.set_level("INFO")
    assert evaluate.main(words)["weights"] == "raw"
    assert "reconstructions and their metrics: 1 of 1 images in" in caplog.text
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--weights", "ema"])
    assert f"no averaged weights ({EMA})" in caplog.text


@pytest.fixture
def rewritten(checkpoint, tmp_path):
    """rewritten(name=value, ...): a copy of the checkpoint with another record."""

    def call(**changes):
        folder = shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
        record = json.loads((folder / STAGE).read_text())
        (folder / STAGE).write_text(json.dumps({**record, **changes}))
        (folder / COMPLETE).unlink()
        mark_complete(folder)
        return folder

    return call


def test_a_data_set_that_was_made_anew_is_named(rewritten, image_cache, caplog):
    folder = rewritten(data={"folder": str(image_cache), "fingerprint": "another"})
    report = evaluate.main(["--checkpoint", str(folder), "--max_samples", "1", "--references"])
    assert "was rebuilt since the run trained on it (fingerprint another" in caplog.text
    assert not report["data"]["is_the_runs_own"]


def test_a_stage_without_evaluator_is_refused(rewritten, caplog):
    folder = rewritten(stage="poetry")
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(folder)])
    assert "of stage 'poetry', which has no evaluator; known: image_vae" in caplog.text


def test_broken_weights_are_named(image_cache, tmp_path, caplog):
    folder = save_checkpoint(tmp_path / "run", image_cache, with_average=False)
    model = load_model(ImageVAE, folder)
    torch.nn.init.constant_(model.decoder.head.bias, float("nan"))
    model.save_pretrained(folder)
    (folder / COMPLETE).unlink()
    mark_complete(folder)
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(folder), "--max_samples", "1"])
    assert "values that are not finite" in caplog.text
