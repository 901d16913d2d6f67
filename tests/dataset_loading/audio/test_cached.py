"""Preprocessed audio as items and batches, and refusals of folders with other log-mels."""

import math

import numpy as np
import pytest
import soundfile
import torch

from dataset_loading import cached
from dataset_loading.audio.cached import AudioDataset, AudioVAEDataset, Crop, VocoderDataset
from dataset_loading.collators import collate_audio
from dataset_loading.image.pixels import ImageDataset
from dataset_loading.pack import main as pack
from model.audio.spectral import LogMel, MelSettings, mel_preset
from preprocess_audio_vae_dataset import AudioVAEPreprocess
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from preprocess_image_vae_dataset import ImageVAEPreprocess


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Tones of three lengths by two speakers, one of whom validates, for both stages."""
    folder = tmp_path_factory.mktemp("audio")
    rows = {"train": ["file_name,text,speaker", "a.wav,one,zoe", "b.wav,two,zoe"], "test": ["file_name,text,speaker"]}
    rows["test"].append("c.wav,three,adam")
    for split, names in (("train", "ab"), ("test", "c")):
        (folder / split).mkdir()
        (folder / split / "metadata.csv").write_text("\n".join(rows[split]))
        for name in names:
            samples = 0.3 * np.sin(2 * np.pi * 300 * np.arange(8000 + 1500 * ord(name) % 4000) / 16000)
            soundfile.write(folder / split / f"{name}.wav", samples, 16000)
    words = [
        "--dataset_name",
        str(folder / "train"),
        "--validation_dataset",
        str(folder / "test"),
        "--num_workers",
        "0",
    ]
    for stage in (AudioVocoderPreprocess, AudioVAEPreprocess):
        stage.main([*words, "--output_dir", str(folder / stage.name)])
    return folder


def test_items_are_whole_frames_of_the_repositorys_log_mel(caches):
    data = VocoderDataset(caches / "audio_vocoder", "train")
    assert len(data) == 2 and data.mel == MelSettings()
    for number, entry in enumerate(data.entries):
        item = data[number]
        assert item.keys() == {"mel", "waveform", "index"}
        assert item["mel"].dtype == item["waveform"].dtype == torch.float32
        assert item["mel"].shape == (80, entry["length"]) and item["waveform"].shape == (entry["length"] * 256,)
        assert torch.allclose(LogMel(data.mel)(item["waveform"][None])[0], item["mel"], atol=1e-5)
        assert entry["seconds"] == pytest.approx(entry["length"] * 256 / 16000)
    assert [entry["caption"] for entry in data.entries] == ["one", "two"]


def test_speakers_are_those_of_both_splits(caches):
    for split in ("train", "validation"):
        assert VocoderDataset(caches / "audio_vocoder", split).speakers == ["adam", "zoe"]


def test_the_vae_reads_either_folder(caches):
    own, other = (AudioVAEDataset(caches / name, "train") for name in ("audio_vae", "audio_vocoder"))
    assert own[0].keys() == other[0].keys() == {"mel", "index"}
    assert torch.equal(own[1]["mel"], other[1]["mel"])
    with pytest.raises(ValueError, match="made for stage 'audio_vae', not for 'audio_vocoder'"):
        VocoderDataset(caches / "audio_vae", "train")


def test_other_log_mels_are_refused_with_both_and_the_command(caches):
    data = AudioDataset(caches / "audio_vocoder", "train")
    assert data.expect_mel(MelSettings(), "runs/vocoder/x") is data
    with pytest.raises(ValueError, match="sample_rate, n_mels, f_max") as caught:
        data.expect_mel(mel_preset("24k"), "runs/vocoder/x", "or train anew")
    message = str(caught.value)
    assert (
        f"{caches / 'audio_vocoder'}: sample_rate=16000" in message and "runs/vocoder/x: sample_rate=24000" in message
    )
    assert "python preprocess_audio_vocoder_dataset.py" in message and "--mel 24k" in message
    assert f"--output_dir {caches / 'audio_vocoder'}_24k" in message and message.endswith("or train anew")


def test_the_command_for_single_fields_makes_that_log_mel(caches, tmp_path):
    wanted = MelSettings(n_mels=40, hop_length=128, n_fft=512)
    data = AudioDataset(caches / "audio_vae", "train")
    words = data.command(**{**data.mel_flags(wanted), "output_dir": str(tmp_path / "out")}).split()[2:]
    AudioVAEPreprocess.main(words)
    made = AudioDataset(tmp_path / "out", "train").expect_mel(wanted, "the model")
    assert made[0]["mel"].shape[0] == 40
    back = made.command(**made.mel_flags(MelSettings()))
    assert "--n_mels 80" in back and "--hop_length 256" in back and "--mel" not in back.split()


def test_other_folders_are_refused(image_folder, tmp_path):
    ImageVAEPreprocess.main(
        [
            "--dataset_name",
            str(image_folder),
            "--output_dir",
            str(tmp_path / "p"),
            "--limit",
            "3",
            "--image_size",
            "16",
        ]
    )
    assert len(ImageDataset(tmp_path / "p", "train"))
    with pytest.raises(ValueError, match="stage 'image_vae' and holds no log-mels; make them with"):
        AudioVAEDataset(tmp_path / "p", "train")
    with pytest.raises(FileNotFoundError, match=r"preprocess_audio_vae_dataset\.py"):
        AudioVAEDataset(tmp_path / "nothing", "train")


@pytest.mark.parametrize("form", ["files", "mapped files", "packs"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_crops_are_aligned_windows_at_their_places(form, in_memory, caches, tmp_path, monkeypatch):
    folder = caches / "audio_vocoder"
    if form == "packs":
        folder = tmp_path / "packed"
        pack([str(caches / "audio_vocoder"), str(folder)])
    monkeypatch.setattr(cached, "MMAP_BYTES", 0 if form == "mapped files" else 1 << 30)
    if not in_memory:
        monkeypatch.setattr(cached, "IN_MEMORY_BYTES", 0)
    data, vae_data = VocoderDataset(folder, "train"), AudioVAEDataset(folder, "train")
    for _ in range(2):  # A sample is checked when it is read for the first time.
        for index, n in ((0, 8), (1, 20), (-1, 20)):
            whole = data[index]
            length = whole["mel"].shape[1]
            for uniform in (0.0, 0.37, 1 - 2**-24):
                start = math.floor(uniform * (length - n + 1))
                crop = data[Crop(index, n, uniform)]
                assert torch.equal(crop["mel"], whole["mel"][:, start : start + n])
                assert torch.equal(crop["waveform"], whole["waveform"][start * 256 : (start + n) * 256])
                assert crop["index"] == whole["index"] and crop["mel"].untyped_storage().nbytes() == 80 * n * 4
                assert vae_data[Crop(index, n, uniform)].keys() == {"mel", "index"}
            # A shorter clip is taken whole; a data set that is cut gives the beginning.
            assert torch.equal(data[Crop(index, length, 0.9)]["mel"], whole["mel"])
            assert torch.equal(data[Crop(index, length + 5, 0.9)]["waveform"], whole["waveform"])
    assert torch.equal(data.cut(n)[1]["mel"], whole["mel"][:, :n])


# ---- Batches.


def clip(n_frames, **more):
    mel = torch.full((4, n_frames), float(n_frames))
    return {"mel": mel, "waveform": torch.ones(n_frames * 8), "index": torch.tensor(n_frames), **more}


def test_batches_are_padded_with_silence():
    floor = math.log(1e-5)
    batch = collate_audio([clip(3), clip(5), clip(2)], floor)
    assert batch.keys() == {"mel", "n_frames", "waveform", "index"}
    assert batch["mel"].shape == (3, 4, 5) and batch["mel"].is_contiguous() and batch["waveform"].shape == (3, 40)
    assert (
        batch["n_frames"].tolist() == batch["index"].tolist() == [3, 5, 2] and batch["n_frames"].dtype == torch.int64
    )
    for b, n_frames in enumerate((3, 5, 2)):
        assert (batch["mel"][b, :, :n_frames] == n_frames).all() and (batch["mel"][b, :, n_frames:] == floor).all()
        assert batch["waveform"][b].sum() == n_frames * 8 and (batch["waveform"][b, n_frames * 8 :] == 0).all()


def test_speakers_and_tokens_are_batched():
    samples = [clip(2, speaker=torch.tensor(n), tokens=torch.arange(n, dtype=torch.int16)) for n in (3, 0)]
    for sample in samples:
        del sample["waveform"]
    batch = collate_audio(samples, -11.5)
    assert batch["speaker"].tolist() == [3, 0] and batch["token_lengths"].tolist() == [3, 0]
    assert batch["tokens"].tolist() == [[0, 1, 2], [0, 0, 0]] and batch["tokens"].dtype == torch.int64
    with pytest.raises(ValueError, match="different keys"):
        collate_audio([samples[0], clip(2)], -11.5)
