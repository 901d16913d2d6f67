"""Caches of streams: what is written without --streaming, to the byte, also after an interruption."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from preprocess_audio_vae_dataset import AudioVAEPreprocess
from preprocess_image_vae_dataset import ImageVAEPreprocess
from utils.preprocessing.streaming import ROWS

N, PER_FILE = 150, 40


@pytest.fixture(scope="module", autouse=True)
def hub_cache(tmp_path_factory):
    """What the `datasets` package keeps lies in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
        yield


def png(number: int) -> bytes:
    """A small image; one is broken, one too small, two are equal."""
    if number == 33:
        return b"no image"
    pixels = np.random.default_rng(0 if number in (3, 4) else number).integers(0, 256, (18, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[:8] if number == 70 else pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Parquet files of images with captions, names of their own, and a split for validation."""
    folder = tmp_path_factory.mktemp("images")
    rows = [
        {"image": {"bytes": png(i), "path": f"{i % 140}.png"}, "text": ["a cat", f"{i}"] if i % 3 else f"image {i}"}
        for i in range(N)
    ]
    features = datasets.Features(image=datasets.Image(), text=datasets.List(datasets.Value("string")))
    rows = [{**row, "text": row["text"] if isinstance(row["text"], list) else [row["text"]]} for row in rows]
    for name, chosen in {"train": rows, "validation": rows[100:110]}.items():
        for part in range(0, len(chosen), PER_FILE):
            table = datasets.Dataset.from_list(chosen[part : part + PER_FILE], features=features)
            table.to_parquet(folder / f"{name}-{part // PER_FILE:05d}-of-00004.parquet")
    return folder


def prepare(raw: Path, out: Path, *flags: str, fraction: str = "0.2") -> dict:
    words = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "8"]
    words += ["--num_workers", "0"] * ("--num_workers" not in flags)
    words += ["--validation_fraction", fraction] * ("--validation_dataset" not in flags)
    words += ["--max_broken_fraction", "0.05"] * ("--max_broken_fraction" not in flags)
    return ImageVAEPreprocess.main([*words, *flags])


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != ROWS}


@pytest.fixture
def same(tmp_path):
    """Whether folders made by two commands are equal; both are written to the same place."""

    def compare(write, *others) -> dict:
        out, manifest = tmp_path / "out", write(tmp_path / "out")
        expected = contents(out)
        for other in others:
            shutil.rmtree(out)
            assert other(out)["fingerprint"] == manifest["fingerprint"]
            assert contents(out) == expected
        return manifest

    return compare


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--limit", "20", "--num_augmented_copies", "1", "--rotation"],
        ["--validation_split", "validation"],
        ["--num_workers", "2"],
    ],
    ids=str,
)
def test_streams_give_the_same_bytes(images, same, flags):
    flags = [*flags, "--validation_dataset", str(images)] if "--validation_split" in flags else flags
    manifest = same(lambda out: prepare(images, out, *flags), lambda out: prepare(images, out, *flags, "--streaming"))
    assert manifest["entries"]["validation"] and (manifest["broken"] or "--limit" in flags)


def test_one_of_few_is_held_out_of_streams_too(images, same):
    for n in ("1", "2", "12"):
        manifest = same(
            lambda out, n=n: prepare(images, out, "--limit", n, fraction="1e-9"),
            lambda out, n=n: prepare(images, out, "--limit", n, "--streaming", fraction="1e-9"),
        )
        assert len(manifest["entries"]["validation"]) == (n != "1")


class Cut(Exception):
    """Stands for whatever ends a run."""


def count_rows(monkeypatch, cut_after: int | None = None) -> list[str]:
    """The names of the rows that are read from here on; a run is cut off after so many."""
    names, examples = [], ImageVAEPreprocess.examples

    def counted(self, source):
        for name, raw in examples(self, source):
            if source.rows.limit != 1001:  # Not those that are read beforehand.
                names.append(name)
                if cut_after is not None and len(names) > cut_after:
                    raise Cut
            yield name, raw

    monkeypatch.setattr(ImageVAEPreprocess, "examples", counted)
    return names


def test_interrupted_and_extended_runs_go_on_after_their_rows(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(images, out)
    expected = contents(out)
    shutil.rmtree(out)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        count_rows(patch, 131)
        prepare(images, out, "--streaming")
    with monkeypatch.context() as patch:
        names = count_rows(patch)
        prepare(images, out, "--streaming")
    assert len(names) == N - 128 and contents(out) == expected
    # A complete one: nothing is read again. Then a limit that grows.
    with monkeypatch.context() as patch:
        names = count_rows(patch)
        prepare(images, out, "--streaming")
        assert not names and contents(out) == expected
        shutil.rmtree(out)
        prepare(images, out, "--streaming", "--limit", "50")
        del names[:]
        prepare(images, out, "--streaming")
    assert len(names) == N - 50 and contents(out) == expected


def test_what_has_changed_is_read_again(images, tmp_path, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(images, raw)
    manifest = prepare(raw, out, "--streaming")
    names = count_rows(monkeypatch)
    # A sample that was damaged is written again, from the last place before it.
    key = next(entry["key"] for entry in manifest["entries"]["train"] if entry["source"] == "100.png")
    content = (out / f"train/{key}.pt").read_bytes()
    (out / f"train/{key}.pt").write_bytes(b"x")
    prepare(raw, out, "--streaming")
    assert len(names) == N - 64 and (out / f"train/{key}.pt").read_bytes() == content
    # Other files: everything is compared.
    del names[:]
    shutil.copy(raw / "train-00001-of-00004.parquet", raw / "train-00000-of-00004.parquet")
    changed = prepare(raw, out, "--streaming")
    assert len(names) == N and changed["fingerprint"] != manifest["fingerprint"]


def test_joined_shards_of_a_stream(images, same):
    def in_shards(out: Path) -> dict:
        for i in (1, 2, 3):
            prepare(images, out, "--streaming", "--shard", f"{i}/3")
            prepare(images, out, "--streaming", "--shard", f"{i}/3")  # Nothing is left to do.
        folders = [str(out.with_name(f"out.shard-{i}-of-3")) for i in (1, 2, 3)]
        return ImageVAEPreprocess.main(["--merge", *folders, "--output_dir", str(out)])

    same(lambda out: prepare(images, out), in_shards)


def test_broken_rows_count_with_all_rows(images, tmp_path, caplog):
    with pytest.raises(SystemExit):
        prepare(images, tmp_path / "out", "--streaming", "--max_broken_fraction", "0.001")
    assert "1 of 150 raw files are broken" in caplog.text


def test_recordings_with_texts_speakers_and_parts(tmp_path, same):
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        file = io.BytesIO()
        soundfile.write(file, rng.uniform(-0.3, 0.3, 16000), 16000, format="wav")
        part = {"offset": 0.25, "duration": 0.5} if i % 2 else {"offset": None, "duration": None}
        rows.append(
            {"audio": {"bytes": file.getvalue(), "path": None}, "sentence": f"{i}", "client_id": i % 3, **part}
        )
    features = datasets.Features(
        audio={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        sentence=datasets.Value("string"),
        client_id=datasets.Value("int64"),
        offset=datasets.Value("float64"),
        duration=datasets.Value("float64"),
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "clips.parquet")

    def write(out: Path, *flags: str) -> dict:
        words = ["--dataset_name", str(tmp_path / "clips.parquet"), "--output_dir", str(out), "--num_workers", "0"]
        return AudioVAEPreprocess.main([*words, "--validation_fraction", "0.2", *flags])

    manifest = same(write, lambda out: write(out, "--streaming"))
    entries = sorted(manifest["entries"]["train"] + manifest["entries"]["validation"], key=lambda row: row["source"])
    assert [(row["caption"], row["speaker"]) for row in entries] == [(f"{i}", f"{i % 3}") for i in range(12)]
    assert [row.get("offset") for row in entries] == [None, 0.25] * 6


def test_streaming_of_listed_files_is_refused(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.png").write_bytes(png(0))
    with pytest.raises(SystemExit):
        prepare(tmp_path / "raw", tmp_path / "out", "--streaming")
    assert "--streaming has no effect" in caplog.text and json.dumps(str(tmp_path / "raw"))[1:-1] in caplog.text
