"""Shards of the stages that encode in batches: padding and roundings are those of one process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.pack import main
from preprocess_audio_diffusion_dataset import AudioDiffusionPreprocess
from preprocess_audio_vae_dataset import AudioVAEPreprocess
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from preprocess_image_diffusion_dataset import ImageDiffusionPreprocess
from tests.helpers.audio_latent_cache import make_audio_latents, save_audio_vae, write_spoken_cache
from tests.helpers.latent_cache import make_latents, save_vae, write_captioned_images
from tests.helpers.text_encoder_folder import save_text_encoder
from tests.helpers.vocoder_checkpoint import SMALL_MEL, write_sound
from utils.preprocessing.driver import Preprocess


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_shards(run: Callable[..., dict], stage: type[Preprocess], out: Path, n: int) -> list[Path]:
    """Run a stage as a whole and in `n` shards, join these, and compare every byte.

    Args: run: takes the flags that are added.
    Returns: the folders of the shards.
    """
    fingerprint, expected = run()["fingerprint"], contents(out)
    shutil.rmtree(out)
    shards = []
    for i in range(1, n + 1):
        run("--shard", f"{i}/{n}")
        shards.append(out.with_name(f"{out.name}.shard-{i}-of-{n}"))
    joined = stage.main(["--merge", *map(str, reversed(shards)), "--output_dir", str(out)])
    assert joined["fingerprint"] == fingerprint
    files = contents(out)
    different = [name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name)]
    assert not different, different
    return shards


def samples_in(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".pt")}


def test_image_latents_with_a_text_encoder(image_cache, tmp_path):
    raw, vae = write_captioned_images(tmp_path / "raw", 11), save_vae(tmp_path / "vae", image_cache)
    # A broken image of two captions, and others with one or two.
    (raw / "004.png").write_bytes(b"broken")
    (raw / "metadata.csv").unlink()
    captions = [["a red disc", "very long"] if i % 2 == 0 else ["caption"] for i in range(11)]
    rows = [json.dumps({"file_name": f"{i:03}.png", "text": texts}) for i, texts in enumerate(captions)]
    (raw / "metadata.jsonl").write_text("\n".join(rows))
    flags = ["--text_encoder", str(save_text_encoder(tmp_path / "encoder")), "--batch_size", "4", "--horizontal_flip"]
    flags += ["--max_broken_fraction", "0.5"]
    out = tmp_path / "out"
    check_shards(lambda *more: make_latents(raw, vae, out, *flags, *more), ImageDiffusionPreprocess, out, 3)


@pytest.mark.parametrize("through_vae", [False, True])
def test_audio_with_and_without_a_vae(through_vae, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for number in range(6):
        write_sound(raw / f"{number}.wav", 0.4 + 0.13 * number)
    stage = AudioVocoderPreprocess if through_vae else AudioVAEPreprocess
    words = ["--dataset_name", str(raw), "--output_dir", str(out), "--num_workers", "0", "--segment_seconds", "0.8"]
    if through_vae:
        words += ["--through_vae", str(save_audio_vae(tmp_path / "vae", settings=SMALL_MEL)), "--batch_size", "2"]
    check_shards(lambda *more: stage.main([*words, *more]), stage, out, 2)


def test_speech_latents_of_an_audio_cache(tmp_path, caplog):
    mels, vae, out = write_spoken_cache(tmp_path / "mels", 12), save_audio_vae(tmp_path / "vae"), tmp_path / "out"
    run = lambda *more: make_audio_latents(mels, vae, out, "--batch_size", "4", *more)  # noqa: E731
    check_shards(run, AudioDiffusionPreprocess, out, 2)
    # A packed audio cache gives the same latents.
    main([str(mels), str(tmp_path / "packed"), "--pack", "5"])
    make_audio_latents(tmp_path / "packed", vae, tmp_path / "same", "--batch_size", "4")
    assert samples_in(tmp_path / "same") == samples_in(out) != {}
    # So do packed latents as a data set.
    main([str(out), str(tmp_path / "packed_latents"), "--pack", "5"])
    plain, packed = (AudioLatentDataset(folder, "train") for folder in (out, tmp_path / "packed_latents"))
    assert packed.speakers == plain.speakers == ["ann", "bob"] and packed.lengths == plain.lengths
    for first, second in zip(plain, packed, strict=True):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    # A raw data set would give every shard an aligner of its own.
    with pytest.raises(SystemExit):
        AudioDiffusionPreprocess.main(["--dataset_name", "x", "--vae_checkpoint", str(vae), "--shard", "1/2"])
    assert "a shard (1/2) needs --audio_cache" in caplog.text


def test_another_aligner_is_named(tmp_path, caplog):
    mels, vae = write_spoken_cache(tmp_path / "mels", 12), save_audio_vae(tmp_path / "vae")
    shards = []
    for i, units in ((1, "phonemes"), (2, "characters")):
        make_audio_latents(mels, vae, tmp_path / units, "--units", units, "--shard", f"{i}/2")
        shards.append(str(tmp_path / f"{units}.shard-{i}-of-2"))
    with pytest.raises(SystemExit):
        AudioDiffusionPreprocess.main(["--merge", *shards, "--output_dir", str(tmp_path / "out")])
    assert "aligner_fingerprint=" in caplog.text and "units='phonemes' there, 'characters' now" in caplog.text
    settings = json.loads((tmp_path / "phonemes.shard-1-of-2/manifest.json").read_text())["settings"]
    assert settings["aligner_fingerprint"] in caplog.text
