"""The embedded speech: sentences of the scenes, spoken audibly, evenly spread, the same in every build."""

import csv
import math
from collections import Counter

import pytest
import soundfile
import torch

from dataset_loading.audio.signal import frame_levels
from dataset_loading.embedded.scenes import list_scenes
from dataset_loading.embedded.speech import VOICES, build_speech, main, mixed_scenes, voice_of


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "set"
    assert build_speech(folder, limit=24) == {"train": 20, "test": 4}
    return folder


def rows(folder, split):
    with open(folder / split / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_small_set_is_an_audiofolder(speech):
    held_out = {name: text for split, name, text in list_scenes() if split == "test"}
    for split in ("train", "test"):
        for row in rows(speech, split):
            info = soundfile.info(speech / split / row["file_name"])
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16") and 0.8 < info.duration < 4
            assert list(row) == ["file_name", "text", "speaker"] and row["speaker"] in VOICES
            name = row["file_name"].removesuffix(".flac")
            assert (name in held_out) == (split == "test") and held_out.get(name, row["text"]) == row["text"]
        assert len(list((speech / split).glob("*.flac"))) == len(rows(speech, split))
    assert "GPL-3.0" in (speech / "LICENSE.txt").read_text() and (speech / "source.json").exists()


def test_silence_at_the_ends_is_short(speech):
    for row in rows(speech, "train"):
        samples, rate = soundfile.read(speech / "train" / row["file_name"], dtype="float32")
        levels = frame_levels(torch.from_numpy(samples), rate)
        loud = (levels > levels.max() - 40).nonzero()[:, 0]
        assert loud[0] <= 4 and loud[-1] >= len(levels) - 5  # Frames of 20 ms.
        assert levels.max() > -20


def test_building_twice_gives_the_same_and_other_folders_are_refused(speech, tmp_path, capsys):
    build_speech(tmp_path / "again", limit=24)
    files = sorted(file.relative_to(speech) for file in speech.rglob("*.*"))
    assert all((speech / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    with pytest.raises(SystemExit):
        main([str(speech), "--limit", "30"])
    assert "was made with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(speech), "--limit", "0"])
    assert "--limit=0 must be > 0" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [96, 200, 400, 576, 2304])
def test_limits_are_spread_over_everything(limit):
    chosen = mixed_scenes()[:limit]
    assert len({name for _, name, _ in chosen}) == limit
    assert len({text for _, _, text in chosen}) == min(limit, 576)
    parts = [name.split("_") for _, name, _ in chosen]
    for counts in (Counter(voice_of(name) for _, name, _ in chosen), *(Counter(part) for part in zip(*parts))):
        assert max(counts.values()) - min(counts.values()) <= max(3, math.ceil(limit / 100))
    assert sum(split == "test" for split, _, _ in chosen) == pytest.approx(limit / 8, rel=0.1)
