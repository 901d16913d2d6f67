"""Items joined from caches, tasks and rows; what does not fit together is refused with a remedy."""

import json

import pytest
import torch

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import MultimodalDataset, Task, collate_streams, join_items, parse_task
from dataset_loading.text.tokenizers import byte_tokenizer
from model.presets import MULTIMODAL
from tests.helpers.stream_caches import make_stream_caches, text_of
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


def build(folder, tasks, split="train", **fields):
    config = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny", **{**FIELDS, **fields})
    tasks = [parse_task(task) for task in tasks]
    is_training = split == "train"
    return MultimodalDataset(caches(folder, split), tasks, byte_tokenizer(), config=config, is_training=is_training)


def test_items_are_joined_by_the_names_of_their_sources(folder):
    items = {item.key: item for item in join_items(caches(folder))}
    assert len(items) == 14 and items["005_0_0"].text == text_of(5)
    places = {key: set(item.places) for key, item in items.items()}
    assert (
        places["001_0_0"] == {"image"} and places["005_0_0"] == {"image", "audio"} and places["017_0_0"] == {"audio"}
    )


def test_rows_are_items_in_tasks_by_weight(folder):
    data = build(folder, ["text-image:3", "audio-text", "image-text-audio:2", "text"])
    counts = [sum(task == number for _, task in data.rows) for number in range(4)]
    assert counts == [3 * 12, 11, 2 * 9, 14]  # 12 images, 11 clips, 9 items with both, 14 texts.
    held_out = build(folder, ["text-image:3", "audio-text"], "validation")
    assert [task for _, task in held_out.rows] == [0] * 4 + [1] * 4
    row = data[len(data) - 1]
    assert bytes(each - 2 for each in row["text"]).decode() == text_of(17) and "image" not in row
    assert row["other_text"] != row["text"] and data.entries[0] == {"key": "000_0_0", "caption": text_of(0)}


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
        ("text-image:0", "weight '0' must be a whole number"),
        ("text-image:x", "weight 'x' must"),
        ("text-text-image", "two parts of one modality"),
        ("", "'' is no modality"),
    ],
)
def test_wrong_tasks_are_explained(task, message):
    assert parse_task("text-image:3") == Task(("text", "image"), 3) and parse_task("text").name == "text"
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
