"""Audio to caches: what is written, what is left out and why, which flags do what."""

import json
import math
import typing

import datasets
import librosa
import numpy as np
import pytest
import soundfile
import torch

from dataset_loading.audio.cached import AudioDataset, VocoderDataset
from dataset_loading.audio.signal import active_level
from model.audio.spectral import MEL_PRESETS
from preprocess_audio_vae_dataset import AudioVAEPreprocess
from preprocess_audio_vocoder_dataset import AudioVocoderPreprocess
from tests.helpers.runs import changed
from utils.preprocessing.audio_arguments import AudioPreprocessArguments

RATE = 16000


def tone(frequency=300.0, seconds=1.0, amplitude=0.3, *, rate=RATE):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def save(file, samples, rate=RATE):
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate)


def prepare(raw, out, *flags, stage=AudioVocoderPreprocess, workers=0):
    words = ["--dataset_name", str(raw), "--output_dir", str(out), "--num_workers", str(workers)]
    if "--validation_dataset" not in flags:
        words += ["--validation_fraction", "0"]
    return stage.main(changed(words, *flags))


def contents(out):
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.pt"))}


@pytest.fixture
def raw(tmp_path):
    """Stereo at 22.05 kHz, mono at 16 kHz with pauses, and one of each kind that is left out."""
    raw = tmp_path / "raw"
    save(raw / "wavs/high.wav", np.stack([tone(440, 1.5, rate=22050), tone(440, 1.5, 0.1, rate=22050)], 1), 22050)
    save(raw / "wavs/words.flac", np.concatenate([tone(200, 1.2), np.zeros(3200), tone(300, 1.1), np.zeros(3200)] * 2))
    return raw


@pytest.fixture
def faulty(raw):
    save(raw / "wavs/clipped.wav", np.clip(5 * tone(300), -1, 1))
    save(raw / "wavs/short.wav", tone(300, 0.1))
    save(raw / "wavs/silent.wav", 1e-4 * tone(300))
    (raw / "wavs/broken.wav").write_bytes(b"RIFF")
    return raw


def test_files_hold_waveform_and_librosas_mel(raw, tmp_path):
    manifest = prepare(raw, tmp_path / "out")
    data = VocoderDataset(tmp_path / "out", "train")
    by_source = {entry["source"]: (data[i], entry) for i, entry in enumerate(data.entries)}
    item, entry = by_source["wavs/high.wav"]
    S = 16000 * 3 // 2 // 256 * 256
    assert item["waveform"].shape == (S,) and item["mel"].shape == (80, S // 256)
    # Both channels are averaged: amplitude 0.2.
    expected = tone(440, 1.5, 0.2)[:S]
    assert np.abs(item["waveform"].numpy() - expected)[500:-500].max() < 1e-3
    padded = np.pad(item["waveform"].numpy(), 384, mode="reflect")
    magnitude = np.abs(librosa.stft(padded, n_fft=1024, hop_length=256, center=False))
    mel = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80, fmin=0, fmax=8000) @ magnitude
    assert np.abs(np.maximum(mel, 1e-5) - item["mel"].exp().numpy()).max() < 1e-5
    assert entry == {**entry, "length": S // 256, "seconds": S / 16000, "speaker": "", "caption": "", "copy": 0}
    assert manifest["totals"]["train"]["seconds"] == pytest.approx(sum(e["seconds"] for _, e in by_source.values()))
    assert manifest["settings"]["mel"] == data.mel.as_dict() and manifest["packages"].keys() >= {"torchaudio"}


def test_faulty_clips_are_reported_with_reasons(faulty, tmp_path):
    manifest = prepare(faulty, tmp_path / "out", "--max_broken_fraction", "0.2")
    assert len(manifest["entries"]["train"]) == 2
    skipped = {one["source"].split("/")[1]: one["reason"] for one in manifest["skipped"]}
    assert skipped.keys() == {"clipped.wav", "short.wav", "silent.wav"}
    assert "full scale; --keep_clipped" in skipped["clipped.wav"] and "0.100 s" in skipped["short.wav"]
    assert [one["source"] for one in manifest["broken"]] == ["wavs/broken.wav"]
    kept = prepare(faulty, tmp_path / "kept", "--max_broken_fraction", "0.2", "--keep_clipped", "--min_seconds", "0")
    assert len(kept["entries"]["train"]) == 4
    assert VocoderDataset(tmp_path / "kept", "train")[0]["waveform"].abs().max() <= 1


def test_segments_join_to_the_clip_and_a_second_run_adds_the_missing_one(raw, tmp_path):
    flags = ("--segment_seconds", "1.5", "--caption_column", "label")
    whole = prepare(raw, tmp_path / "whole", "--caption_column", "label")["entries"]["train"]
    assert [entry["caption"] for entry in whole] == ["wavs", "wavs"]
    manifest = prepare(raw, tmp_path / "out", *flags)
    parts = [entry for entry in manifest["entries"]["train"] if entry["source"] == "wavs/words.flac"]
    assert [entry["part"] for entry in parts] == list(range(parts[0]["parts"])) and len(parts) >= 4
    # Cut at pauses, no part longer than allowed, each cut to whole frames; a transcript belongs to a whole clip.
    assert all(0.5 <= entry["seconds"] <= 1.5 and entry["caption"] == "" for entry in parts)
    assert sum(entry["seconds"] for entry in parts) == pytest.approx(whole[1]["seconds"], abs=0.016 * len(parts))
    assert manifest["entries"]["train"][0]["caption"] == "wavs" and "part" not in manifest["entries"]["train"][0]
    assert "parts" not in manifest["totals"]["train"]
    lost = manifest["left_out"]["transcript lost, as --segment_seconds cut the clip"]
    assert lost == {"count": 1, "names": ["wavs/words.flac"]}
    before = contents(tmp_path / "out")
    (tmp_path / "out/train" / f"{parts[2]['key']}.pt").unlink()
    again = prepare(raw, tmp_path / "out", *flags)
    assert again["entries"] == manifest["entries"] and again["left_out"] == manifest["left_out"]
    assert contents(tmp_path / "out") == before


def test_workers_change_nothing(raw, tmp_path):
    torch.randn(300, 300) @ torch.randn(300, 300)  # This process has computed before it forks.
    flags = ("--num_augmented_copies", "2", "--time_stretch", "--pitch_shift", "--gain_db", "--noise_snr_db")
    flags += ("--segment_seconds", "2", "--trim_db", "--notch_hz", "50")
    manifests = [prepare(raw, tmp_path / str(n), *flags, workers=n) for n in (0, 2)]
    assert manifests[0]["entries"] == manifests[1]["entries"]
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_every_augmentation_changes_copies_and_leaves_the_plain_one(raw, tmp_path):
    plain = contents(prepare(raw, tmp_path / "plain") and tmp_path / "plain")
    for flag in ("--time_stretch", "--pitch_shift", "--gain_db", "--noise_snr_db"):
        prepare(raw, tmp_path / flag, "--num_augmented_copies", "1", flag)
        files = contents(tmp_path / flag)
        assert len(files) == 2 * len(plain) and files.items() > plain.items()
        data = VocoderDataset(tmp_path / flag, "train")
        assert not torch.equal(data[0]["waveform"], data[1]["waveform"])
        lengths = [entry["length"] for entry in data.entries[:2]]
        assert (lengths[0] != lengths[1]) == (flag == "--time_stretch")


def test_gain_loses_no_segment_of_a_copy(tmp_path):
    # A word, a long pause, and a word that is hardly audible: gains of up to -40 dB leave nothing above silence.
    quiet = np.concatenate([tone(200, 1.0, 0.02), np.zeros(RATE), tone(300, 1.0, 0.002)])
    save(tmp_path / "raw/a.wav", quiet)
    flags = ("--num_augmented_copies", "8", "--gain_db", "40", "--segment_seconds", "1")
    entries = prepare(tmp_path / "raw", tmp_path / "out", *flags, stage=AudioVAEPreprocess)["entries"]["train"]
    parts = [[entry["seconds"] for entry in entries if entry["copy"] == copy] for copy in range(9)]
    assert len(parts[0]) >= 2 and sum(parts[0]) < 2.9  # Of the pause, some is left out.
    assert all(each == parts[0] for each in parts[1:])
    peaks = [AudioDataset(tmp_path / "out", "train")[i]["mel"].max().item() for i in range(len(entries))]
    assert min(peaks) < peaks[0] - 2


def test_conditioning_flags(tmp_path):
    quiet, hum = np.zeros(8000), tone(50, 2.0, 0.1)
    save(tmp_path / "raw/a.wav", np.concatenate([quiet, tone(425), quiet]) + hum)
    prepare(tmp_path / "raw", tmp_path / "out", "--notch_hz", "50", "--trim_db", "30", "--loudness_db", "-26")
    waveform = VocoderDataset(tmp_path / "out", "train")[0]["waveform"]
    assert len(waveform) / RATE == pytest.approx(1.1, abs=0.06)
    assert active_level(waveform, RATE) == pytest.approx(-26, abs=0.1)
    assert abs(np.mean(waveform.numpy() * tone(50, len(waveform) / RATE, 1.0))) < 5e-4


def test_presets_and_single_fields(raw, tmp_path):
    prepare(raw, tmp_path / "a", "--mel", "24k", stage=AudioVAEPreprocess)
    prepare(raw, tmp_path / "b", "--mel", "24k", "--n_mels", "64", "--f_max", "10000", stage=AudioVAEPreprocess)
    first, second = (AudioDataset(tmp_path / name, "train") for name in "ab")
    assert first[0].keys() == {"mel", "index"} and first.mel.sample_rate == 24000
    assert first[0]["mel"].shape[0] == 100 and second[0]["mel"].shape[0] == 64 and second.mel.f_max == 10000
    assert first.fingerprint != second.fingerprint
    assert typing.get_args(AudioPreprocessArguments.__annotations__["mel"]) == tuple(MEL_PRESETS)


@pytest.mark.parametrize("column", ["text", "text_normalized", "transcription", "transcript", "sentence"])
def test_transcripts_and_speakers_are_found(tmp_path, column):
    for name in "ab":
        save(tmp_path / f"raw/{name}.wav", tone())
    lines = [f"file_name,{column},speaker,kind", "a.wav,Hello there.,anna,x", 'b.wav,"Yes, you.",ben,y']
    (tmp_path / "raw/metadata.csv").write_text("\n".join(lines))
    entries = prepare(tmp_path / "raw", tmp_path / "out", stage=AudioVAEPreprocess)["entries"]["train"]
    assert [(e["caption"], e["speaker"]) for e in entries] == [("Hello there.", "anna"), ("Yes, you.", "ben")]
    renamed = prepare(tmp_path / "raw", tmp_path / "out", "--speaker_column", "kind", stage=AudioVAEPreprocess)
    assert [entry["speaker"] for entry in renamed["entries"]["train"]] == ["x", "y"]


def test_clips_with_several_captions_are_held_once(tmp_path):
    save(tmp_path / "raw/a.wav", tone(seconds=3))
    save(tmp_path / "raw/b.wav", tone())
    rows = [
        {"file_name": "a.wav", "text": ["a tone", "a beep"]},
        {"file_name": "b.wav", "text": "high"},
        {"file_name": "b.wav", "text": "low"},
        {"file_name": "b.wav", "text": "part", "offset": 0.5},
    ]
    (tmp_path / "raw/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for stage in (AudioVAEPreprocess, AudioVocoderPreprocess):
        entries = prepare(tmp_path / "raw", tmp_path / stage.name, stage=stage)["entries"]["train"]
        captions = [(entry["caption"], entry.get("captions")) for entry in entries]
        assert captions == [("a tone", ["a tone", "a beep"]), ("high", ["high", "low"]), ("part", None)]
    parts = prepare(tmp_path / "raw", tmp_path / "parts", "--segment_seconds", "1")["entries"]["train"]
    assert len(parts) > 3 and parts[0]["caption"] == "" and "captions" not in parts[0]


def test_speakers_are_names_and_columns_that_cut_are_named(tmp_path, caplog):
    cells = [1, 1.0, " anna ", "anna", None]
    for number, _ in enumerate(cells):
        save(tmp_path / f"raw/{number}.wav", tone(200 + 50 * number))
    rows = [{"file_name": f"{n}.wav", "speaker": cell, "start": 0.0, "end": 0.5} for n, cell in enumerate(cells)]
    (tmp_path / "raw/metadata.json").write_text(json.dumps(rows))
    entries = prepare(tmp_path / "raw", tmp_path / "out", stage=AudioVAEPreprocess)["entries"]["train"]
    assert [entry["speaker"] for entry in entries] == ["1", "1", "anna", "anna", ""]
    assert "start and end are not read" in caplog.text and "offset and duration" in caplog.text
    (tmp_path / "raw/metadata.json").write_text(json.dumps([{**rows[0], "speaker": ["a", "b"]}]))
    with pytest.raises(SystemExit) as caught:
        prepare(tmp_path / "raw", tmp_path / "other", stage=AudioVAEPreprocess)
    assert "0.wav, column 'speaker': a speaker is ['a', 'b']" in str(caught.value.__cause__)


def test_ljspeech_layout(tmp_path):
    root = tmp_path / "LJSpeech-1.1"
    for number in (1, 2):
        save(root / f"wavs/LJ001-000{number}.wav", tone(rate=22050), 22050)
    lines = ['LJ001-0001|He said "no, 1.|He said "no, one.', "LJ001-0002|Only a text."]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    manifest = prepare(root, tmp_path / "out", "--mel", "22k")
    found = [(entry["source"], entry["caption"]) for entry in manifest["entries"]["train"]]
    assert found == [("wavs/LJ001-0001.wav", 'He said "no, one.'), ("wavs/LJ001-0002.wav", "Only a text.")]
    (root / "metadata.csv").write_text("LJ001-0001|one|one\nLJ001-0002\n")
    with pytest.raises(SystemExit) as caught:
        prepare(root, tmp_path / "other")
    assert "line 2 must read id|text" in str(caught.value.__cause__)


def test_data_sets_with_bytes(raw, tmp_path):
    rows = [{"bytes": (raw / "wavs/high.wav").read_bytes(), "path": f"{n}.wav"} for n in range(2)]
    columns = {"audio": rows, "sentence": ["one", "two"], "speaker_id": [7, 9]}
    table = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    table.save_to_disk(tmp_path / "saved")
    entries = prepare(tmp_path / "saved", tmp_path / "out")["entries"]["train"]
    assert [(entry["source"], entry["caption"], entry["speaker"]) for entry in entries] == [
        ("0.wav", "one", "7"),
        ("1.wav", "two", "9"),
    ]
    assert entries[0]["length"] == 24000 // 256


def test_licence_of_a_split_lies_beside_its_folder(raw, tmp_path):
    (tmp_path / "set").mkdir()
    raw.rename(tmp_path / "set/train")
    (tmp_path / "set/LICENSE.txt").write_text("CC0\nmore")
    assert prepare(tmp_path / "set/train", tmp_path / "out")["licence"] == "CC0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mel", "12k"], "--mel='12k' must be one of '16k'"),
        (["--sample_rate", "8000"], "f_max=8000.0 must satisfy"),
        (["--hop_length", "300"], "hop_length=300 must divide n_fft=1024"),
        (["--notch_hz", "55"], "--notch_hz=55 must be 0, 50 or 60"),
        (["--loudness_measure", "bs1770"], "--loudness_measure has no effect with loudness_db=None"),
        (["--loudness_db", "3"], "--loudness_db=3.0 must be < 0"),
        (["--time_stretch"], "--time_stretch has no effect with num_augmented_copies=0"),
        (["--num_augmented_copies", "1"], "copies are equal without --time_stretch"),
        (["--segment_seconds", "0.5"], "--segment_seconds=0.5 must be at least three times"),
        (["--trim_dB", "3"], "did you mean '--trim_db'"),
    ],
)
def test_wrong_flags(tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit):
        prepare(tmp_path, tmp_path / "out", *flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--caption_column", "--speaker_column"])
def test_columns_that_are_not_there_are_refused(raw, tmp_path, flag):
    with pytest.raises(SystemExit) as caught:
        prepare(raw, tmp_path / "out", flag, "words")
    assert f"{flag}='words' is no column" in str(caught.value.__cause__)


def test_the_shortest_clips_have_frames(tmp_path):
    for n_samples in range(1, 1100, 73):
        save(tmp_path / f"raw/{n_samples}.wav", tone()[1000 : 1000 + n_samples])
    flags = ("--min_seconds", "0", "--num_augmented_copies", "1", "--time_stretch", "0.5")
    manifest = prepare(tmp_path / "raw", tmp_path / "out", *flags)
    assert not manifest["broken"] and len(manifest["skipped"]) == math.ceil(511 / 73)
    assert min(entry["length"] for entry in manifest["entries"]["train"]) == 2
    assert json.loads((tmp_path / "out/manifest.json").read_text())["totals"] == manifest["totals"]
