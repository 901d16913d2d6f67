import io
import json
import shutil

import pytest
import torch

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.cache_writer import save_tensors, write_manifest
from dataset_loading.cached import CachedDataset
from dataset_loading.files import read_manifest
from dataset_loading.image.latents import ImageLatentDataset
from dataset_loading.image.pixels import ImageDataset
from tests.helpers.mel_cache import SETTINGS, write_mel_cache

COMMAND = ["preprocess_image_vae_dataset.py", "--dataset_name", "raw", "--image_size", "4", "--resize_mode", "pad"]


@pytest.fixture
def folder(tmp_path):
    """Three training images of 4x4 pixels: all 0, all 51, all 102; no validation."""
    entries = [
        {"key": f"k{i}", "source": f"{i}.png", "copy": 0, "caption": f"number {i}", "length": 4} for i in range(3)
    ]
    (tmp_path / "set/train").mkdir(parents=True)
    for i, entry in enumerate(entries):
        image = torch.full((3, 4, 4), 51 * i, dtype=torch.uint8)
        entry |= save_tensors(tmp_path / f"set/train/{entry['key']}.pt", {"image": image})
    (tmp_path / "set/progress.jsonl").touch()
    header = {
        "schema": 1,
        "stage": "image_vae",
        "fingerprint": "abc",
        "settings": {"image_size": 4},
        "command": COMMAND,
    }
    write_manifest(tmp_path / "set", {**header, "entries": {"train": entries, "validation": []}})
    return tmp_path / "set"


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def forget_digests(folder):
    """The manifest as versions without digests wrote it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["entries"]["train"]:
        del entry["bytes"], entry["crc32"]
    edit(folder, entries=manifest["entries"])


def test_items_follow_the_manifest(folder):
    data = ImageDataset(folder, "train").expect(image_size=4)
    assert len(data) == 3 and data.fingerprint == "abc"
    for i, item in enumerate(data[k] for k in range(3)):
        assert item["index"].dtype == torch.int64 and item["index"].item() == i
        assert item["image"].dtype == torch.float32
        assert torch.allclose(item["image"], torch.full((3, 4, 4), 0.4 * i - 1))
        assert data.entries[i]["caption"] == f"number {i}"


def test_base_class_gives_the_tensors_as_they_are(folder):
    data = CachedDataset(folder, "train")
    assert data[-1]["image"].dtype == torch.uint8 and data[-1]["index"].item() == 2
    with pytest.raises(IndexError):
        data[3]


def test_large_files_are_mapped_and_equal(folder):
    image = torch.arange(3 * 1200 * 1200, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 1200, 1200)
    forget_digests(folder)
    save_tensors(folder / "train/k1.pt", {"image": image})
    assert torch.equal(CachedDataset(folder, "train")[1]["image"], image)


def test_another_size_is_refused_with_the_command_that_makes_it(folder):
    with pytest.raises(ValueError, match="image_size=4, but image_size=64 is needed") as caught:
        ImageDataset(folder, "train").expect(image_size=64)
    command = "python preprocess_image_vae_dataset.py --dataset_name raw --resize_mode pad --image_size 64"
    assert f"{command} --output_dir {folder}_image_size_64" in str(caught.value)


def test_missing_and_empty_folders_name_the_command(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, state in (("gone", "does not exist"), ("empty", "is empty")):
        with pytest.raises(FileNotFoundError, match=f"{name} {state}.*preprocess_image_vae_dataset.py"):
            ImageDataset(tmp_path / name, "train")


def test_interrupted_preprocessing_is_refused(folder):
    (folder / "manifest.json").rename(folder / "progress.jsonl")
    with pytest.raises(FileNotFoundError, match=r"incomplete.*preprocess_image_vae_dataset\.py again"):
        ImageDataset(folder, "train")


def test_absent_split_is_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no samples in split 'validation'.*--validation_fraction"):
        ImageDataset(folder, "validation")


def test_lost_files_are_counted(folder):
    (folder / "train/k1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 files, the first is k1\.pt"):
        ImageDataset(folder, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema version 99, this code reads 1"),
        ({"stage": "audio_vae"}, "made for stage 'audio_vae', not for 'image_vae'"),
    ],
)
def test_other_layouts_and_stages_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        ImageDataset(folder, "train")


# ---- Damage. Every error names the file and the command that writes it again, into this folder.


def as_file(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def flipped(content: bytes, *, at: bytes) -> bytes:
    position = content.index(at)
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


PIXELS = bytes([51]) * 48
DAMAGES = {
    "empty": (lambda content: b"", "0 bytes"),
    "text": (lambda content: b"hello, this is no archive\n", "bytes"),
    "half": (lambda content: content[: len(content) // 2], "bytes"),
    "flipped byte in the pixels": (lambda content: flipped(content, at=PIXELS), "CRC"),
    "flipped byte in the pickle": (lambda content: flipped(content, at=b"image"), "image"),
    "list": (lambda content: as_file([torch.zeros(3, 4, 4)]), "list instead of a dict"),
    "no tensor": (lambda content: as_file({"image": "pixels"}), "'image' is a str"),
    "missing key": (lambda content: as_file({"picture": torch.zeros(1)}), "lacks 'image'"),
    "dtype": (lambda content: as_file({"image": torch.zeros(3, 4, 4)}), "torch.float32"),
    "shape": (lambda content: as_file({"image": torch.zeros(3, 5, 4, dtype=torch.uint8)}), r"\(3, 5, 4\)"),
    "other pixels": (lambda content: as_file({"image": torch.ones(3, 4, 4, dtype=torch.uint8)}), "CRC|bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("has_digests", [True, False])
def test_a_damaged_sample_is_named(folder, damage, has_digests):
    if not has_digests:  # Then the CRCs within the file tell, which whole other files fit.
        forget_digests(folder)
        if damage == "other pixels":
            return
    change, reason = DAMAGES[damage]
    file = folder / "train/k1.pt"
    file.write_bytes(change(file.read_bytes()))
    reason = reason if has_digests or reason not in ("bytes", "0 bytes") else "no file of tensors"
    data = ImageDataset(folder, "train")
    remedy = f"delete it and run: python preprocess_image_vae_dataset.py .* --output_dir {folder}$"
    with pytest.raises(ValueError, match=rf"train/k1\.pt is damaged \(.*({reason}).*\); {remedy}"):
        data[1]
    assert data[0]["image"].shape == data[2]["image"].shape == (3, 4, 4)


def test_values_that_are_not_finite_are_named(tmp_path):
    folder = write_mel_cache(tmp_path / "mels", SETTINGS, 10)
    data = AudioVAEDataset(folder, "train")
    for value, kind in ((torch.nan, "NaN"), (-torch.inf, "infinite")):
        mel = data[3]["mel"].clone()
        mel[2, 1] = value
        save_tensors(folder / "train/003.pt", {"mel": mel})
        with pytest.raises(ValueError, match=rf"003\.pt is damaged \('mel' holds {kind} values: 1 of \d+"):
            AudioVAEDataset(folder, "train")[3]
    large = torch.full_like(mel, 3e38)  # Finite, although the sum is not.
    save_tensors(folder / "train/003.pt", {"mel": large})
    assert torch.equal(AudioVAEDataset(folder, "train")[3]["mel"], large)


def test_samples_of_other_kinds_are_checked_too(latent_cache, tmp_path):
    mels = write_mel_cache(tmp_path / "mels", SETTINGS, 10)
    save_tensors(mels / "train/002.pt", {"mel": torch.zeros(16, 3)})
    with pytest.raises(ValueError, match=r"002\.pt is damaged \('mel' is torch.float32 of shape \(16, 3\)"):
        AudioVAEDataset(mels, "train")[2]
    shutil.copytree(latent_cache, tmp_path / "latents")
    data = ImageLatentDataset(tmp_path / "latents", "train")
    sample = torch.load(file := tmp_path / "latents/train" / f"{data.entries[0]['key']}.pt")
    for name in sample:
        save_tensors(file, {other: tensor for other, tensor in sample.items() if other != name})
        with pytest.raises(ValueError, match=rf"{file.name} is damaged \(it lacks '{name}'"):
            data[0]


def test_a_file_that_is_gone_is_named(folder):
    data = ImageDataset(folder, "train")
    (folder / "train/k1.pt").unlink()
    with pytest.raises(ValueError, match=r"train/k1\.pt cannot be read .*run: python preprocess"):
        data[1]


def without(name):
    return lambda manifest: {key: value for key, value in manifest.items() if key != name}


def with_first_entry(entry):
    return lambda manifest: {**manifest, "entries": {"train": [entry]}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((without(name), f"lacks '{name}'") for name in ("schema", "stage", "fingerprint", "settings", "command")),
        (without("entries"), "lacks 'entries'"),
        (lambda manifest: list(manifest), r"holds \['schema'.*not an object"),
        (lambda manifest: {**manifest, "fingerprint": 5}, "fingerprint=5 must be str"),
        (lambda manifest: {**manifest, "settings": []}, r"settings=\[\] must be"),
        (lambda manifest: {**manifest, "settings": {}}, "lacks 'image_size'"),
        (lambda manifest: {**manifest, "command": None}, "command=None must be list"),
        (lambda manifest: {**manifest, "entries": {"train": {}}}, r"entries.train={} must be list"),
        (with_first_entry("k0"), r"entries.train\[0\]='k0' must be an object"),
        (with_first_entry({"caption": ""}), r"entries.train\[0\] lacks 'key'"),
        (with_first_entry({"key": 7, "caption": ""}), r"entries.train\[0\].key=7 must be str"),
        (with_first_entry({"key": "k0", "caption": "", "crc32": "0"}), "lacks 'bytes'"),
    ],
)
def test_a_damaged_manifest_is_named(folder, change, reason):
    file = folder / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(
        ValueError, match=rf"manifest\.json is damaged \(.*{reason}.*\); delete the folder and make it"
    ):
        ImageDataset(folder, "train").expect(image_size=4)


def test_every_flipped_bit_of_a_manifest_is_found(folder):
    file = folder / "manifest.json"
    content = file.read_bytes()
    name = content.index(b'"sha256"')
    for position in range(len(content) - 1):  # The last byte is a line break.
        if name < position <= name + 6:
            continue  # The digest's name: without a digest, as in older manifests, and else unchanged.
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged \(.*\); delete the folder and make it with"):
            read_manifest(folder, "image_vae")
    file.write_bytes(content.replace(b"number 1", b"number 7"))
    with pytest.raises(ValueError, match=r"its SHA-256 is .* was written; if it was edited, remove its last field"):
        ImageDataset(folder, "train")


def test_manifests_of_earlier_versions_have_no_digest(folder, caplog):
    content = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(content.partition(',\n"sha256"')[0] + "}\n")
    assert len(ImageDataset(folder, "train")) == 3 and not caplog.records


@pytest.mark.parametrize("content", [b'{"schema": 1', b"\xff\x00", b"", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*delete the folder and make it with: python"):
        ImageDataset(folder, "train")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hop_length": None}, "settings.mel.hop_length=None must be int or float"),
        ({"n_fft": 5}, "settings.mel: n_fft=5 "),
        ({"tune": 1}, "settings.mel: .*'tune'"),
        (None, "settings.mel lacks 'sample_rate'"),
    ],
)
def test_a_damaged_definition_of_log_mels_is_named(tmp_path, changes, reason):
    folder = write_mel_cache(tmp_path / "mels", SETTINGS, 10)
    mel = {} if changes is None else {**SETTINGS.as_dict(), **changes}
    edit(folder, settings={"mel": mel})
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \({reason}"):
        AudioVAEDataset(folder, "train")
