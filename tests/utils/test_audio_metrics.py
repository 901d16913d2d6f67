"""Metrics of sound against known values, slow computations and what must hold of them on speech."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset_loading.audio import resample
from dataset_loading.speech import load_speaker
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel, MelSettings
from utils.audio_metrics import (
    Recognizer,
    SpeakerEncoder,
    import_optional,
    mcd,
    mel_l1,
    multi_resolution_stft_distance,
    normalize_text,
    number_words,
    pesq_wb,
    pesq_wb_and_mean,
    pesq_wb_starts,
    stoi,
    voicing_and_periodicity,
    word_error_rate,
    word_errors,
)
from utils.pitch import Pitch, normalized_cross_correlation, pitch_scores, track_pitch

RATE = 16000
SENTENCE = "Please say the name of the person that you are calling."


@pytest.fixture(scope="module")
def speech():
    """One spoken sentence at 16 kHz, (S,)."""
    speaker = load_speaker()
    return resample(speaker.speak(SENTENCE, "en-us+f2", 150, 50), speaker.sample_rate, RATE)


@pytest.fixture(scope="module")
def noisy(speech):
    """The sentence with noise at 30, 15 and 0 dB."""
    noise = torch.randn(speech.shape, generator=torch.Generator().manual_seed(0)) * speech.square().mean().sqrt()
    return [speech + noise * 10 ** (-snr / 20) for snr in (30, 15, 0)]


def tone(f0, seconds: float = 1.0, rate: int = RATE) -> torch.Tensor:
    """Five harmonics of a pitch in Hz, a number or a function of time."""
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    phase = 2 * math.pi * torch.cumsum(torch.as_tensor(f0(time) if callable(f0) else f0 + 0 * time), 0) / rate
    return sum(torch.sin(k * phase) / k for k in range(1, 6)).float() * 0.3


# ---- Of waveforms.


def test_a_clip_against_itself_is_perfect(speech):
    assert pesq_wb(speech, speech, RATE) == pytest.approx(4.644, abs=1e-3)
    assert stoi(speech, speech, RATE) == pytest.approx(1.0, abs=1e-6)
    assert multi_resolution_stft_distance(speech, speech) == 0
    same = voicing_and_periodicity(speech, speech, RATE)
    assert same == {"voicing_f1": 1.0, "periodicity_rmse": 0.0, "f0_rmse_cents": 0.0}


def test_pesq_depends_on_the_start_and_its_mean_does_not(speech):
    log_mel = LogMel(MelSettings())
    speech = speech[: len(speech) // 256 * 256]
    made = griffin_lim(log_mel(speech[None]), MelSettings())[0]
    values = [pesq_wb(speech[start:], made[start:], RATE) for start in (0, 64, 128, 192)]
    assert max(values) - min(values) > 0.1
    assert pesq_wb_starts(speech, made, RATE) == pytest.approx(sum(values) / 4)
    assert pesq_wb_and_mean(speech, made, RATE) == (values[0], pytest.approx(sum(values) / 4))
    moved = [pesq_wb_starts(speech[start:], made[start:], RATE) for start in (0, 32, 96)]
    assert max(moved) - min(moved) < 0.5 * (max(values) - min(values))
    assert pesq_wb_starts(speech[:3900], made[:3900], RATE) is None


def test_pesq_of_a_recording_with_more_utterances_than_the_package_holds():
    random = torch.Generator().manual_seed(0)
    burst = torch.cat([0.3 * torch.randn(4800, generator=random), torch.zeros(4800)])
    reference = burst.repeat(90)  # 54 s; the package crashes on it.
    degraded = reference + 0.01 * torch.randn(len(reference), generator=random)
    pieces = zip(reference.chunk(4), degraded.chunk(4))
    expected = sum(pesq_wb(*piece, RATE) for piece in pieces) / 4
    assert pesq_wb(reference, degraded, RATE) == pytest.approx(expected) and 1 < expected < 4
    silent = torch.zeros(40 * RATE)
    assert pesq_wb(silent, silent, RATE) is None


def test_noise_makes_every_metric_worse_and_more_noise_more_so(speech, noisy):
    for metric, sign in ((pesq_wb, -1), (stoi, -1)):
        values = [sign * metric(speech, each, RATE) for each in (speech, *noisy)]
        assert values == sorted(set(values)), metric.__name__
    distances = [multi_resolution_stft_distance(speech, each) for each in (speech, *noisy)]
    assert distances == sorted(set(distances))
    assert voicing_and_periodicity(speech, noisy[2], RATE)["voicing_f1"] < 0.95


def test_other_rates_and_lengths_are_taken(speech):
    high = resample(speech, RATE, 24000)
    assert pesq_wb(high, high[:-100], 24000) > 4.5 and stoi(high, high[:-100], 24000) > 0.99
    assert pesq_wb(speech.numpy(), speech.numpy(), RATE) > 4.6


@pytest.mark.parametrize("metric", [pesq_wb, stoi, lambda a, b, rate: multi_resolution_stft_distance(a, b)])
def test_silence_and_clips_that_are_too_short_have_no_score(metric, speech):
    assert metric(torch.zeros(RATE), torch.zeros(RATE), RATE) is None
    assert metric(speech[2000:2300], speech[2000:2300], RATE) is None


def test_a_waveform_must_be_one_and_finite(speech):
    with pytest.raises(ValueError, match=r"shape \(S,\) with S > 0, got \(1, \d+\)"):
        pesq_wb(speech[None], speech, RATE)
    broken = speech.clone()
    broken[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        multi_resolution_stft_distance(speech, broken)


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"'no_such_package'.*pip install -r requirements-eval.txt"):
        import_optional("no_such_package")


def test_stft_distance_equals_its_formula(speech, noisy):
    import librosa

    a, b = (each[: 16000 // 512 * 512].numpy() for each in (speech, noisy[1]))
    total = 0.0
    for n_fft, hop in ((512, 128), (1024, 256), (2048, 512)):
        padded = [np.pad(each, (n_fft - hop) // 2, mode="reflect") for each in (a, b)]
        real, made = (np.abs(librosa.stft(each, n_fft=n_fft, hop_length=hop, center=False)) for each in padded)
        total += np.linalg.norm(real - made) / np.linalg.norm(real)
        total += np.abs(np.log(np.maximum(real, 1e-5)) - np.log(np.maximum(made, 1e-5))).mean()
    found = multi_resolution_stft_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(total / 3, rel=1e-4)


# ---- Of log-mels.


def test_mel_l1_counts_valid_frames_only():
    a, b = torch.zeros(4, 6), torch.zeros(4, 8)
    b[:, 3:] = 7.0
    b[0, 0] = -1.2
    assert mel_l1(a, b, 3) == pytest.approx(1.2 / 12)
    assert mel_l1(a, b) == pytest.approx((1.2 + 3 * 4 * 7) / 24)
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(5, 6\)"):
        mel_l1(a, torch.zeros(5, 6))
    with pytest.raises(ValueError, match="share none"):
        mel_l1(a, b, 0)


def test_mcd_equals_a_cosine_transform_written_out():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 20, 7))
    total = 0.0
    for frame in range(7):
        squares = 0.0
        for i in range(1, 14):
            c = sum(2 / 20 * (a - b)[k, frame] * math.cos(math.pi * i * (k + 0.5) / 20) for k in range(20))
            squares += c**2
        total += 10 / math.log(10) * math.sqrt(2 * squares)
    assert mcd(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(total / 7, rel=1e-5)


def test_mcd_is_the_difference_in_decibels_and_leaves_the_level_out():
    a = torch.randn(80, 30, generator=torch.Generator().manual_seed(0))
    assert mcd(a, a + 2.0) == pytest.approx(0, abs=1e-5)
    # A ripple of one cosine: its root mean square in dB.
    ripple = 0.1 * torch.cos(math.pi * 3 * (torch.arange(80) + 0.5) / 80)[:, None]
    assert mcd(a, a + ripple) == pytest.approx(20 / math.log(10) * 0.1 / math.sqrt(2), rel=1e-4)


# ---- Pitch.


@pytest.mark.parametrize("f0", [70.0, 110.3, 220.0, 440.0, 523.2])
def test_the_pitch_of_a_tone_is_found_within_two_cents(f0):
    pitch = track_pitch(tone(f0), RATE)
    inner = slice(5, -5)
    assert pitch.voiced[inner].all() and len(pitch.f0) == 100
    assert (1200 * (pitch.f0[inner] / f0).log2()).abs().max() < 2 and pitch.periodicity[inner].min() > 0.99


def test_a_sweep_is_followed_at_every_rate():
    for rate in (8000, 16000, 24000):
        pitch = track_pitch(tone(lambda time: 100 * 4 ** (time / 2), 2.0, rate), rate)
        truth = 100 * 4 ** (torch.arange(200) / 100 / 2)
        assert pitch.voiced[5:-5].all() and (1200 * (pitch.f0 / truth)[5:-5].log2()).abs().max() < 20


def test_noise_and_silence_are_unvoiced_and_levels_do_not_matter(speech):
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert track_pitch(noise, RATE).voiced.float().mean() < 0.05
    silent = track_pitch(torch.zeros(RATE), RATE)
    assert not silent.voiced.any() and silent.periodicity.max() == 0
    loud, soft = track_pitch(speech, RATE), track_pitch(speech * 1e-3, RATE)
    assert torch.equal(loud.voiced, soft.voiced) and torch.allclose(loud.f0, soft.f0, rtol=1e-3)


def test_correlation_equals_sums_written_out():
    waveform = torch.randn(900, generator=torch.Generator().manual_seed(0))
    found = normalized_cross_correlation(waveform, 60)
    padded = torch.nn.functional.pad(waveform.double(), (200, 4000))
    frame = padded[160 * 3 : 160 * 3 + 400 + 60]
    frame = frame - frame[:400].mean()
    head, late = frame[:400], frame[37:437]
    expected = (head * late).sum() / (head.square().sum() * late.square().sum()).sqrt()
    assert found[3, 37] == pytest.approx(expected.item(), rel=1e-3) and found[3, 0] == pytest.approx(1, abs=1e-3)


def test_our_pitch_agrees_with_another_tracker(speech):
    import librosa

    f0, voiced, _ = librosa.pyin(speech.numpy(), fmin=60, fmax=550, sr=RATE, frame_length=1024, hop_length=160)
    ours = track_pitch(speech, RATE)
    both = torch.from_numpy(voiced[: len(ours.f0)]) & ours.voiced[: len(voiced)]
    cents = 1200 * (ours.f0[: len(voiced)][both] / torch.from_numpy(f0[: len(ours.f0)])[both]).log2()
    assert both.float().mean() > 0.4 and cents.abs().median() < 20 and (cents.abs() > 100).float().mean() < 0.1


def test_pitch_scores_by_hand():
    def pitch(f0, periodicity):
        f0 = torch.tensor(f0)
        return Pitch(f0, f0 > 0, torch.tensor(periodicity))

    scores = pitch_scores(pitch([100.0, 0.0, 200.0], [1.0, 0.5, 1.0]), pitch([100.0, 50.0, 400.0], [1.0, 0.5, 0.4]))
    assert scores["voicing_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert scores["periodicity_rmse"] == pytest.approx(math.sqrt(0.36 / 3))
    assert scores["f0_rmse_cents"] == pytest.approx(math.sqrt(1200**2 / 2))
    silent = pitch([0.0], [0.0])
    assert pitch_scores(silent, silent) == {"voicing_f1": None, "periodicity_rmse": 0.0, "f0_rmse_cents": None}


# ---- Words.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Press 1, then 42!", "press one then forty two"),
        ("It's 3.05 %; don\u2019t re-dial", "its three point zero five percent dont re dial"),
        ("Room 1,234 & caf\u00e9_12", "room one thousand two hundred thirty four and cafe twelve"),
        ("...", ""),
    ],
)
def test_texts_are_normalised(text, words):
    assert normalize_text(text) == words.split()


def test_numbers_are_spelled_out():
    found = [number_words(n) for n in (0, 19, 20, 99, 100, 110, 1000, 20_015, 999_999, 1_000_002)]
    assert found == [
        "zero",
        "nineteen",
        "twenty",
        "ninety nine",
        "one hundred",
        "one hundred ten",
        "one thousand",
        "twenty thousand fifteen",
        "nine hundred ninety nine thousand nine hundred ninety nine",
        "one zero zero zero zero zero two",
    ]


def test_word_error_rate_by_hand():
    assert word_errors(["a", "b", "c", "d"], ["a", "x", "c"]) == 2  # one substituted, one left out
    assert word_errors([], ["a", "b"]) == 2 and word_errors(["a", "b"], []) == 2
    assert word_error_rate(["Press 1 now.", "hello there"], ["press one", "hello, there you"]) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="1 texts and 0 hypotheses"):
        word_error_rate(["a"], [])
    with pytest.raises(ValueError, match="no words"):
        word_error_rate(["..."], ["a"])


@given(st.lists(st.sampled_from("abc"), max_size=4), st.lists(st.sampled_from("abc"), max_size=4))
def test_word_errors_equal_the_recursion(a, b):
    def slow(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert word_errors(a, b) == slow(len(a), len(b))


def test_a_spoken_sentence_is_recognised(speech):
    recognizer = Recognizer()
    assert word_error_rate([SENTENCE], [recognizer.transcribe(speech, RATE)]) <= 0.2
    high = resample(speech, RATE, 22050)
    assert word_error_rate([SENTENCE], [recognizer.transcribe(high, 22050)]) <= 0.2


def test_a_voice_resembles_itself_more_than_another(speech):
    speaker, encoder = load_speaker(), SpeakerEncoder()
    other = resample(speaker.speak("Something else is said here.", "en-us+m7", 140, 20), speaker.sample_rate, RATE)
    assert encoder.similarity(speech, speech, RATE) == pytest.approx(1, abs=1e-5)
    assert encoder.similarity(speech, speech * 0.1, RATE) > 0.9 > encoder.similarity(speech, other, RATE)
    assert encoder.similarity(speech, torch.zeros(RATE), RATE) is None


def test_noise_raises_the_distance_of_log_mels(speech, noisy):
    log_mel = LogMel(MelSettings())
    mel = log_mel(speech[None])[0]
    for metric in (mel_l1, mcd):
        values = [metric(mel, log_mel(each[None])[0]) for each in (speech, *noisy)]
        assert values[0] == 0 and values == sorted(set(values))
