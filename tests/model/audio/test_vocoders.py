"""The vocoder's prior against tones whose pitch and spectrum are known, and the model's contracts."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.audio.griffin_lim import griffin_lim, mel_to_magnitude
from model.audio.spectral import LogMel, MelSettings
from model.audio.vocoders import Vocoder, VocoderConfig, disperse

RATE = 16000
SMALL_HIFIGAN = {"architecture": "hifigan", "hifigan_width": 32, "hifigan_kernel_sizes": [3]}


def harmonic_tone(f0: torch.Tensor) -> torch.Tensor:
    """Fifteen harmonics of a fundamental given in Hz per sample, (1, S)."""
    phase = 2 * math.pi * (f0.double() / RATE).cumsum(0)
    return sum(torch.sin(k * phase) / k for k in range(1, 16)).float()[None] * 0.1


@pytest.fixture(scope="module")
def tone():
    """A glide from 110 to 220 Hz, one second."""
    return harmonic_tone(torch.linspace(110, 220, 62 * 256))


@pytest.fixture(scope="module")
def mel(tone):
    return LogMel(MelSettings())(tone)


def changed(preset="tiny", **overrides) -> Vocoder:
    """A model whose weights are none of those it starts with, so that every part has an effect."""
    torch.manual_seed(0)
    model = Vocoder.from_preset(preset, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def mel_l1(waveform, mel):
    return (LogMel(MelSettings())(waveform) - mel).abs().mean().item()


@pytest.mark.parametrize("frequency", [80.0, 123.4, 250.0, 440.0])
def test_pitch_of_a_steady_tone(frequency):
    generator = Vocoder.from_preset("tiny").generator
    mel = LogMel(MelSettings())(harmonic_tone(torch.full((40 * 256,), frequency)))
    f0, voicing = generator.prior.pitch(generator.prior.magnitude(mel), generator.transform)
    assert (f0[0, 4:-4] * RATE / frequency - 1).abs().max() < 0.02
    assert voicing[0, 4:-4].min() > 0.3


def test_cycles_follow_a_glide(tone, mel):
    generator = Vocoder.from_preset("tiny").generator
    f0, _ = generator.prior.pitch(generator.prior.magnitude(mel), generator.transform)
    true = torch.linspace(110, 220, 62 * 256).double() / RATE
    centres = torch.arange(62) * 256 + 128
    expected = true.cumsum(0)[centres] - true.cumsum(0)[centres[10]]
    error = (generator.prior.cycles(f0)[0] - generator.prior.cycles(f0)[0, 10]).double() - expected
    error = (error + 0.5).remainder(1) - 0.5
    assert error[10:40].abs().max() < 0.15


def test_phase_of_a_bin_is_that_of_the_nearest_harmonic():
    prior = Vocoder.from_preset("tiny").generator.prior
    comb, phase = prior.harmonics(torch.tensor([[128 / RATE]]), torch.tensor([[0.3]]))
    for k in range(513):
        harmonic = round(k * RATE / 1024 / 128)
        assert math.cos(phase[0, 0, k].item()) == pytest.approx(math.cos(2 * math.pi * 0.3 * harmonic), abs=1e-3)
        assert comb[0, 0, k].item() == pytest.approx(math.cos(2 * math.pi * k * RATE / 1024 / 128), abs=1e-4)


def test_prior_magnitudes_have_the_given_mel(mel):
    prior = Vocoder.from_preset("tiny", n_magnitude_updates=50).generator.prior
    found = LogMel(MelSettings()).from_magnitude(prior.magnitude(mel).transpose(1, 2))
    assert (found - mel).abs().mean() < 0.1


def test_gain_is_one_magnitude_update_and_at_most_tenfold(mel):
    prior = Vocoder.from_preset("tiny").generator.prior
    amplitude = mel.exp().transpose(1, 2)
    start = prior.magnitude(mel)
    updated = mel_to_magnitude(amplitude, prior.filters, prior.spread, n_iterations=1, start=start)
    assert torch.allclose(start * prior.mel_gain(mel, start), updated, rtol=1e-5, atol=1e-8)
    covered = prior.filters.sum(0) > 0
    exact = prior.mel_gain((start @ prior.filters.T).log().transpose(1, 2), start)
    assert torch.allclose(exact[..., covered], torch.ones(()), atol=1e-4)
    gain = prior.mel_gain(mel, torch.zeros_like(start))
    assert torch.allclose(gain[..., covered], torch.tensor(10.0), atol=1e-3)


def test_each_mel_projection_brings_the_mel_nearer(mel):
    distances = []
    for n in range(4):
        with torch.no_grad():
            distances.append(mel_l1(changed(n_mel_projections=n)(mel), mel))
    assert distances == sorted(distances, reverse=True) and distances[1] < 0.9 * distances[0]


def test_untrained_model_is_near_griffin_lim(mel):
    with torch.no_grad():
        untrained = Vocoder.from_preset("tiny").eval()(mel)
    one, sixty = (mel_l1(griffin_lim(mel, MelSettings(), n), mel) for n in (1, 60))
    assert sixty < one
    assert mel_l1(untrained, mel) < 0.5 * one + 0.5 * sixty


def test_griffin_lim_equals_librosas_quality(tone, mel):
    librosa = pytest.importorskip("librosa")
    magnitude = torch.stft(tone, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs()[0].numpy()
    smooth = librosa.feature.inverse.mel_to_stft(
        librosa.feature.melspectrogram(S=magnitude, sr=RATE, n_mels=80, fmax=8000), sr=RATE, power=1, fmax=8000
    )
    theirs = torch.from_numpy(librosa.griffinlim(smooth, n_iter=60, hop_length=256, random_state=0))[None]
    ours = griffin_lim(mel, MelSettings(), 60)
    assert mel_l1(ours, mel) < 1.1 * mel_l1(theirs[:, : ours.shape[1]], mel[..., : theirs.shape[1] // 256])


@pytest.mark.parametrize(
    "overrides",
    [{}, {"n_half_rate_layers": 1}, {"n_half_rate_layers": 2}, SMALL_HIFIGAN],
    ids=["istft", "one-half-rate", "two-half-rate", "hifigan"],
)
def test_chunks_equal_the_whole(overrides):
    model = changed("hifigan-v2" if "architecture" in overrides else "tiny", **overrides)
    mel = torch.randn(2, 80, 149, generator=torch.Generator().manual_seed(1)) - 5
    with torch.no_grad():
        whole = model(mel)
        assert whole.shape == (2, 149 * 256)
        assert (model.vocode_chunked(mel, 37) - whole).abs().max() <= 1e-5
        edges = model.generator(mel[..., :75])[:, -256:] - whole[:, 74 * 256 : 75 * 256]
    assert edges.abs().max() > 1e-4  # Without context the pieces would differ.


@pytest.mark.parametrize("overrides", [{}, SMALL_HIFIGAN], ids=["istft", "hifigan"])
def test_save_and_load(overrides, mel, tmp_path):
    model = changed(**overrides) if not overrides else changed("hifigan-v2", **overrides)
    model.save_pretrained(tmp_path)
    loaded = Vocoder.from_pretrained(tmp_path).eval()
    assert loaded.config.mel == model.config.mel
    with torch.no_grad():
        assert torch.equal(loaded(mel), model(mel))


def test_the_cycles_of_pieces_are_those_of_fp32_under_autocast():
    generator, mel = changed().generator, torch.randn(1, 80, 90, generator=torch.Generator().manual_seed(1)) - 5
    exact = generator.chunk_arguments(mel, 37)["cycles"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator.chunk_arguments(mel, 37)["cycles"], exact)


def test_older_checkpoints_load(mel):
    model, other = changed(), Vocoder.from_preset("tiny").eval()
    other.load_state_dict({**model.state_dict(), "generator.prior.is_low": torch.ones(513)})
    with torch.no_grad():
        assert torch.equal(other(mel), model(mel))


def test_half_rate_blocks_work_on_the_means_of_pairs():
    model, seen = changed(n_half_rate_layers=2), []
    generator = model.generator
    for block in generator.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = torch.randn(1, 61, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        generator.backbone(x)
    (_, before), (first, _), (_, last), (after, _) = seen
    assert [output.shape[1] for _, output in seen] == [61, 31, 31, 61]
    for i in range(61):
        pair = before[:, i - i % 2 : i - i % 2 + 2]  # The last of an odd number is alone.
        assert torch.allclose(first[:, i // 2], pair.mean(1), atol=1e-6)
        assert torch.allclose(after[:, i], before[:, i] + last[:, i // 2] - first[:, i // 2], atol=1e-6)


def test_more_half_rate_layers_than_layers_are_refused():
    with pytest.raises(ValueError, match="n_half_rate_layers=5 must be at most n_layers=4"):
        Vocoder.from_preset("tiny", n_half_rate_layers=5)


def test_samples_of_a_batch_do_not_mix(mel):
    model = changed()
    other = torch.randn_like(mel) - 5
    with torch.no_grad():
        assert (model(torch.cat([mel, other]))[:1] - model(mel)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["silence", "constant", "loud"])
def test_odd_mels_give_finite_gradients(kind):
    settings = MelSettings()
    mel = torch.full((1, 80, 32), {"silence": settings.log_floor, "constant": -3.0, "loud": 3.0}[kind])
    model = changed()
    with torch.autocast("cpu", torch.bfloat16):
        waveform = model(mel)
    assert waveform.dtype == torch.float32
    waveform.square().mean().backward()
    assert torch.isfinite(waveform).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if kind == "silence":
        assert waveform.abs().max() < 1e-2


def test_autocast_changes_little(mel):
    model = changed()
    with torch.no_grad():
        exact = model(mel)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(mel)
    assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_gradient_checkpointing_changes_nothing(mel):
    gradients = []
    for use in (False, True):
        model = changed().train()
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(mel).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_short_frames_suit_hifigan():
    config = VocoderConfig(architecture="hifigan", sample_rate=22050, n_fft=512)
    assert config.mel.n_fft == 512
    with pytest.raises(ValueError, match="f0_min=65"):
        VocoderConfig(sample_rate=22050, n_fft=512)


def test_no_graph_breaks(mel):
    model = changed()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(mel), model(mel), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 100, 20), "n_mels=80"), ((80, 20), "expected"), ((1, 80, 1), "too short")]
)
def test_impossible_mels_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Vocoder.from_preset("tiny")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"f0_min": 20.0}, "f0_min=20.0"),
        ({"hifigan_width": 256}, "hifigan_width=256 has no effect with architecture='istft'"),
        ({"architecture": "hifigan", "width": 64}, "width=64 has no effect with architecture='hifigan'"),
        ({"architecture": "hifigan", "hifigan_factors": [8, 8]}, "must be hop_length=256"),
        ({"architecture": "hifigan", "hifigan_width": 24}, "hifigan_width=24 must be divisible"),
        ({"architecture": "hifigan", "hifigan_kernel_sizes": [4]}, "must be odd"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VocoderConfig(**fields)


def test_dispersion_changes_no_magnitude_and_lowers_peaks():
    impulse = torch.zeros(1, 4096)
    impulse[0, 1000] = 1
    spectrum = torch.fft.rfft(disperse(impulse, 16000))[0]
    assert (spectrum.abs() - 1).abs().max() < 0.02
    # The delay grows from 0 at 0 Hz to 3 ms at half the sampling rate.
    turned = spectrum * torch.exp(2j * math.pi * torch.arange(2049) * 1000 / 4096)
    delay = -(turned[1:] / turned[:-1]).angle() * 4096 / (2 * math.pi * 16000)
    assert delay[205] == pytest.approx(3e-4, abs=1e-4) and delay[1844] == pytest.approx(2.7e-3, abs=1e-4)
    # Harmonics of 120 Hz with equal phases.
    pulses = sum(torch.cos(2 * math.pi * 120 * n * torch.arange(8000) / 16000) for n in range(1, 40))[None]
    assert disperse(pulses, 16000)[0, 500:-500].abs().max() < 0.7 * pulses.abs().max()


@pytest.mark.parametrize("n_samples", [100, 3584, 3585, 9001])
def test_dispersion_is_one_convolution_of_the_whole_waveform(n_samples):
    impulse = torch.zeros(1, 1024)
    impulse[0, 512] = 1
    taps = disperse(impulse, 16000)[0, 256:768]  # 256 samples before the impulse, 255 after it
    waveform = torch.randn(2, n_samples)
    padded = F.pad(waveform, (255, 256))[:, None]
    expected = F.conv1d(padded, taps.flip(0)[None, None])[:, 0]
    assert (disperse(waveform, 16000) - expected).abs().max() < 1e-5


def test_synthesis_has_no_click_where_a_tone_begins_and_ends():
    vocoder = Vocoder.from_preset("tiny")
    tone = 0.3 * torch.sin(2 * math.pi * 220 * torch.arange(256 * 40) / 16000)[None]
    mel = LogMel(vocoder.config.mel)(tone)
    with torch.no_grad():
        plain, waveform = vocoder(mel)[0].abs(), vocoder.synthesize(mel)[0].abs()
    middle = waveform[2000:-2000].max()
    assert plain[:150].max() > 1.5 * plain[2000:-2000].max()
    assert waveform[:150].max() < 1.2 * middle and waveform[-150:].max() < 1.2 * middle
    # Frames that reach over no end are as they were; short log-mels too.
    assert torch.equal(vocoder.soften_ends(mel)[..., 2:-2], mel[..., 2:-2])
    assert torch.equal(vocoder.soften_ends(mel[..., :4]), mel[..., :4])
