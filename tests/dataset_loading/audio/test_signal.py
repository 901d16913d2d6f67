"""Decoding, resampling and conditioning, against tones and sums whose answers are known."""

import io
import math

import numpy as np
import pytest
import soundfile
import torch

from dataset_loading.audio.signal import (
    active_level,
    clipped_share,
    cut_at_pauses,
    decode_audio,
    frame_levels,
    is_silent,
    limit_peak,
    measured_loudness,
    normalize_loudness,
    remove_hum,
    resample,
    sliding_energy,
    trim_silence,
)

RATE = 16000


def tone(frequency, seconds=1.0, rate=RATE, *, amplitude=0.5):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate)).double() / rate).float()


def encoded(samples, rate=RATE, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def amplitude_at(waveform, frequency, rate=RATE):
    """Amplitude of one frequency, by projection on its cosine and sine."""
    phase = 2 * math.pi * frequency * torch.arange(len(waveform)) / rate
    return 2 * torch.complex(waveform * phase.cos(), waveform * phase.sin()).mean().abs().item()


# ---- Decoding.


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


@pytest.mark.parametrize("n_channels", [1, 2])
def test_mp3_files_of_varying_rate_are_read_to_their_end(n_channels):
    # Noise, which needs the highest bit rate, then four seconds of a soft tone: the guess is a fraction of that.
    noise = 0.5 * np.random.default_rng(0).standard_normal(RATE // 2)
    whole = np.concatenate([noise, 0.1 * tone(440, 4.0).numpy()])
    content = encoded(np.stack([whole] * n_channels, 1), format="MP3", bitrate_mode="VARIABLE", compression_level=0.0)
    headless = content.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))
    with soundfile.SoundFile(io.BytesIO(headless)) as file:
        assert file.frames < 0.8 * len(whole)
    for data in (headless, headless + b"TAG" + bytes(125)):
        samples, _ = decode_audio({"path": None, "bytes": data})
        assert samples.shape[0] == n_channels and 0 <= samples.shape[1] - len(whole) < 4000
        # The tone lasts until the end, but for what the encoder pads.
        assert amplitude_at(samples[0, -RATE - 4000 : -4000], 440) == pytest.approx(0.05, rel=0.05)
    # A last frame that is cut off is left out, and what is no frame is no end.
    samples, _ = decode_audio({"path": None, "bytes": headless[:-150]})
    assert len(whole) - 4000 < samples.shape[1] < len(whole) + 4000
    with pytest.raises(ValueError, match="damaged"):
        decode_audio({"path": None, "bytes": headless[:3000] + b"x" * 3000 + headless[6000:]})
    # With its header the length is exact.
    assert decode_audio({"path": None, "bytes": content}).samples.shape == (n_channels, len(whole))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        decode_audio({"path": str(tmp_path / "gone.wav"), "bytes": None})


# ---- Resampling.


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone_and_its_length(rate):
    heard = resample(tone(1000, 1.0, rate), rate, RATE)
    assert abs(len(heard) - RATE) <= 1
    assert (heard[1000:-1000] - tone(1000)[: len(heard)][1000:-1000]).abs().max() < 2e-4


@pytest.mark.parametrize("rate", [11127, 15999, 16003, 47999])
def test_rates_without_a_small_ratio_stay_in_tune(rate):
    heard = resample(tone(1000, 1.0, rate), rate, RATE)
    spectrum = torch.fft.rfft(heard[1000:15000] * torch.hann_window(14000), 1 << 18).abs()
    assert spectrum.argmax() * RATE / (1 << 18) == pytest.approx(1000, rel=2 ** (0.01 / 12) - 1)


def test_resampling_lets_nothing_fold_back():
    heard = resample(tone(9500, 1.0, 44100), 44100, RATE)
    assert heard[1000:-1000].abs().max() < 1e-3
    assert torch.equal(resample(heard, RATE, RATE), heard)


# ---- Measuring.


def test_levels_are_those_of_a_loop():
    waveform = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1
    levels = frame_levels(waveform, RATE)
    frames = [waveform[start : start + 320] for start in range(0, 1000, 320)]
    slow = [10 * math.log10(sum(x * x for x in frame.tolist()) / len(frame)) for frame in frames]
    assert levels.tolist() == pytest.approx(slow, abs=1e-3)
    energies = [float(waveform[i : i + 7].square().sum()) for i in range(994)]
    assert sliding_energy(waveform, 7).tolist() == pytest.approx(energies, abs=1e-6)


def test_pauses_do_not_count_as_active():
    waveform = tone(440)
    assert active_level(waveform, RATE) == pytest.approx(-9.03, abs=0.02)
    assert active_level(torch.cat([waveform, torch.zeros(3 * RATE)]), RATE) == pytest.approx(-9.03, abs=0.02)


def test_bs1770_gives_the_standards_example_and_short_waveforms_theirs():
    loudness = measured_loudness(tone(997, 2.0, 48000, amplitude=1.0), 48000, "bs1770")
    assert loudness == pytest.approx(-3.01, abs=0.3)  # BS.1770-4, annex 1; torchaudio's filter is 0.27 dB off.
    assert measured_loudness(tone(997, 0.2, 48000, amplitude=1.0), 48000, "bs1770") == pytest.approx(loudness, abs=0.2)


def test_silence_and_clipping_are_seen():
    assert is_silent(torch.zeros(4000), RATE) and is_silent(tone(440, amplitude=1e-3), RATE)
    assert not is_silent(torch.cat([torch.zeros(RATE), tone(440, 0.05, amplitude=0.01)]), RATE)
    assert clipped_share(tone(440)[None]) == 0
    loud = torch.stack([tone(440), (3 * tone(440)).clamp(-1, 1)])
    # A sine of amplitude 1.5 is beyond 1 for 1 - 2 / pi * asin(2 / 3) of the time.
    assert clipped_share(loud) == pytest.approx(1 - 2 / math.pi * math.asin(2 / 3), abs=0.005)


# ---- Conditioning.


@pytest.mark.parametrize("measure", ["active", "bs1770"])
def test_loudness_reaches_its_target(measure):
    waveform = torch.cat([tone(440, amplitude=0.02), torch.zeros(RATE)])
    assert measured_loudness(normalize_loudness(waveform, RATE, -23, measure=measure), RATE, measure) == pytest.approx(
        -23, abs=0.1
    )


def test_loudness_stops_at_full_scale():
    waveform = torch.cat([tone(440, amplitude=0.05), torch.tensor([0.9])])
    assert normalize_loudness(waveform, RATE, -9, measure="active").abs().max() == pytest.approx(1.0)
    assert torch.equal(limit_peak(waveform), waveform)


def test_trimming_leaves_the_margin():
    quiet = 1e-3 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    waveform = torch.cat([quiet[:8000], tone(440, 0.5), quiet])
    trimmed = trim_silence(waveform, RATE, 40)
    assert len(trimmed) == pytest.approx(8000 + 2 * 0.05 * RATE, abs=640)
    assert torch.equal(trim_silence(waveform, RATE, 90), waveform)
    assert torch.equal(trim_silence(tone(440), RATE, 40), tone(440))


@pytest.mark.parametrize("mains", [50, 60])
def test_hum_and_harmonics_go_and_the_voice_stays(mains):
    voice = tone(220, 3.0) + tone(1430, 3.0, amplitude=0.2)
    hum = sum(tone(mains * n, 3.0, amplitude=0.1 / n) for n in (1, 2, 3, 5))
    clean = remove_hum(voice + hum, RATE, mains)
    assert len(clean) == len(voice)
    for n in (1, 2, 3, 5):
        assert amplitude_at(clean, mains * n) < 0.05 * amplitude_at(hum, mains * n)
    assert amplitude_at(clean, 220) == pytest.approx(0.5, rel=0.03)
    assert amplitude_at(clean, 1430) == pytest.approx(0.2, rel=0.01)
    clean = remove_hum(voice, RATE, mains)
    assert (clean - voice)[RATE:-RATE].square().mean() < 1e-3 * voice.square().mean()  # No delay.


def test_cuts_fall_into_pauses_and_nothing_is_lost():
    words, pauses = [0.9, 1.6, 0.7, 1.2, 2.0, 0.4], 0.2
    waveform = torch.cat([torch.cat([tone(300, word), torch.zeros(round(pauses * RATE))]) for word in words])
    pieces = cut_at_pauses(waveform, RATE, 3 * RATE)
    assert torch.equal(torch.cat(pieces), waveform) and len(pieces) > 2
    for piece in pieces[:-1]:
        assert piece[-1] == 0 and RATE <= len(piece) <= 3 * RATE


@pytest.mark.parametrize("length", [100, 999, 1000, 1001, 1499, 1500, 1501, 2600, 12345])
def test_pieces_of_any_length_are_within_bounds(length):
    waveform = torch.randn(length, generator=torch.Generator().manual_seed(length))
    pieces = cut_at_pauses(waveform, 8000, 1000)
    assert torch.equal(torch.cat(pieces), waveform)
    assert max(map(len, pieces)) <= 1000
    assert length <= 1000 or min(map(len, pieces)) >= 333


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_filters_do_not_clip_loud_waveforms(scale):
    square = 0.95 * torch.sin(2 * torch.pi * 333 * torch.arange(16000) / 16000 + 0.3).sign()
    assert (remove_hum(scale * square, 16000, 50) - scale * remove_hum(square, 16000, 50)).abs().max() < 1e-4
    quieter = measured_loudness(scale * square, 16000, "bs1770") - measured_loudness(square, 16000, "bs1770")
    assert quieter == pytest.approx(20 * math.log10(scale), abs=0.01)
