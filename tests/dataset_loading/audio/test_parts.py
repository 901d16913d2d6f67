import json
import math

import pytest
import soundfile
import torch

from dataset_loading.audio.parts import open_reader, part_of_row
from preprocess_audio_vae_dataset import AudioVAEPreprocess
from tests.helpers.runs import changed
from utils.command_line import parse_arguments

RATE = 16000


@pytest.fixture
def meeting(tmp_path):
    """Three seconds, each of another pitch."""
    seconds = [0.3 * torch.sin(2 * math.pi * f * torch.arange(RATE) / RATE) for f in (300, 600, 1200)]
    for name in ("meeting.wav", "meeting.ogg"):
        soundfile.write(tmp_path / name, torch.cat(seconds).numpy(), RATE)
    return tmp_path


@pytest.mark.parametrize("name", ["meeting.wav", "meeting.ogg"])
@pytest.mark.parametrize(
    "part, start, stop",
    [
        ({"offset": 1.0, "duration": 0.5}, 1.0, 1.5),
        ({"offset": 2.5}, 2.5, 3.0),
        ({"duration": 0.25}, 0.0, 0.25),
        ({"offset": 2.0, "duration": 1.05}, 2.0, 3.0),  # Rounded a little beyond the end.
        ({"duration": 700.0}, 0.0, 3.0),
    ],
)
def test_a_part_is_that_of_the_whole(meeting, name, part, start, stop):
    whole = torch.from_numpy(soundfile.read(meeting / name, dtype="float32")[0])
    for media in (
        {"path": str(meeting / name), "bytes": None},
        {"path": None, "bytes": (meeting / name).read_bytes()},
    ):
        with open_reader({**media, **part}) as reader:
            samples = torch.cat(list(reader.blocks(3000)), 1)
        assert reader.sample_rate == RATE and reader.n_samples == samples.shape[1]
        assert torch.equal(samples[0], whole[round(start * RATE) : round(stop * RATE)])


@pytest.mark.parametrize(
    "part, message",
    [({"offset": 3.5}, "offset=3.5"), ({"offset": 2.0, "duration": 2.0}, "offset=2 s and duration=2 s")],
)
def test_parts_beyond_the_end_are_named(meeting, part, message):
    with pytest.raises(ValueError, match=f"{message}.*the end of the recording, 3.000 s"):
        open_reader({"path": str(meeting / "meeting.wav"), "bytes": None, **part})


@pytest.mark.parametrize(
    "row", [{"offset": "-1"}, {"offset": "1:30"}, {"duration": "n/a"}, {"duration": math.inf}, {"offset": True}]
)
def test_wrong_cells_are_named(meeting, row):
    with pytest.raises(ValueError, match=f"^{next(iter(row))}=.* must be seconds"):
        open_reader({"path": str(meeting / "meeting.wav"), "bytes": None, **part_of_row(row)})


def test_cells_that_say_nothing_are_absent():
    assert part_of_row({"offset": " ", "duration": math.nan}) == {}
    assert (
        part_of_row({"offset": 0, "duration": 0}) == part_of_row({"offset": "0", "duration": "-1"}) == {"offset": 0.0}
    )


def prepare_rows(folder, rows: list[dict], *flags: str) -> dict:
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"file_name": "meeting.wav", **row}) for row in rows))
    argv = ["--dataset_name", str(folder), "--output_dir", str(folder.parent / f"{folder.name}_out")]
    argv = changed(argv, "--num_workers", "0", "--validation_fraction", "0", *flags)
    return AudioVAEPreprocess(parse_arguments(AudioVAEPreprocess.arguments_class, argv, "")).run()


def test_a_wrong_cell_is_a_broken_sample_of_its_row(meeting):
    (meeting / "meeting.ogg").unlink()
    prepare_rows(meeting, [{}, {}])
    rows = [{"offset": 1.0, "duration": "0.5"}, {"offset": "00:03"}]
    with pytest.raises(
        ValueError, match=r"1 of 2 raw files are broken.*meeting.wav \(ValueError: offset='00:03' must"
    ):
        prepare_rows(meeting, rows)
    manifest = prepare_rows(meeting, rows, "--max_broken_fraction", "0.5")
    assert [entry["seconds"] for entry in manifest["entries"]["train"]] == [pytest.approx(0.5, abs=0.02)]
    (broken,) = manifest["broken"]
    assert broken["source"] == "meeting.wav" and "offset='00:03'" in broken["reason"]


def test_durations_without_offsets_cut_nothing(meeting):
    (meeting / "meeting.ogg").unlink()
    (entry,) = prepare_rows(meeting, [{"duration": 2.0}])["entries"]["train"]
    assert entry["seconds"] == pytest.approx(3.0, abs=0.02) and "duration" not in entry
    (entry,) = prepare_rows(meeting, [{"duration": 2.0, "offset": None}])["entries"]["train"]
    assert entry["seconds"] == pytest.approx(2.0, abs=0.02)


def test_each_row_is_its_part_and_a_part_that_moves_is_encoded_anew(meeting, tmp_path):
    (meeting / "meeting.ogg").unlink()

    def prepare(*offsets: float) -> list[dict]:
        rows = [{"file_name": "meeting.wav", "text": f"{at}", "offset": at, "duration": 0.5} for at in offsets]
        (meeting / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        argv = ["--dataset_name", str(meeting), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
        argv = changed(argv, "--validation_fraction", "0")
        run = AudioVAEPreprocess(parse_arguments(AudioVAEPreprocess.arguments_class, argv, "")).run()
        return run["entries"]["train"]

    entries = prepare(0.0, 1.0)
    assert [(entry["offset"], entry["duration"], entry["seconds"]) for entry in entries] == [
        (0.0, 0.5, pytest.approx(0.5, abs=0.02)),
        (1.0, 0.5, pytest.approx(0.5, abs=0.02)),
    ]
    files = [tmp_path / "out/train" / f"{entry['key']}.pt" for entry in entries]
    mels = [torch.load(file)["mel"].mean(1) for file in files]
    assert mels[0].argmax() < mels[1].argmax()
    stamps = [file.stat().st_mtime_ns for file in files]
    prepare(0.0, 2.0)
    assert [file.stat().st_mtime_ns == stamp for file, stamp in zip(files, stamps)] == [True, False]
    assert torch.load(files[1])["mel"].mean(1).argmax() > mels[1].argmax()
