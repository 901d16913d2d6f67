import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertModel

from dataset_loading.cached import CachedDataset
from preprocess_image_diffusion_dataset import ImageDiffusionPreprocess
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.latent_cache import CAPTIONS, make_latents, save_vae, write_captioned_images
from tests.helpers.processes import has_files, run_until
from tests.helpers.text_encoder_folder import save_text_encoder, text_of
from utils.generation.latents import load_vae, vae_fingerprint

# Two units in the last place of float16, which has 10 stored bits: half a unit for rounding, and one for a value that
# a GPU or another batch size moved across the boundary between two neighbours.
RTOL = 2**-9


@pytest.fixture(scope="module")
def vae(image_cache, tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "run", image_cache)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_captioned_images(tmp_path_factory.mktemp("raw") / "images", 40)


def samples(folder):
    """All samples of a folder by the name of the image."""
    data = [CachedDataset(folder, split) for split in ("train", "validation")]
    return {entry["source"]: (entry, part[i]) for part in data for i, entry in enumerate(part.entries)}


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.pt")}


def load_image(raw, name):
    return torch.from_numpy(np.array(Image.open(raw / name))).permute(2, 0, 1)[None] / 127.5 - 1


def test_a_file_holds_the_standardised_posterior_of_its_image_and_the_caption(raw, vae, tmp_path):
    manifest = make_latents(raw, vae, tmp_path / "out", "--horizontal_flip", "--max_tokens", "30")
    model, found = load_vae(vae), samples(tmp_path / "out")
    mean_of, std_of = model.latent_mean.view(-1, 1, 1), model.latent_std.view(-1, 1, 1)
    for name, (entry, sample) in found.items():
        assert set(sample) == {"mean", "std", "flipped_mean", "flipped_std", "tokens", "index"}
        for prefix, image in (("", load_image(raw, name)), ("flipped_", load_image(raw, name).flip(-1))):
            with torch.no_grad():
                mean, logvar = model.encode(image)
            stored_mean, stored_std = sample[f"{prefix}mean"], sample[f"{prefix}std"]
            assert stored_mean.dtype == stored_std.dtype == torch.float16
            assert torch.allclose(stored_mean.float(), (mean[0] - mean_of) / std_of, rtol=RTOL, atol=1e-6)
            assert torch.allclose(stored_std.float(), (logvar[0] / 2).exp() / std_of, rtol=RTOL, atol=1e-6)
        assert sample["tokens"].dtype == torch.int16 and sample["tokens"][0] == 1
        assert text_of(sample["tokens"].tolist()) == entry["caption"][:29] and len(sample["tokens"]) <= 30
        assert entry["length"] == len(sample["tokens"])
    assert len(found) == 40 and {entry["caption"] for entry, _ in found.values()} == set(CAPTIONS)
    assert not torch.equal(found["000.png"][1]["mean"], found["001.png"][1]["mean"])
    counts = {reason: group["count"] for reason, group in manifest["left_out"].items()}
    assert counts == {
        "with a caption cut at 30 tokens (--max_tokens)": 10,
        "without a text, though others have one": 10,
    }
    settings = manifest["settings"]
    assert settings["latent_shape"] == [16, 4, 4] and settings["image_size"] == 32
    assert settings["vae_fingerprint"] == vae_fingerprint(vae) and settings["vae_checkpoint"] == str(vae)
    assert (settings["text_encoder"], settings["text_embedding_width"]) == ("", 0)


def test_workers_and_resuming_change_no_byte_and_batches_only_roundings(raw, vae, tmp_path):
    flags = ("--horizontal_flip", "--batch_size", "7")
    make_latents(raw, vae, tmp_path / "0", *flags)
    whole = contents(tmp_path / "0")
    make_latents(raw, vae, tmp_path / "2", *flags, "--num_workers", "2")
    assert contents(tmp_path / "2") == whole and len(whole) == 40
    for name in sorted(whole)[::3]:
        (tmp_path / "2" / name).unlink()
    make_latents(raw, vae, tmp_path / "2", *flags)
    assert contents(tmp_path / "2") == whole
    make_latents(raw, vae, tmp_path / "single", "--horizontal_flip", "--batch_size", "1")
    single = samples(tmp_path / "single")
    for name, (_, sample) in samples(tmp_path / "0").items():
        assert torch.allclose(sample["std"], single[name][1]["std"], rtol=RTOL, atol=1e-6)


def test_a_killed_run_goes_on(vae, tmp_path):
    raw, out = write_captioned_images(tmp_path / "raw", 100), tmp_path / "out"
    flags = ("--batch_size", "1", "--horizontal_flip")
    make_latents(raw, vae, tmp_path / "whole", *flags)
    run_until(has_files(out / "train", 10), signal.SIGKILL, target=make_latents, args=(raw, vae, out, *flags))
    written = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    assert 10 <= len(written) < 100 and not (out / "manifest.json").exists()
    make_latents(raw, vae, out, *flags)
    assert contents(out) == contents(tmp_path / "whole")
    kept = [name for name, when in written.items() if (out / name).stat().st_mtime_ns == when]
    assert len(kept) >= len(written) - 1  # The last sample may not have reached the journal.


def test_broken_and_small_images_are_reported_and_left_out(vae, tmp_path):
    raw = write_captioned_images(tmp_path / "raw", 12)
    (raw / "003.png").write_bytes(b"no image")
    Image.new("RGB", (100, 10)).save(raw / "005.png")
    manifest = make_latents(raw, vae, tmp_path / "out", "--max_broken_fraction", "0.1", "--batch_size", "3")
    assert [one["source"] for one in manifest["broken"]] == ["003.png"]
    assert [one["source"] for one in manifest["skipped"]] == ["005.png"]
    assert len(samples(tmp_path / "out")) == 10


def test_the_same_vae_elsewhere_is_the_same_cache_and_another_one_is_refused(raw, vae, image_cache, tmp_path, caplog):
    first = make_latents(raw, vae, tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.copytree(vae, tmp_path / "moved" / vae.name)
    second = make_latents(raw, tmp_path / "moved", tmp_path / "out")
    assert second["fingerprint"] == first["fingerprint"] and contents(tmp_path / "out") == before
    assert second["settings"]["vae_checkpoint"] == str(tmp_path / "moved")
    other = save_vae(tmp_path / "other", image_cache, latent_mean=0.3)
    with pytest.raises(SystemExit):
        make_latents(raw, other, tmp_path / "out")
    message = caplog.text
    assert f"vae_fingerprint='{vae_fingerprint(vae)}' there, '{vae_fingerprint(other)}' now" in message
    assert first["fingerprint"] in message and "Choose another --output_dir" in message
    assert contents(tmp_path / "out") == before


def test_the_vae_stays_with_its_latents(raw, vae, image_cache, tmp_path, caplog):
    """The run of the VAE goes on and deletes the checkpoint; the same command names the copy, which goes on."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(vae, run / "checkpoint-4")
    first = make_latents(raw, run, out, "--limit", "4", "--validation_fraction", "0")
    shutil.rmtree(run)
    save_vae(run, image_cache, latent_mean=0.3)
    with pytest.raises(SystemExit):
        make_latents(raw, run, out, "--limit", "8", "--validation_fraction", "0")
    assert f"--vae_checkpoint {out / 'vae'}" in caplog.text
    second = make_latents(raw, out / "vae", out, "--limit", "8", "--validation_fraction", "0")
    assert second["settings_fingerprint"] == first["settings_fingerprint"] and len(second["entries"]["train"]) == 8
    assert vae_fingerprint(out / "vae") == vae_fingerprint(vae)
    assert {file.name for file in (out / "vae" / "checkpoint-4").iterdir()} == {
        *("COMPLETE.json", "README.md", "config.json", "ema.safetensors", "stage.json")
    }


def test_a_damaged_text_encoder_is_named(raw, vae, tmp_path, caplog):
    folder = save_text_encoder(tmp_path / "encoder")
    (folder / "model.safetensors").write_text("text")
    with pytest.raises(SystemExit) as caught:
        make_latents(raw, vae, tmp_path / "out", "--text_encoder", str(folder))
    assert caught.value.code == 2 and f"the text encoder {folder} cannot be loaded" in caplog.text


def test_other_sizes_and_precision(raw, vae, tmp_path):
    fingerprints, latents = [], []
    for name, *flags in (("fp32",), ("bf16", "--bf16"), ("large", "--image_size", "64")):
        manifest = make_latents(raw, vae, tmp_path / name, "--limit", "3", "--validation_fraction", "0", *flags)
        fingerprints.append(manifest["fingerprint"])
        latents.append(CachedDataset(tmp_path / name, "train")[0]["mean"])
    assert len(set(fingerprints)) == 3
    assert 0 < (latents[0] - latents[1]).abs().max() < 0.1
    assert manifest["settings"]["latent_shape"] == [16, 8, 8] == list(latents[2].shape)


def test_states_of_a_text_encoder_are_those_of_each_caption_alone(raw, vae, tmp_path):
    folder = save_text_encoder(tmp_path / "encoder")
    flags = ("--max_tokens", "9", "--batch_size", "6")
    manifest = make_latents(raw, vae, tmp_path / "out", "--text_encoder", str(folder), *flags)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    lengths = set()
    for entry, sample in samples(tmp_path / "out").values():
        ids = tokenizer(entry["caption"], truncation=True, max_length=9, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**ids).last_hidden_state[0]
        assert sample["text_states"].dtype == torch.bfloat16 and sample["text_states"].shape == states.shape
        assert torch.allclose(sample["text_states"].float(), states, rtol=2**-7, atol=1e-3)
        lengths.add(len(states))
    assert lengths == {2, 4, 5, 9}
    assert manifest["settings"]["text_embedding_width"] == 16
    assert manifest["settings"]["text_encoder"] == str(folder)
    shutil.copytree(folder, tmp_path / "moved")
    again = make_latents(raw, vae, tmp_path / "out", "--text_encoder", str(tmp_path / "moved"), *flags)
    assert again["fingerprint"] == manifest["fingerprint"]
    with pytest.raises(SystemExit):
        other = save_text_encoder(tmp_path / "other", seed=1)
        make_latents(raw, vae, tmp_path / "out", "--text_encoder", str(other), *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--vae_checkpoint is missing"),
        (["--vae_checkpoint", "x", "--num_augmented_copies", "2"], "--num_augmented_copies has no effect on latents"),
        (["--vae_checkpoint", "x", "--seed", "2"], "--seed has no effect"),
        (["--vae_checkpoint", "x", "--background_color", "wite"], "--background_color='wite': unknown color"),
        (["--vae_checkpoint", "x", "--max_tokens", "0"], "--max_tokens=0 must be > 0"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        ImageDiffusionPreprocess.main(["--dataset_name", "x", *flags])
    assert message in capsys.readouterr().err


def test_unfit_checkpoints_and_sizes_are_refused(raw, vae, image_cache, tmp_path, caplog):
    unmeasured = save_checkpoint(tmp_path / "unmeasured", image_cache)
    cases = {
        (tmp_path / "gone",): "the folder does not exist",
        (unmeasured,): "has no latent statistics",
        (vae, "--vae_config", "small"): "was trained with preset 'tiny', not 'small'",
        (vae, "--image_size", "36"): "image_size=36 is not divisible by the compression 8",
        (vae, "--text_encoder", str(tmp_path / "gone")): "gone",
    }
    for (checkpoint, *flags), message in cases.items():
        caplog.clear()
        with pytest.raises(SystemExit) as caught:
            make_latents(raw, checkpoint, tmp_path / "out", *flags)
        assert caught.value.code == 2 and message in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_changed_caption_is_encoded_again(raw, vae, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(raw, images)
    make_latents(images, vae, tmp_path / "out")
    table = images / "metadata.csv"
    table.write_text(table.read_text().replace("000.png,a red disc", "000.png,a blue disc"))
    before = contents(tmp_path / "out")
    manifest = make_latents(images, vae, tmp_path / "out")
    entry, sample = samples(tmp_path / "out")["000.png"]
    assert entry["caption"] == text_of(sample["tokens"].tolist()) == "a blue disc"
    after = contents(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == [
        f"{split}/{one['key']}.pt"
        for split, part in manifest["entries"].items()
        for one in part
        if one["source"] == "000.png"
    ]


def test_a_source_without_captions_is_refused(vae, tmp_path):
    raw = write_captioned_images(tmp_path / "raw", 3)
    (raw / "metadata.csv").unlink()
    with pytest.raises(SystemExit):
        make_latents(raw, vae, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    for number in range(3):
        (raw / f"{number:03}.txt").write_text(f"number {number}")
    entries = make_latents(raw, vae, tmp_path / "out")["entries"]
    assert {entry["caption"] for split in entries.values() for entry in split} == {"number 0", "number 1", "number 2"}
