"""Audio latents as items and batches, refusals of other VAEs, and batches of like length."""

import json
import shutil

import pytest
import torch

from dataset_loading.audio.latents import (
    AudioLatentDataset,
    FrameBudgetSampler,
    collate_audio_latents,
    draw_latents,
    latent_settings,
)
from dataset_loading.cache_writer import save_tensors
from tests.helpers.audio_latent_cache import make_audio_latents, save_audio_vae, write_spoken_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio_latents")
    vae = save_audio_vae(folder / "vae")
    make_audio_latents(write_spoken_cache(folder / "mels"), vae, folder / "speech")
    make_audio_latents(folder / "mels", vae, folder / "caption", "--conditioning", "caption", "--max_tokens", "9")
    return folder


def test_items_have_channels_last_and_the_names_of_the_speakers(folder):
    data = AudioLatentDataset(folder / "speech", "train")
    item = data[1]
    assert item.keys() == {"mean", "std", "tokens", "durations", "n_mel_frames", "speaker", "index"}
    assert item["mean"].shape == item["std"].shape == (data.lengths[1], 5) and item["mean"].dtype == torch.float32
    assert item["tokens"].dtype == item["durations"].dtype == torch.int64
    assert item["durations"].sum() == item["n_mel_frames"] == data.entries[1]["mel_frames"]
    assert data.speakers == ["ann", "bob"] and item["speaker"] == 1 and data[0]["speaker"] == 0
    assert torch.equal(data.tokenizer.encode(data.entries[1]["caption"]).long(), item["tokens"])


def test_a_padded_batch_holds_each_item_and_zeros(folder):
    data = AudioLatentDataset(folder / "speech", "train")
    items = [data[i] for i in (0, 3, 4)]
    batch = collate_audio_latents(items, frames_multiple=16)
    assert batch["latents"].shape[1] % 16 == 0 and batch["latents"].shape[1] - max(len(i["mean"]) for i in items) < 16
    for b, item in enumerate(items):
        L, T = len(item["mean"]), len(item["tokens"])
        assert (batch["n_latent_frames"][b], batch["n_tokens"][b]) == (L, T)
        assert torch.equal(batch["latents"][b, :L], item["mean"]) and not batch["latents"][b, L:].any()
        assert torch.equal(batch["latents_std"][b, :L], item["std"]) and not batch["latents_std"][b, L:].any()
        assert batch["latent_mask"][b, :L].all() and not batch["latent_mask"][b, L:].any()
        assert torch.equal(batch["tokens"][b, :T], item["tokens"]) and not batch["tokens"][b, T:].any()
        assert torch.equal(batch["durations"][b, :T], item["durations"]) and not batch["durations"][b, T:].any()
    assert batch["index"].tolist() == [0, 3, 4] and batch["speakers"].tolist() == [0, 1, 0]
    latents = draw_latents(batch, torch.ones_like(batch["latents"]))
    assert torch.equal(latents[0, :5], items[0]["mean"][:5] + items[0]["std"][:5])


def test_captions_are_padded_with_their_lengths(folder):
    data = AudioLatentDataset(folder / "caption", "train")
    assert data.conditioning == "caption" and data.tokenizer is None
    batch = collate_audio_latents([data[0], data[3]])
    assert batch["n_caption"].tolist() == [9, 8] == [len(data[i]["caption_tokens"]) for i in (0, 3)]
    assert batch["caption_tokens"].shape == (2, 9) and "durations" not in batch
    states = [{**data[i], "caption_states": torch.ones(2 + i, 4).bfloat16()} for i in (0, 3)]
    states = [{name: value for name, value in row.items() if name != "caption_tokens"} for row in states]
    batch = collate_audio_latents(states)
    assert batch["caption_states"].shape == (2, 5, 4) and batch["n_caption"].tolist() == [2, 5]
    assert not batch["caption_states"][0, 2:].any()


def test_another_vae_is_refused_with_the_command(folder):
    data = AudioLatentDataset(folder / "speech", "train")
    right = data.manifest["settings"]["vae_fingerprint"]
    assert data.expect(vae_fingerprint=right, conditioning="speech", latent_channels=5) is data
    with pytest.raises(ValueError, match="vae_fingerprint='0123'") as caught:
        data.expect(vae_fingerprint="0123", vae_checkpoint="runs/audio_vae/other")
    assert "preprocess_audio_diffusion_dataset.py" in str(caught.value)
    assert "--vae_checkpoint runs/audio_vae/other" in str(caught.value)
    with pytest.raises(ValueError, match="--conditioning caption"):
        data.expect(conditioning="caption")


@pytest.fixture
def copy(folder, tmp_path):
    """copy(conditioning) -> a folder of latents to damage."""
    return lambda conditioning: shutil.copytree(folder / conditioning, tmp_path / conditioning)


@pytest.mark.parametrize(
    ("conditioning", "name", "wrong"),
    [
        ("speech", "mean", torch.zeros(5, 3).half()),
        ("speech", "std", torch.zeros(1)),
        ("speech", "tokens", torch.zeros(2, 3, dtype=torch.int16)),
        ("speech", "durations", torch.zeros(3)),
        ("speech", "n_mel_frames", torch.zeros(2, dtype=torch.int64)),
        ("caption", "caption_tokens", torch.zeros(2, 2)),
    ],
)
def test_missing_and_wrong_tensors_are_named(copy, conditioning, name, wrong):
    latents = copy(conditioning)
    data = AudioLatentDataset(latents, "train")
    file = data.path_of(data.entries[0])
    sample = torch.load(file)
    rest = {other: tensor for other, tensor in sample.items() if other != name}
    for content, reason in ((rest, f"lacks '{name}'"), ({**rest, name: wrong}, f"'{name}' is")):
        save_tensors(file, content)
        remedy = "delete it and run: python preprocess_audio_diffusion_dataset.py"
        with pytest.raises(ValueError, match=rf"{file} is damaged \(.*{reason}.*{remedy}"):
            data[0]
    content = bytearray(next(latents.glob(f"train/{data.entries[1]['key']}.pt")).read_bytes())
    content[len(content) // 2] ^= 1
    data.path_of(data.entries[1]).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{data.entries[1]['key']}.pt is damaged"):
        data[1]


def changed_setting(*names, value=None):
    """Changes a manifest: the setting with this path is another value, or gone."""

    def change(manifest):
        place = manifest["settings"]
        for name in names[:-1]:
            place = place[name]
        place.pop(names[-1]) if value is None else place.update({names[-1]: value})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_setting("latent_channels"), "settings lacks 'latent_channels'"),
        (changed_setting("mel_frames_per_latent", value="2"), "settings.mel_frames_per_latent='2' must be int"),
        (changed_setting("vae_fingerprint"), "settings lacks 'vae_fingerprint'"),
        (changed_setting("mel", value=[1]), r"settings.mel=\[1\] must be dict"),
        (changed_setting("conditioning", value="song"), "settings.conditioning='song' must be 'speech' or 'caption'"),
        (changed_setting("tokenizer"), "settings lacks 'tokenizer'"),
        (changed_setting("tokenizer", "symbols", value="ab"), "settings.tokenizer.symbols='ab' must be list"),
        (changed_setting("tokenizer", "symbols", value=["a"]), "settings.tokenizer: symbols="),
        (changed_setting("tokenizer", "tune", value=1), "settings.tokenizer: .*'tune'"),
        (lambda manifest: manifest["entries"]["train"][1].pop("speaker"), r"entries.train\[1\] lacks 'speaker'"),
        (
            lambda manifest: manifest["entries"]["train"][1].update(tokens=1.5),
            r"entries.train\[1\].tokens=1.5 must be int",
        ),
    ],
)
def test_a_damaged_manifest_is_named(copy, change, reason):
    file = copy("speech") / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \({reason}.*\); delete the folder and make it"):
        AudioLatentDataset(file.parent, "train")
    if "settings" in reason:
        with pytest.raises(ValueError, match=reason):
            latent_settings(file.parent)


LENGTHS = [10 + (i * 37) % 61 for i in range(203)]


def batches(**options):
    return FrameBudgetSampler(**{"lengths": LENGTHS, "frames_per_step": 400, "seed": 1, **options})


def test_batches_keep_the_budget_and_are_of_like_length():
    sampler = batches()
    epoch = list(sampler)
    assert len(sampler) == len(epoch)
    assert sorted(clip for batch in epoch for clip in batch) == list(range(len(LENGTHS)))
    padded = [len(batch) * max(LENGTHS[clip] for clip in batch) for batch in epoch]
    assert max(padded) <= 400 and sum(padded) > 0.8 * 400 * len(epoch)
    assert sum(LENGTHS) > 0.88 * sum(padded)


def test_an_epoch_is_a_function_of_seed_and_epoch_with_equal_steps():
    sampler = batches()
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1]
        assert sorted(map(len, epochs[-1])) == sorted(map(len, epochs[0])) and len(epochs[-1]) == len(sampler)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 4
    assert len({frozenset(batch) for epoch in epochs for batch in epoch}) > 3 * len(sampler)
    assert list(batches(seed=2)) != epochs[0]


@pytest.mark.parametrize("n_parts", [2, 3])
def test_a_step_has_the_same_clips_in_any_number_of_parts(n_parts):
    whole, dealt = list(batches()), list(batches(n_parts=n_parts))
    assert len(dealt) == n_parts * len(whole) == len(batches(n_parts=n_parts))
    for number, step in enumerate(whole):
        parts = dealt[n_parts * number :][:n_parts]
        assert sorted(clip for part in parts for clip in part) == sorted(step)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and all(parts)


def test_clips_that_are_too_long_are_left_out_with_a_warning(caplog):
    sampler = batches(frames_per_step=138, n_parts=2)
    too_long = [clip for clip, length in enumerate(LENGTHS) if length > 69]
    assert sampler.left_out == too_long and f"{len(too_long)} of 203 samples are longer than the 69" in caplog.text
    clips = [clip for batch in sampler for clip in batch]
    assert sorted([*clips, *too_long]) == list(range(len(LENGTHS)))


def test_too_few_clips_are_refused():
    with pytest.raises(ValueError, match="3 training samples cannot be dealt out to 4 micro-batches"):
        batches(lengths=[10, 20, 30], n_parts=4)
    with pytest.raises(ValueError, match="0 training samples"):
        batches(lengths=[500])
    assert len(batches(lengths=[10, 20, 30])) == 1
