"""A packed cache in a bucket trains as the cache with a file per sample that it was packed from."""

import fsspec
import pytest

import evaluate
from dataset_loading.image.pixels import ImageDataset
from dataset_loading.pack import convert
from dataset_loading.remote import local_path
from pretrain_image_vae import ImageVAEStage
from tests.helpers.runs import SMALL_RUN, run_stage

URL = "memory://caches/packed"


@pytest.fixture
def bucket(image_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(image_cache, tmp_path / "packed", 7)
    system = fsspec.filesystem("memory")
    for file in (tmp_path / "packed").rglob("*"):
        if file.is_file():
            system.pipe_file(f"/caches/packed/{file.relative_to(tmp_path / 'packed')}", file.read_bytes())
    yield
    system.rm("/caches", recursive=True)


def test_training_and_evaluation_of_a_packed_cache_in_a_bucket(bucket, image_cache, tmp_path, capsys):
    flags = ["--batch_size", "4", "--max_steps", "2"]
    plain = run_stage(ImageVAEStage, SMALL_RUN, image_cache, tmp_path / "runs", "plain", 2, *flags[:2])
    packed = run_stage(ImageVAEStage, SMALL_RUN, URL, tmp_path / "runs", "packed", 2, *flags[:2])
    assert packed.losses == plain.losses and ImageDataset(local_path(URL), "train").packs
    words = ["--checkpoint", str(packed.folder), "--cached_dataset", URL, "--max_samples", "2"]
    places = [["--output_dir", str(tmp_path / name)] for name in ("results", "plain_results")]
    scores = evaluate.main([*words, "--remote_cache_gb", "0.001", *places[0]])["scores"]
    words[3] = str(image_cache)
    assert scores == evaluate.main([*words, *places[1]])["scores"]
    # The limit is for such a cache alone.
    with pytest.raises(SystemExit):
        ImageVAEStage.main([*SMALL_RUN, "--cached_dataset", str(image_cache), "--remote_cache_gb", "1", "--dry_run"])
    assert "--remote_cache_gb has no effect with cached_dataset" in capsys.readouterr().err
