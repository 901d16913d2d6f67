"""One table with images, audio and texts, anything missing anywhere, to streams: two commands, then items by row."""

import json
import math

import pytest
import soundfile
import torch

from dataset_loading.audio.latents import AudioLatentDataset
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.multimodal import join_items
from preprocess_audio_diffusion_dataset import AudioDiffusionPreprocess
from tests.helpers.audio_latent_cache import save_audio_vae
from tests.helpers.latent_cache import make_latents, save_vae, write_captioned_images

N_ROWS = 24
LACKS = ({"audio"}, {"image"}, {"image", "audio"}, {"text"}, {"image", "audio", "text"}, set(), set())


def test_a_table_becomes_items_by_row(image_cache, tmp_path):
    write_captioned_images(tmp_path / "pictures", N_ROWS)
    (tmp_path / "sounds").mkdir()
    rows = []
    for number in range(N_ROWS):
        row = {"image": f"pictures/{number:03}.png", "audio": f"sounds/take {number}.wav", "text": f"text {number}"}
        rows.append({name: None if name in LACKS[number % len(LACKS)] else value for name, value in row.items()})
        wave = torch.sin(torch.arange(4800) * 2 * math.pi * (200 + 10 * number) / 16000)
        soundfile.write(tmp_path / row["audio"], 0.3 * wave.numpy(), 16000)
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    # Each command reads its own column, and skips the rows without.
    image_manifest = make_latents(table, save_vae(tmp_path / "image_vae", image_cache), tmp_path / "image")
    words = ["--dataset_name", str(table), "--vae_checkpoint", str(save_audio_vae(tmp_path / "audio_vae"))]
    words += ["--conditioning", "caption", "--num_workers", "0", "--validation_fraction", "0.1"]
    AudioDiffusionPreprocess.main([*words, "--output_dir", str(tmp_path / "audio")])
    mels = json.loads((tmp_path / "audio_mels" / "manifest.json").read_text())
    for kind, manifest in (("image", image_manifest), ("audio", mels)):
        lacking = {f"row-{number + 1:08d}" for number, row in enumerate(rows) if row[kind] is None}
        assert {entry["source"] for entry in manifest["skipped"]} == lacking and not manifest["broken"]
        assert {entry["reason"] for entry in manifest["skipped"]} == {f"the row has no {kind}"}
    # The rows come together again, in the same split.
    items = {}
    for split in ("train", "validation"):
        caches = {
            "image": ImageLatentDataset(tmp_path / "image", split),
            "audio": AudioLatentDataset(tmp_path / "audio", split),
        }
        items |= {item.key: item for item in join_items(caches)}  # type: ignore[arg-type]
    expected = {}
    for number, row in enumerate(rows):
        # A clip without a text is of no use: it is skipped too.
        names = {name for name in ("image", "audio") if row[name] and (row["text"] or name == "image")}
        if names:
            expected[f"row-{number + 1:08d}_0_0"] = (names, row["text"] or "")
    assert {key: (set(item.places), item.text) for key, item in items.items()} == expected


def test_a_column_that_is_not_there_is_an_error(image_cache, tmp_path, caplog):
    table = tmp_path / "table.csv"
    table.write_text("picture,text\na.png,one\n")
    with pytest.raises(SystemExit):
        make_latents(table, save_vae(tmp_path / "vae", image_cache), tmp_path / "image")
    assert "row 1 has no 'file_name'; its columns: picture, text" in caplog.text
