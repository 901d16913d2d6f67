"""Decoding of whole, damaged, chained and headless files of many formats."""

import struct

import numpy as np
import pytest
import torch

from dataset_loading.audio.decoding import AudioReader, decode_audio
from tests.helpers.sounds import RATE, amplitude_at, encoded, tone


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"format": "WAV", "subtype": "PCM_16"}, 1e-4),
        ({"format": "WAV", "subtype": "FLOAT"}, 1e-7),
        ({"format": "FLAC", "subtype": "PCM_24"}, 1e-6),
        ({"format": "AIFF", "subtype": "PCM_16"}, 1e-4),
        ({"format": "OGG", "subtype": "VORBIS"}, 0.05),
        ({"format": "MP3"}, 0.03),
    ],
    ids=lambda value: value["format"] if isinstance(value, dict) else "",
)
def test_formats_from_path_and_bytes(tmp_path, options, tolerance):
    left, right = tone(440).numpy(), tone(1000).numpy()
    content = encoded(np.stack([left, right], 1), **options)
    (tmp_path / "clip").write_bytes(content)
    from_path, rate = decode_audio({"path": str(tmp_path / "clip"), "bytes": None})
    from_bytes, _ = decode_audio({"path": None, "bytes": content})
    assert rate == RATE and from_path.dtype == torch.float32 and torch.equal(from_path, from_bytes)
    assert from_path.shape == (2, RATE)
    middle = slice(2000, -2000)
    assert (from_path[0] - torch.from_numpy(left)).abs()[middle].max() < tolerance
    assert (from_path[1] - torch.from_numpy(right)).abs()[middle].max() < tolerance


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no audio of a known format"),
        (b"RIFF and nothing else", "no audio of a known format"),
        (encoded(tone(440).numpy(), format="WAV")[:9000], "cut off: .* of 32000 bytes"),
        (encoded(tone(440).numpy(), format="AIFF")[:9000], "cut off"),
        (encoded(tone(440).numpy(), format="FLAC")[:9000], "damaged"),
        (encoded(tone(440).numpy(), format="OGG")[:3000], "damaged"),
        (encoded(tone(440).numpy(), format="MP3")[:1500], r"damaged: \d+ of 16000"),
        (encoded(np.array([0.1, np.nan, 0.1]), format="WAV", subtype="FLOAT"), "no finite numbers"),
        (encoded(np.zeros(0), format="WAV"), "no samples"),
    ],
    ids=["empty", "text", "wav", "aiff", "flac", "ogg", "mp3", "nan", "none"],
)
def test_damaged_files_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        decode_audio({"path": None, "bytes": content})


@pytest.mark.parametrize("extra", [b"", b"LIST\x04\0\0\0INFO"])
def test_wav_files_whose_header_counts_too_little_are_read_or_named(extra):
    content = encoded(tone(440).numpy(), format="WAV")
    whole = decoded(content)
    head, samples = content[:36] + extra, content[44:]

    def wav(n_counted, rest=b""):
        return head + b"data" + struct.pack("<I", n_counted) + samples + rest

    # A recorder that was stopped before it wrote the size.
    assert torch.equal(decoded(wav(0)), whole)
    # One that was stopped after it had written one for a part of the samples.
    with pytest.raises(ValueError, match=r"damaged: .* 16000 bytes .* 16000 follow.*ffmpeg"):
        decoded(wav(16000))
    # Chunks behind the samples, and a little rest, are none of them.
    assert torch.equal(decoded(wav(32000, b"id3 " + struct.pack("<I", 8000) + bytes(8000))), whole)
    assert torch.equal(decoded(wav(32000, b"\xff" * 1000)), whole)
    with pytest.raises(ValueError, match="no samples"):
        decoded(content[:40] + bytes(4) + b"junk" + struct.pack("<I", 8000) + bytes(8000))


@pytest.mark.parametrize("rate", [1, 999, 4_000_000_000])
def test_sampling_rates_of_damaged_headers_are_refused(rate):
    content = bytearray(encoded(tone(440).numpy(), format="WAV"))
    content[24:28] = struct.pack("<I", rate)
    with pytest.raises(ValueError, match=rf"{rate} Hz|damaged"):
        decoded(bytes(content))


def test_a_tag_at_the_end_of_a_flac_file_is_no_damage():
    content = encoded(tone(440).numpy(), format="FLAC")
    assert torch.equal(decoded(content + b"TAG" + bytes(125)), decoded(content))


def test_lengths_of_streamed_files_are_no_damage():
    content = bytearray(encoded(tone(440).numpy(), format="WAV"))
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"
    samples, _ = decode_audio({"path": None, "bytes": bytes(content)})
    assert samples.shape == (1, RATE)


def test_guessed_lengths_of_mp3_files_are_no_damage():
    content = encoded(tone(440).numpy(), format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    headless = content.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))
    assert headless != content
    tag = b"ID3\x03\x00\x00" + bytes((0, 0, 0x1F, 0x76)) + b"Info" + bytes(0x1F * 128 + 0x76 - 4)
    for data in (headless, tag + headless):
        samples, _ = decode_audio({"path": None, "bytes": data})
        assert abs(samples.shape[1] - RATE) < 3000
    # Behind a tag, too, the header tells whether something is missing.
    with pytest.raises(ValueError, match=r"damaged: \d+ of 16000"):
        decode_audio({"path": None, "bytes": (tag + content)[: len(tag) + 1500]})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        decode_audio({"path": str(tmp_path / "gone.wav"), "bytes": None})


def decoded(content):
    return decode_audio({"path": None, "bytes": content}).samples


@pytest.fixture(scope="module")
def mp3():
    """Two seconds of noise, then a tone that tells how far a file was read."""
    noise = 0.3 * np.random.default_rng(0).standard_normal(RATE)
    return encoded(np.concatenate([noise, tone(440).numpy()]), format="MP3", bitrate_mode="VARIABLE")


def headless(content):
    return content.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))


@pytest.mark.parametrize(
    ("streams", "n_seconds"),
    [("h", 2), ("hh", 4), ("nn", 4), ("hn", 4), ("nh", 4), ("tn", 2), ("ntn", 4), ("hTh", 4), ("nT", 2)],
)
def test_mp3_streams_are_read_to_their_end(mp3, streams, n_seconds):
    tag = b"ID3\x03\x00\x00" + bytes((0, 0, 1, 4)) + b"Info" + bytes(128)
    parts = {"h": mp3, "n": headless(mp3), "t": tag, "T": b"TAG" + bytes(125)}
    samples = decoded(b"".join(parts[name] for name in streams))
    # A stream without a header does not tell what its encoder padded.
    assert 0 <= samples.shape[1] - n_seconds * RATE < 2500 * streams.count("n") + 1
    assert amplitude_at(samples[0, -RATE // 2 - 2500 : -2500], 440) == pytest.approx(0.5, rel=0.05)


def mp3_in_wav(content):
    kind = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, RATE, 1152, 0, 12, 1, 2, 1152, 1, 0)
    chunks = b"WAVEfmt " + struct.pack("<I", len(kind)) + kind + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def test_mp3_in_wav_is_read_to_its_end_or_damaged(mp3):
    assert decoded(mp3_in_wav(mp3)).shape == (1, 2 * RATE)
    assert decoded(mp3_in_wav(headless(mp3))).shape[1] >= 2 * RATE
    with pytest.raises(ValueError, match=r"damaged: \d+ of 32000"):
        decoded(mp3_in_wav(mp3[: len(mp3) // 2]))


@pytest.mark.parametrize("options", [{"format": "OGG", "subtype": "VORBIS"}, {"format": "OGG", "subtype": "OPUS"}])
def test_chained_ogg_files_are_read_to_their_end(options):
    links = [encoded(tone(frequency).numpy(), **options) for frequency in (440, 1000)]
    samples = decoded(links[0] + links[1])
    assert samples.shape == (1, 2 * RATE)
    assert amplitude_at(samples[0, RATE + 2000 : -2000], 1000) == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="cut off"):
        decoded(links[0] + links[1][:-100])


def test_flac_streams_behind_each_other_are_read_to_their_end():
    content = encoded(tone(440).numpy(), format="FLAC")
    assert torch.equal(decoded(content + content), decoded(content).repeat(1, 2))
    # A stream whose length was not known when it began.
    unknown = content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:]
    assert torch.equal(decoded(unknown), decoded(content))


def test_streams_that_differ_are_refused():
    links = [encoded(tone(440, rate=rate).numpy(), rate, format="OGG", subtype="VORBIS") for rate in (16000, 8000)]
    with pytest.raises(ValueError, match=r"16000 Hz.*8000"):
        decoded(links[0] + links[1])


@pytest.mark.parametrize("kind", ["WAV", "W64", "AIFF"])
def test_gsm_is_read_or_damaged(kind):
    content = encoded(tone(440).numpy(), format=kind, subtype="GSM610")
    assert decoded(content).shape[1] == pytest.approx(RATE, abs=320)
    with pytest.raises(ValueError, match=r"cut off: \d+ of \d+"):
        decoded(content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["AU", "W64", "RF64", "VOC", "NIST", "AVR", "MAT4", "MAT5"])
def test_other_formats_that_were_cut_off_are_named(kind):
    content = encoded(tone(440).numpy(), format=kind, subtype="PCM_16")
    assert decoded(content).shape == (1, RATE)
    with pytest.raises(ValueError, match=r"cut off"):
        decoded(content[: len(content) // 2])


@pytest.mark.parametrize(
    "options",
    [
        {"format": "WAV", "subtype": "PCM_24"},
        {"format": "FLAC"},
        {"format": "OGG", "subtype": "VORBIS"},
        {"format": "OGG", "subtype": "OPUS"},
        {"format": "MP3"},
    ],
    ids=lambda options: options.get("subtype", options["format"]),
)
def test_blocks_joined_are_the_file(options):
    content = encoded(np.stack([tone(440, 2).numpy(), tone(700, 2).numpy()], 1), **options)
    with AudioReader({"path": None, "bytes": content}) as reader:
        blocks = list(reader.blocks(7001))
        assert reader.n_samples == 2 * RATE and max(block.shape[1] for block in blocks) == 7001
    assert torch.equal(torch.cat(blocks, 1), decoded(content))
