"""A dry run says what a run would be, and changes nothing on disk."""

from pathlib import Path

import pytest

from pretrain_audio_vae import AudioVAEStage
from pretrain_image_diffusion import ImageDiffusionStage
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from pretrain_recurrent_vae import RecurrentVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_cache import SMALL_VOCODER, make_audio_cache
from tests.helpers.mel_cache import SETTINGS, SMALL_AUDIO_VAE, write_mel_cache
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_RUN
from tests.helpers.text_cache import SMALL_TEXT, make_text

COMMON = {
    ImageVAEStage: SMALL_RUN,
    RecurrentVAEStage: SMALL_RUN,
    ImageDiffusionStage: [*SMALL_DIFFUSION, "--channel_weight_power", "1"],
    VocoderStage: SMALL_VOCODER,
    AudioVAEStage: SMALL_AUDIO_VAE,
    MultimodalStage: SMALL_TEXT,
}


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of everything in folders, by path."""
    paths = (path for folder in folders for path in [folder, *folder.rglob("*")])
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def cache_of(tmp_path, request):
    """cache_of(stage) -> a preprocessed data set for it."""

    def make(stage: type) -> Path:
        if stage is VocoderStage:
            return make_audio_cache(tmp_path / "caches" / "sound", 12)
        if stage is AudioVAEStage:
            return write_mel_cache(tmp_path / "caches" / "mels", SETTINGS)
        if stage is MultimodalStage:
            return make_text(tmp_path / "caches" / "text")
        return request.getfixturevalue("latent_cache" if stage is ImageDiffusionStage else "image_cache")

    return make


@pytest.mark.parametrize("stage", COMMON, ids=lambda stage: stage.name)
def test_a_dry_run_counts_and_leaves_the_disk_as_it_was(stage, cache_of, tmp_path, capsys, monkeypatch, fresh_logging):
    cache = cache_of(stage)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = snapshot(tmp_path, cache.parent)
    words = ["--cached_dataset", str(cache), "--output_dir", str(tmp_path / "runs"), "--max_steps", "7", "--dry_run"]
    # The vocoder's set is smaller than its usual batch.
    batch = ["--batch_size", "8"] if stage is VocoderStage else []
    assert stage.main([*COMMON[stage], *words, *batch]) == {}
    assert snapshot(tmp_path, cache.parent) == before
    shown = capsys.readouterr().out
    for part in ("parameters: ", "samples: train ", "optimizer steps: 7", "GiB"):
        assert part in shown


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_dry_run_names_the_texts_that_a_run_would_tokenise(tokenizer, tmp_path, capsys, monkeypatch, fresh_logging):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one line\n" * 200)
    before = snapshot(tmp_path)
    words = ["--text_dataset", str(tmp_path / "text.txt"), "--tokenizer", tokenizer, "--cached_dataset", "tokens"]
    assert MultimodalStage.main([*SMALL_TEXT, *words, "--dry_run"]) == {}
    assert snapshot(tmp_path) == before
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to be prepared: ")]
    assert all(part in line for part in (str(tmp_path / "text.txt"), repr(tokenizer), "tokens"))


def test_a_dry_run_without_texts_is_refused_as_a_run_is(tmp_path, monkeypatch, fresh_logging):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        MultimodalStage.main([*SMALL_TEXT, "--cached_dataset", "nowhere", "--dry_run"])
    assert isinstance(end.value.__cause__, FileNotFoundError) and "nowhere" in str(end.value.__cause__)
