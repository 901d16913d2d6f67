"""Uploaded files are refused by their size, content and what they would become, before they are decoded."""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.helpers.vocoder_checkpoint import write_sound
from utils.app.arguments import AppArguments
from utils.app.uploads import read_audio, read_image

LIMITS = AppArguments(max_upload_mb=1, max_pixels=10_000, max_seconds=2.0)


def write_bomb(file: Path, width: int, height: int) -> None:
    """A PNG of a few kB whose pixels would take gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000), 9)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def test_images_of_known_formats_are_read(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for suffix in ("png", "bmp", "webp", "jpg"):
        image.save(tmp_path / f"a.{suffix}")
        assert read_image(tmp_path / f"a.{suffix}", LIMITS).size == (4, 4)
    # The content decides, not the name.
    (tmp_path / "a.png").rename(tmp_path / "a.wav")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.wav", LIMITS)), np.asarray(image))


def test_images_that_are_refused(tmp_path):
    write_bomb(tmp_path / "bomb.png", 60_000, 60_000)
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    (tmp_path / "page.png").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "empty.png").touch()
    (tmp_path / "heavy.png").write_bytes(bytes(1_000_001))
    Image.new("RGB", (10, 10), "red").save(tmp_path / "cut.jpg", quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-60])
    Image.new("RGB", (10, 10)).save(tmp_path / "a.pdf")
    for name, message in (
        ("bomb.png", r"bomb.png has 60000x60000 pixels, more than --max_pixels=10000"),
        ("large.png", "more than --max_pixels=10000"),
        ("page.png", "page.png is no image of a known format; give PNG"),
        ("a.pdf", "is no image of a known format"),
        ("empty.png", "empty.png is empty"),
        ("heavy.png", "heavy.png has 1.0 MB, more than --max_upload_mb=1"),
        ("cut.jpg", "cut.jpg is no image of a known format or damaged|cut.jpg: .*; save the image again"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name, LIMITS)
    with pytest.raises(ValueError, match="no file is given"):
        read_image(None, LIMITS)
    with pytest.raises(ValueError, match=r"gone.png was deleted, as old uploads are; upload it again"):
        read_image(tmp_path / "gone.png", LIMITS)


def test_recordings_of_known_formats_are_read(tmp_path):
    for suffix in ("wav", "flac", "ogg"):
        write_sound(tmp_path / f"a.{suffix}", seconds=1.0)
        assert len(read_audio(tmp_path / f"a.{suffix}", LIMITS, 8000).waveform) == 8000


def test_recordings_that_are_refused(tmp_path):
    write_sound(tmp_path / "long.wav", seconds=2.5)
    soundfile.write(tmp_path / "silence.flac", np.zeros(8000 * 3600, dtype=np.float32), 8000)
    assert (tmp_path / "silence.flac").stat().st_size < 1_000_000
    soundfile.write(tmp_path / "channels.wav", np.zeros((100, 9)), 8000)
    soundfile.write(tmp_path / "other.mat", np.zeros(100), 8000, format="MAT5")
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "text.raw").write_text("no sound")
    for name, message in (
        ("long.wav", "long.wav has 2 seconds, more than --max_seconds=2"),
        ("silence.flac", "silence.flac has 3600 seconds, more than --max_seconds=2"),
        ("channels.wav", "with 9 channels; give WAV"),
        ("other.mat", "other.mat is MAT5 audio with 1 channels"),
        ("text.wav", "text.wav is no audio of a known format; give WAV"),
        ("text.raw", "is no audio of a known format"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_audio(tmp_path / name, LIMITS, 8000)
        # Who follows the causes of an error comes to an end.
        assert caught.value.__cause__ is not caught.value


def test_a_header_that_lies_does_not_lengthen_the_decoding(tmp_path):
    """FLAC's header may leave the number of samples open, or state fewer than follow."""
    soundfile.write(tmp_path / "silence.flac", np.zeros(8000 * 600, dtype=np.float32), 8000)
    content = bytearray((tmp_path / "silence.flac").read_bytes())
    assert int.from_bytes(content[21:26], "big") & (1 << 36) - 1 == 8000 * 600  # STREAMINFO, bits of total samples
    for declared in (0, 100):
        content[21:26] = (int.from_bytes(content[21:26], "big") >> 36 << 36 | declared).to_bytes(5, "big")
        (tmp_path / "lying.flac").write_bytes(content)
        with contextlib.suppress(ValueError):  # It may also be called damaged.
            assert len(read_audio(tmp_path / "lying.flac", LIMITS, 8000).waveform) <= 2 * 8000
