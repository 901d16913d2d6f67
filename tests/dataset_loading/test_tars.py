"""Tar files in the layout of WebDataset as caches: what is read, what is counted, what is an error."""

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from PIL import Image

from dataset_loading.image.pixels import IMAGE_SUFFIXES
from dataset_loading.streams.addresses import RetriedFile
from dataset_loading.streams.opening import open_any
from dataset_loading.streams.tars import expand_braces, open_tars
from preprocess_audio_vae_dataset import AudioVAEPreprocess
from preprocess_image_vae_dataset import ImageVAEPreprocess


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def tar_bytes(members: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sample(i: int) -> dict[str, bytes]:
    texts = {f"{i:04d}.txt": f"image {i}".encode()} if i % 2 else {}
    return {f"{i:04d}.png": png(i), f"{i:04d}.json": json.dumps({"caption": f"json {i}", "id": i}).encode(), **texts}


def write_tars(folder: Path, n_tars: int = 3, n: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for tar in range(n_tars):
        members = {name: content for i in range(n) for name, content in sample(tar * n + i).items()}
        (folder / f"shard-{tar:06d}.tar").write_bytes(tar_bytes({**members, "9999.cls": b"1"}))
    return folder


def rows_of(name: str | Path, kind: str = "image", limit: int = -1):
    source = open_any(str(name), "train", kind, suffixes=IMAGE_SUFFIXES)
    source.rows.limit = limit
    return list(source), source.left_out.counts


def prepare(raw, out: Path, *flags: str) -> dict:
    words = ["--dataset_name", str(raw), "--output_dir", str(out), "--image_size", "8", "--num_workers", "0"]
    return ImageVAEPreprocess.main([*words, "--validation_fraction", "0.2", *flags])


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith(".")}


def test_samples_are_images_with_texts_in_the_order_of_the_tars(tmp_path):
    folder = write_tars(tmp_path / "raw", 2, 3)
    rows, left_out = rows_of(folder)
    assert [name for name, _ in rows][:4] == [f"shard-00000{i // 3}.tar/{i:04d}.png" for i in range(4)]
    assert [row["text"] for _, row in rows] == [f"{'image' if i % 2 else 'json'} {i}" for i in range(6)]
    assert [row["id"] for _, row in rows] == list(range(6)) and rows[0][1]["image"]["bytes"] == png(0)
    assert left_out == {"ending .cls is not read": 2}
    # A file, a pattern, a range, an address.
    assert rows_of(folder / "shard-000001.tar")[0][0][1]["id"] == 3
    for name in ("shard-{000000..000001}.tar", "shard-*.tar"):
        assert rows_of(folder / name)[0] == rows
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe_file(f"/tars/{file.name}", file.read_bytes())
    try:
        for name in ("tars", "tars/*.tar", "tars/shard-{000000..000001}.tar"):
            assert rows_of(f"memory://{name}")[0] == rows
        with pytest.raises(FileNotFoundError, match=r"shard-000002\.tar"):
            rows_of("memory://tars/shard-{000000..000002}.tar")
    finally:
        system.rm("/tars", recursive=True)
    assert expand_braces("a{1,2}-{08..10}") == [f"a{a}-{b}" for a in "12" for b in ("08", "09", "10")]


def test_shards_limit_and_resuming_give_the_bytes_of_one_run(tmp_path):
    raw, out = write_tars(tmp_path / "raw"), tmp_path / "out"
    whole = prepare(raw, out, "--streaming")
    expected = contents(out)
    assert whole["totals"]["train"]["samples"] + whole["totals"]["validation"]["samples"] == 120
    assert whole["entries"]["validation"] and whole["left_out"]["ending .cls is not read"]["count"] == 3
    # The number of tars differs, so that a limit is within one.
    for limit in ([], ["--limit", "70"]):
        prepare(raw, tmp_path / f"whole{len(limit)}", *limit)
        for i in (1, 2):
            prepare(raw, tmp_path / f"joined{len(limit)}", "--shard", f"{i}/2", *limit)
        folders = [str(tmp_path / f"joined{len(limit)}.shard-{i}-of-2") for i in (1, 2)]
        joined = ["--merge", *folders, "--output_dir", str(tmp_path / f"joined{len(limit)}")]
        manifest = ImageVAEPreprocess.main(joined)
        other = json.loads((tmp_path / f"whole{len(limit)}/manifest.json").read_text())
        assert manifest["fingerprint"] == other["fingerprint"] and manifest["entries"] == other["entries"]
        assert manifest["left_out"]["ending .cls is not read"]["count"] == (1 if limit else 3)
    # A limit that grows: what is left out is not counted twice.
    prepare(raw, tmp_path / "out2", "--limit", "70")
    extended = prepare(raw, tmp_path / "out2")
    assert extended["fingerprint"] == whole["fingerprint"] and extended["left_out"] == whole["left_out"]
    assert contents(out) == expected


def test_what_is_wrong_with_members_is_counted(tmp_path):
    file = tmp_path / "a.tar"
    members = [
        *sample(0).items(),
        ("0001.txt", b"alone"),
        ("0002.png", png(2)),
        ("0002.png", png(3)),
        ("0002.jpg", png(4)),
        ("0002.seg.png", png(5)),
        ("0003.pyd", b"cos\nsystem\n(S'false'\ntR."),
        ("noending", b""),
        ("._0002.png", b""),
        ("0004.png", png(6)),
        ("0004.json", b"[1]"),
        ("0005.png", png(7)),
        ("0005.txt", b"\xff\xfe\xff"),
        ("dir.v1/0006.png", png(8)),
        ("0000.txt", b"late"),
    ]
    file.write_bytes(tar_bytes(members))
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("0007.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    rows, left_out = rows_of(file)
    problems = {name: row["image"].get("problem", "")[:12] for name, row in rows}
    assert problems == {
        "a.tar/0000.png": "",
        "a.tar/0001": "",
        "a.tar/0002.png": "",
        "a.tar/0004.png": "its .json ho",
        "a.tar/0005.png": "line 1 is no",
        "a.tar/dir.v1/0006.png": "",
        "a.tar/0000": "the key stoo",
    }
    assert left_out == {
        "member is in its tar twice": 1,
        "another image of the same key": 1,
        "ending .seg.png is not read": 1,
        "ending .pyd may run code and is never read": 1,
        "ending missing is not read": 1,
        "link, pipe or device in a tar": 1,
    }
    manifest = prepare(file, tmp_path / "out", "--max_broken_fraction", "0.6")
    assert len(manifest["broken"]) == 3 and [row["source"] for row in manifest["skipped"]] == ["a.tar/0001"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:1000], "unexpected end of data"),
        (lambda content: content[: content.index(b"0039.png\0")], "it ends without its end mark"),
        (lambda content: content[: content.index(b"0039.png\0") + 100], "truncated header"),
        (lambda content: content.replace(b"0020.png\0", b"\xff020.png\0", 1), "bad checksum"),
        (lambda content: content + content, "it goes on after its end mark"),
        (lambda content: b"<html>no tar</html>" * 99, "invalid header|bad checksum"),
        (lambda content: b"", "end mark|empty"),
    ],
)
def test_damaged_tars_are_errors(tmp_path, damage, reason, caplog):
    folder = write_tars(tmp_path / "raw")
    file = folder / "shard-000000.tar"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SystemExit):
        prepare(folder, tmp_path / "out")
    assert "shard-000000.tar is damaged" in caplog.text and "1 of 3 tars" in caplog.text
    source = open_tars(str(folder), "train", "image", suffixes=IMAGE_SUFFIXES)
    source.rows.max_broken_fraction = 0.5
    assert len(list(source)) >= 80
    (counted,) = [text for text in source.left_out.counts if text.startswith("tar is damaged")]
    assert any(part in counted for part in reason.split("|"))
    # Allowed: it counts, and the others are read.
    manifest = prepare(folder, tmp_path / "out", "--max_broken_fraction", "0.5")
    assert any(row["source"] == "shard-000000.tar" for row in manifest["broken"])


def test_recordings_with_texts_speakers_and_parts(tmp_path):
    members = {}
    for i in range(8):
        file = io.BytesIO()
        soundfile.write(file, np.random.default_rng(i).uniform(-0.3, 0.3, 16000), 16000, format="flac")
        part = {"offset": 0.25, "duration": 0.5} if i % 2 else {"duration": 0.1}
        fields = {"transcript": f"text {i}", "speaker_id": i % 3, **part}
        members |= {f"{i}.flac": file.getvalue(), f"{i}.json": json.dumps(fields).encode()}
    (tmp_path / "clips.tar").write_bytes(tar_bytes(members))
    words = [
        "--dataset_name",
        str(tmp_path / "clips.tar"),
        "--output_dir",
        str(tmp_path / "out"),
        "--num_workers",
        "0",
    ]
    manifest = AudioVAEPreprocess.main([*words, "--validation_fraction", "0"])
    rows = [(row["caption"], row["speaker"], row.get("offset")) for row in manifest["entries"]["train"]]
    assert rows == [(f"text {i}", f"{i % 3}", 0.25 if i % 2 else None) for i in range(8)]


class Breaking(io.BytesIO):
    """A connection that breaks after so many bytes."""

    def __init__(self, content: bytes, last: int):
        super().__init__(content)
        self.last, self.size = last, len(content)

    def read(self, n=-1):
        if self.tell() + n > self.last:
            raise ConnectionResetError("reset by peer")
        return super().read(n)


def test_connections_that_break_are_opened_again_a_few_times(monkeypatch):
    content = bytes(range(256)) * 16
    system = fsspec.filesystem("memory")
    system.pipe_file("/broken/a.tar", content)
    monkeypatch.setattr("dataset_loading.remote.RETRY_SECONDS", 0.001)
    opened = []

    def opening(*_, last=1500, **__):
        opened.append(Breaking(content, last * (len(opened) + 1)))
        return opened[-1]

    monkeypatch.setattr(type(system), "open", opening)
    file = RetriedFile("memory://broken/a.tar")
    assert b"".join(file.read(512) for _ in range(8)) == content and len(opened) == 3
    opened.clear()
    monkeypatch.setattr(type(system), "open", lambda *_, **__: opening(last=0))
    with pytest.raises(OSError, match=r"memory://broken/a\.tar cannot be read after 3 tries, at byte 0"):
        RetriedFile("memory://broken/a.tar").read(512)
    assert len(opened) == 3
    monkeypatch.undo()
    system.rm("/broken", recursive=True)
    with pytest.raises(FileNotFoundError, match=r"memory://broken/a\.tar does not exist"):
        RetriedFile("memory://broken/a.tar").read(512)
