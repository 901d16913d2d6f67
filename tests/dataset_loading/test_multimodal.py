"""Items joined from caches, tasks and rows; what does not fit together is refused with a remedy."""

import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import MultimodalDataset, Task, collate_streams, join_items, parse_task, torn_items
from dataset_loading.text.tokenizers import byte_tokenizer
from dataset_loading.text.windows import TextDataset
from model.presets import MULTIMODAL
from tests.helpers.stream_caches import make_stream_caches, text_of
from tests.helpers.text_cache import make_text
from utils.configuration import MegaTransformerConfig
from utils.options import from_preset

FIELDS = {"image_size": 32, "audio_latent_channels": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams")
    make_stream_caches(path)
    return path


def caches(folder, split="train"):
    return {"image": ImageLatentDataset(folder / "image", split), "audio": AudioLatentDataset(folder / "audio", split)}


def build(folder, tasks, split="train", windows=None, held_out=(), **fields):
    config = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny", **{**FIELDS, **fields})
    tasks = [parse_task(task) for task in tasks]
    is_training = split == "train"
    options = {"config": config, "is_training": is_training, "windows": windows, "held_out": held_out}
    return MultimodalDataset(caches(folder, split), tasks, byte_tokenizer(), **options)


def test_items_are_joined_by_the_names_of_their_sources(folder):
    items = {item.key: item for item in join_items(caches(folder))}
    assert len(items) == 14 and items["005_0_0"].text == text_of(5)
    places = {key: set(item.places) for key, item in items.items()}
    assert (
        places["001_0_0"] == {"image"} and places["005_0_0"] == {"image", "audio"} and places["017_0_0"] == {"audio"}
    )


def fake_cache(folder, *entries):
    """A cache of entries `(source, text)`."""
    rows = [{"key": f"{n}", "source": source, "caption": text} for n, (source, text) in enumerate(entries)]
    return SimpleNamespace(folder=folder, entries=rows)


def test_entries_of_one_source_are_items_of_their_own():
    images = fake_cache("images", ("a.png", "red"), ("a.png", "big"), ("b.png", "x"), ("a.png", "red"))
    sounds = fake_cache("sounds", ("a.wav", "big"), ("b.wav", ""), ("a.wav", "red"), ("a.wav", "old"))
    expected = [
        ("a_0_0", "red", {"image": 0, "audio": 2}),
        ("a_0_0_2", "big", {"image": 1, "audio": 0}),
        ("a_0_0_3", "red", {"image": 3}),
        ("a_0_0_4", "old", {"audio": 3}),
        ("b_0_0", "x", {"image": 2, "audio": 1}),
    ]
    items = join_items({"image": images, "audio": sounds})
    assert [(item.key, item.text, item.places) for item in items] == expected
    alone = join_items({"audio": fake_cache("sounds", ("a.wav", "big"), ("a.wav", ""), ("a.wav", ""))})
    assert [(item.text, item.places["audio"]) for item in alone] == [("big", 0), ("", 1), ("", 2)]
    with pytest.raises(ValueError, match="sounds: 'a' has the text 'low', but in images it is 'red'"):
        join_items({"image": images, "audio": fake_cache("sounds", ("a.wav", "low"), ("a.wav", "high"))})


def test_only_the_endings_of_files_are_no_part_of_a_name():
    images = fake_cache("images", ("v1.5_take.png", "a"), ("v1.6_take.JPG", "b"), ("no.1", "c"))
    sounds = fake_cache("sounds", ("v1.6_take.wav", "b"), ("v1.5_take.flac", "a"), ("no.2", "d"))
    items = join_items({"image": images, "audio": sounds})
    assert [(item.text, item.places) for item in items] == [
        ("a", {"image": 0, "audio": 1}),
        ("b", {"image": 1, "audio": 0}),
        ("c", {"image": 2}),
        ("d", {"audio": 2}),
    ]


def test_items_that_one_cache_holds_out_are_found():
    training = {"image": fake_cache("i", ("a.png", ""), ("b.png", ""), ("1.png", ""))}
    training["audio"] = fake_cache("s", ("b.wav", ""), ("c.wav", ""), ("1.wav", ""))
    held_out = {"image": fake_cache("i", ("c.png", ""), ("1.png", ""))}
    held_out["audio"] = fake_cache("s", ("a.wav", ""), ("d.wav", ""), ("1.wav", ""))
    # Both caches have 1 in both splits: different things of the same name.
    assert torn_items(training, held_out) == {"a", "c"}
    assert not torn_items({"image": training["image"]}, {"image": held_out["image"]})


def test_held_out_items_come_in_no_row(folder):
    whole, without = build(folder, ["text"]), build(folder, ["text"], held_out={"001"})
    assert {item.key for item in whole.items} - {item.key for item in without.items} == {"001_0_0"}
    assert len(without) == len(whole) - 1 and without.fingerprint != whole.fingerprint


def test_rows_are_items_in_tasks_by_weight(folder):
    data = build(folder, ["text-image:3", "audio-text", "image-text-audio:2", "text"])
    counts = [sum(task == number for _, task in data.rows) for number in range(4)]
    assert counts == [3 * 12, 11, 2 * 9, 14]  # 12 images, 11 clips, 9 items with both, 14 texts.
    held_out = build(folder, ["text-image:3", "audio-text"], "validation")
    assert [task for _, task in held_out.rows] == [0] * 4 + [1] * 4
    row = data[len(data) - 1]
    assert bytes(each - 2 for each in row["text"]).decode() == text_of(17) and "image" not in row
    assert data.entries[0] == {"key": "000_0_0", "caption": text_of(0)}
    # The text of another item is there for evaluation alone.
    assert "other_text" not in row and held_out[0]["other_text"] != held_out[0]["text"]


def test_weights_may_be_fractions(folder):
    data = build(folder, ["text-image:0.25", "audio-text:1.5"])
    chosen = [[data.items[place].key for place, task in data.rows if task == number] for number in range(2)]
    assert len(chosen[0]) == 3 and len(set(chosen[0])) == 3  # Every fourth of 12.
    assert len(chosen[1]) == 16 and len(set(chosen[1])) == 11  # Every second of 11 twice.
    with pytest.raises(ValueError, match=r"text-image:0\.05 gives no row of 12 items.*raise the weight to 0\.083"):
        build(folder, ["text-image:0.05"])


def test_items_that_come_in_no_row_are_counted_and_named(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    build(folder, ["text-audio"])
    assert "3 of 14 items come in no row of --tasks: 000_0_0 lacks audio; 001_0_0 lacks audio; 002" in caplog.text
    make_stream_caches(tmp_path)
    for name in ("image", "audio"):
        manifest = tmp_path / name / "manifest.json"
        content = json.loads(manifest.read_text())
        content["entries"]["train"][-1]["caption"] = " "
        manifest.write_text(json.dumps(content))
    caplog.clear()
    data = build(tmp_path, ["text-image", "text-audio"])
    assert "come in no row of --tasks: 017_0_0 lacks text, image" in caplog.text
    assert len(data) == 12 + 10 and all(data.texts[item] for item, _ in data.rows)


def test_a_few_streams_that_are_too_long_are_left_out(tmp_path, caplog):
    make_stream_caches(tmp_path, 40)
    manifest = tmp_path / "audio" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["entries"]["train"][0]["length"] = 400
    manifest.write_text(json.dumps(content))
    data = build(tmp_path, ["audio-text", "text-image"], audio_max_tokens=8)
    n_clips = len(data.caches["audio"])
    assert len(data) == len(data.lengths) == n_clips - 1 + len(data.caches["image"]) and n_clips > 20
    assert f"1 of {len(data) + 1} streams are too long and are left out, the first: 004_0_0: a span" in caplog.text
    # Not where nothing else is left of a task.
    with pytest.raises(ValueError, match=r"audio has \d tokens.*audio_max_tokens=2"):
        build(tmp_path, ["audio-text:0.04", "text-image", "image-text", "text"], audio_max_tokens=2)


def test_windows_of_text_are_rows_of_the_task_text(folder, tmp_path):
    texts = make_text(tmp_path / "texts", 20)
    windows = TextDataset(texts, "train", 24)
    data = build(folder, ["text-image", "text:2"], windows=windows)
    assert len(data) == 12 + 2 * len(windows) and data.lengths[-1] == 24 and data.lengths[0] < 60
    row, window = data[len(data) - 1], windows[len(windows) - 1]
    n_tokens = int((window["segment_ids"] >= 0).sum())
    assert 1 < n_tokens <= 24 and row["text"] == window["input_ids"][:n_tokens].tolist()
    assert row["documents"] == window["segment_ids"][:n_tokens].tolist() and row["n_bytes"] == window["n_bytes"]
    assert data.entries[-1] == {"key": f"train-{len(windows) - 1:08d}", "caption": ""}
    batch = collate_streams([data[0], row])
    assert batch["documents"] == [None, row["documents"]] and batch["n_bytes"].tolist() == [0, int(row["n_bytes"])]
    assert data.fingerprint not in (
        build(folder, ["text-image", "text:2"]).fingerprint,
        build(folder, ["text-image", "text:2"], windows=TextDataset(texts, "train", 16)).fingerprint,
    )
    with pytest.raises(ValueError, match=r"texts gives a stream of 24 tokens.*max_position_embeddings=20"):
        build(folder, ["text:2"], windows=windows, max_position_embeddings=20, audio_max_tokens=8)


def test_rows_hold_latents_as_tokens(folder):
    data = build(folder, ["image-text-audio"])
    row = data[0]
    item, _ = data.rows[0]
    sample = data.caches["image"][data.items[item].places["image"]]
    assert row["image"].shape == (2, 4, 64) and torch.equal(row["image"][0, 0], sample["mean"][:, :2, :2].flatten())
    clip = data.caches["audio"][data.items[item].places["audio"]]
    assert row["audio"].shape == (2, -(-len(clip["mean"]) // 4), 20)
    assert torch.equal(row["audio"][1].flatten()[: clip["std"].numel()], clip["std"].flatten())


def test_batches_say_which_row_latents_belong_to(folder):
    data = build(folder, ["text-image", "text-audio"])
    rows = [data[0], data[len(data) - 1], data[1], data[len(data) - 2]]
    batch = collate_streams(rows)
    assert batch["image"]["rows"].tolist() == [0, 2] and batch["audio"]["rows"].tolist() == [1, 3]
    assert batch["text"] == [row["text"] for row in rows] and batch["task"].tolist() == [0, 1, 0, 1]
    for number, row, length in zip((0, 1), (1, 3), batch["audio"]["lengths"].tolist()):
        assert torch.equal(batch["audio"]["latents"][number, :, :length], rows[row]["audio"])
        assert batch["audio"]["latents"][number, :, length:].abs().sum() == 0
    assert "audio" not in collate_streams(rows[::2])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("text-pictures", "'pictures' is no modality"),
        ("text-image:0", "weight '0' must be a number above 0"),
        ("text-image:-1", "weight '-1' must be a number above 0"),
        ("text-image:0.0", "weight '0.0' must be a number above 0"),
        ("text-image:x", "weight 'x' must"),
        ("text-text-image", "two parts of one modality"),
        ("", "'' is no modality"),
    ],
)
def test_wrong_tasks_are_explained(task, message):
    assert parse_task("text-image:3") == Task(("text", "image"), Fraction(3)) and parse_task("text").name == "text"
    with pytest.raises(ValueError, match=message):
        parse_task(task)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"audio has \d tokens.*audio_max_tokens=2.*--override audio_max_tokens"):
        build(folder, ["audio-text"], audio_max_tokens=2)
    with pytest.raises(ValueError, match=r"--override max_position_embeddings=\d+"):
        build(folder, ["audio-text"], max_position_embeddings=24, audio_max_tokens=8)
    # Another text of the same source, and caches without a common item.
    make_stream_caches(tmp_path)
    manifest = tmp_path / "audio" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["entries"]["train"][1]["caption"] = "something else"
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'005' has the text 'something else'.*but in .*image"):
        join_items(caches(tmp_path))
    for entry in content["entries"]["train"]:
        entry["source"] = "other_" + entry["source"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"--tasks image-text-audio: no item in .*image.*audio has "):
        build(tmp_path, ["image-text-audio"])
