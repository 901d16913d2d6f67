import math

import pytest
import torch

from model.audio.lengths import latents_to_sequence, sequence_to_latents
from model.audio.vae import AudioVAE, AudioVAEConfig

SIZES = {"n_mels": 16, "f_max": 8000.0, "width": 24, "n_encoder_blocks": 2, "n_decoder_blocks": 2, "kernel_size": 5}
ARCHITECTURES = {
    "conv1d": {"latent_channels": 6, "patch_frames": 2},
    "conv2d": {"architecture": "conv2d", "latent_channels": 3, "patch_frames": 4, "patch_bins": 4},
}
FLOOR = math.log(1e-5)


def make(architecture="conv1d", seed=0, **changes):
    torch.manual_seed(seed)
    model = AudioVAE(AudioVAEConfig(**{**SIZES, **ARCHITECTURES[architecture], **changes}))
    for parameter in model.parameters():  # Away from the zeros it starts with.
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.band_mean.copy_(torch.linspace(-4, -6, 16))
    model.band_std.copy_(torch.linspace(1, 2, 16))
    return model.eval()


def mels(n=2, n_frames=24, seed=1):
    return torch.randn(n, 16, n_frames, generator=torch.Generator().manual_seed(seed)) * 2 - 5


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return make(request.param)


# ---- Shapes.


@pytest.mark.parametrize("n_frames, L_1d, L_2d", [(24, 12, 6), (25, 13, 7), (1, 1, 1), (3, 2, 1)])
def test_shapes_of_any_length(n_frames, L_1d, L_2d):
    for architecture, shape in (("conv1d", (6, L_1d)), ("conv2d", (3, 4, L_2d))):
        model = make(architecture)
        assert model.latent_shape(n_frames) == shape
        output = model(mels(2, n_frames))
        assert output.reconstruction.shape == (2, 16, n_frames)
        assert output.mean.shape == output.logvar.shape == (2, *shape)
        assert model.latents_lengths(torch.tensor([n_frames])).tolist() == [shape[-1]]
        assert model.decode(output.mean).shape == (2, 16, shape[-1] * model.config.compression)


def test_patches_hold_every_value_once_and_come_back(model):
    mel = torch.arange(2 * 16 * 8.0).view(2, 16, 8)
    patches, c = model.to_patches(mel), model.config.patch_frames
    rows = patches if model.config.architecture == "conv2d" else patches[:, None]
    p = 16 // rows.shape[1]
    for row in range(rows.shape[1]):
        for frame in range(rows.shape[2]):
            block = mel[1, row * p : (row + 1) * p, frame * c : (frame + 1) * c]
            assert torch.equal(rows[1, row, frame], block.flatten())
    assert torch.equal(model.from_patches(patches), mel)


def test_noise_is_in_units_of_the_posterior(model):
    mel = mels()
    output = model(mel, noise=torch.ones(2, *model.latent_shape(24)))
    shifted = model.decode(output.mean + torch.exp(0.5 * output.logvar))
    torch.testing.assert_close(output.reconstruction, shifted)
    torch.testing.assert_close(model(mel).reconstruction, model.decode(output.mean))


# ---- Padding.


@pytest.mark.parametrize("changes", [{}, {"speakers": ["a", "b"]}, {"use_ctc": True}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_padding_changes_nothing_in_valid_frames(architecture, changes):
    model, lengths = make(architecture, **changes), [24, 17, 5, 1]
    speaker = torch.tensor([0, 1, 1, 0]) if changes.get("speakers") else None
    mel = mels(4, 40)  # What lies behind the clips is anything.
    noise = torch.randn(4, *model.latent_shape(40), generator=torch.Generator().manual_seed(2))
    batch = model(mel, torch.tensor(lengths), noise, speaker=speaker)
    for b, n in enumerate(lengths):
        L = model.latent_shape(n)[-1]
        told = None if speaker is None else speaker[b, None]
        one = model(mel[b : b + 1, :, :n], None, noise[b : b + 1, ..., :L], speaker=told)
        for name in ("mean", "logvar"):
            torch.testing.assert_close(batch[name][b, ..., :L], one[name][0], rtol=0, atol=1e-5)
            assert not batch[name][b, ..., L:].any()
        torch.testing.assert_close(batch.reconstruction[b, :, :n], one.reconstruction[0], rtol=0, atol=1e-5)
        assert (batch.reconstruction[b, :, n:] == model.config.mel.log_floor).all()
        if model.character_head is not None:
            torch.testing.assert_close(batch.character_logits[b, :L], one.character_logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_decoding_with_lengths_is_decoding_alone(model):
    lengths = torch.tensor([20, 9])
    mean, _ = model.encode(mels(), lengths)
    whole = model.decode(mean + 1.0, lengths)  # Latents in padding need not be 0.
    assert whole.shape == (2, 16, 20)
    L = model.latent_shape(9)[-1]
    torch.testing.assert_close(whole[1, :, :9], model.decode(mean[1:, ..., :L] + 1.0)[0, :, :9], rtol=0, atol=1e-5)


def test_no_gradient_flows_to_or_from_padding(model):
    mel = mels().requires_grad_()
    model(mel, torch.tensor([24, 9])).reconstruction.square().sum().backward()
    assert not mel.grad[1, :, 9:].any() and mel.grad[1, :, :9].any()


def test_samples_are_independent(model):
    changed = torch.cat([mels()[:1], -mels()[1:]])
    assert torch.equal(model(mels()).reconstruction[0], model(changed).reconstruction[0])


# ---- What it starts as.


@torch.no_grad()
def test_it_starts_as_the_principal_components_of_patches():
    model = AudioVAE(AudioVAEConfig(**SIZES, **ARCHITECTURES["conv1d"]))
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0, 32)
    clips = []
    for i in range(8):
        patches = torch.randn(100, 32, generator=torch.Generator().manual_seed(i)) @ mixing.T
        clips.append(model.from_patches(patches[None])[0] - 5)
    model.fit_to_data(clips)
    everything = torch.cat(clips, 1)
    torch.testing.assert_close(model.band_mean, everything.mean(1))
    torch.testing.assert_close(model.band_std, everything.std(1), rtol=1e-3, atol=0)

    mean, logvar = model.encode(everything[None])
    torch.testing.assert_close(mean[0].mean(1), torch.zeros(6), rtol=0, atol=0.1)
    torch.testing.assert_close(mean[0].std(1), torch.ones(6), rtol=0, atol=0.05)
    assert (logvar < 0).all() and (logvar[0, 1:, 0] >= logvar[0, :-1, 0]).all()
    # No linear code of 6 numbers is better than a singular value decomposition.
    centred = everything - model.band_mean[:, None]
    patches = centred.view(16, -1, 2).transpose(0, 1).reshape(-1, 32).double()
    _, _, V = torch.linalg.svd(patches, full_matrices=False)
    best = (patches - patches @ V[:6].T @ V[:6]).square().mean()
    error = (model(everything[None]).reconstruction[0] - everything).square().mean()
    assert error.item() == pytest.approx(best.item(), rel=1e-3)


@torch.no_grad()
def test_fitting_survives_silence_and_constant_clips(model):
    model.fit_to_data([torch.full((16, 9), FLOOR), torch.full((16, 1), FLOOR)])
    output = model(torch.full((1, 16, 5), FLOOR))
    assert all(value.isfinite().all() for value in (output.reconstruction, output.mean, output.logvar))


def test_without_data_it_starts_as_a_code_of_finite_scale():
    vae = AudioVAE(AudioVAEConfig(**SIZES, **ARCHITECTURES["conv1d"]))
    flat = torch.full((1, 16, 8), -7.0)
    torch.testing.assert_close(vae(flat).reconstruction, flat, atol=1e-4, rtol=0)
    assert (vae(flat).logvar == -5).all()


# ---- Saving, checkpointing, precision.


def test_save_and_load_change_nothing(model, tmp_path):
    Z = model.config.latent_channels
    model.set_latent_statistics(torch.arange(float(Z)), torch.arange(1.0, Z + 1))
    model.save_pretrained(tmp_path)
    loaded = AudioVAE.from_pretrained(tmp_path)
    assert loaded.config.mel == model.config.mel
    assert {"band_mean", "band_std", "latent_mean", "latent_std"} <= model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert torch.equal(model(mels()).reconstruction, loaded(mels()).reconstruction)


def test_latent_statistics_standardise(model):
    Z = model.config.latent_channels
    model.set_latent_statistics(torch.full((Z,), 2.0), torch.full((Z,), 0.5))
    latents = torch.randn(2, *model.latent_shape(24))
    torch.testing.assert_close(model.normalize_latents(latents), (latents - 2) / 0.5)
    torch.testing.assert_close(model.denormalize_latents(model.normalize_latents(latents)), latents)


def test_gradient_checkpointing_runs_blocks_twice_and_changes_nothing(model):
    def gradients():
        model.zero_grad()
        model.train()(mels(), noise=torch.ones(2, *model.latent_shape(24))).reconstruction.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, calls = gradients(), []
    assert len(plain) == len([*model.parameters()])
    model.encoder.blocks[0].conv.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for first, second in zip(plain, gradients(), strict=True):
        assert torch.equal(first, second)
    assert len(calls) == 2


@torch.no_grad()
def test_posterior_stays_in_fp32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(mels(), noise=torch.zeros(2, *model.latent_shape(24)))
    assert {value.dtype for value in output.values()} == {torch.float32}
    torch.testing.assert_close(output.mean, model(mels()).mean, atol=0.1, rtol=0.1)


def test_compiles_without_graph_breaks(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    lengths = torch.tensor([24, 9])
    torch.testing.assert_close(compiled(mels(), lengths).reconstruction, model(mels(), lengths).reconstruction)


# ---- Speakers and characters.


def test_speakers_begin_without_effect_and_are_learned(model):
    told = make(model.config.architecture, speakers=["a", "b"])
    for block in [*told.encoder.blocks, *told.decoder.blocks]:
        torch.nn.init.zeros_(block.speaker.weight)
        torch.nn.init.zeros_(block.speaker.bias)
    one, two = torch.tensor([0, 0]), torch.tensor([1, 1])
    assert torch.equal(told(mels(), speaker=one).reconstruction, told(mels(), speaker=two).reconstruction)
    optimizer = torch.optim.Adam(told.parameters(), lr=1e-2)
    for _ in range(3):  # Each speaker's mels are louder or quieter by something that the mel does not tell.
        optimizer.zero_grad()
        output = told(mels(), speaker=torch.tensor([0, 1])).reconstruction
        (output - mels() - torch.tensor([1.0, -1.0]).view(2, 1, 1)).abs().mean().backward()
        optimizer.step()
    difference = told(mels(), speaker=one).reconstruction - told(mels(), speaker=two).reconstruction
    assert difference.mean() > 0.01


def test_speakers_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"needs a speaker: config\.speakers has 2 names"):
        make(speakers=["a", "b"])(mels())
    with pytest.raises(ValueError, match="knows no speakers, but one is given"):
        make()(mels(), speaker=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"n_frames has shape \(1,\), expected \(2,\)"):
        make()(mels(), torch.tensor([3]))
    for wrong in ([24, 0], [25, 3]):
        for call in (make(), make().encode):
            with pytest.raises(ValueError, match=rf"n_frames=\[{wrong[0]}, {wrong[1]}\] must lie between 1 and 24"):
                call(mels(), torch.tensor(wrong))
        with pytest.raises(ValueError, match="must lie between 1 and 24"):
            make().decode(torch.zeros(2, 6, 12), torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"\(2, 15, 24\) cannot be encoded: expected \(B, 16, F\)"):
        make().encode(mels()[:, 1:])
    with pytest.raises(ValueError, match=r"\(1, 6, 0\) cannot be decoded"):
        make().decode(torch.zeros(1, 6, 0))
    with pytest.raises(ValueError, match=r"\(1, 3, 5\) cannot be decoded: expected \(B, 3, 4, L\)"):
        make("conv2d").decode(torch.zeros(1, 3, 5))


def test_characters_can_be_read(model):
    reading = make(model.config.architecture, use_ctc=True)
    logits = reading(mels()).character_logits
    assert logits.shape == (2, reading.latent_shape(24)[-1], 258) and model(mels()).character_logits is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"latent_channels": 33}, "latent_channels=33 exceed the 32 mel values of a patch"),
        ({"patch_bins": 4}, "patch_bins=4 has no effect with architecture='conv1d'"),
        ({"architecture": "conv2d", "patch_bins": 5}, "patch_bins=5 must divide n_mels=16"),
        ({"architecture": "conv3d"}, "architecture='conv3d' must be one of"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"speakers": ["a", "a"]}, "names one twice"),
        ({"hop_length": 300}, "hop_length=300 must divide n_fft=1024"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AudioVAEConfig(**{**SIZES, **ARCHITECTURES["conv1d"], **wrong})


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 5, 3, 7)])
def test_latents_are_sequences_of_vectors_and_back(shape):
    latents = torch.randn(shape)
    sequence = latents_to_sequence(latents)
    assert sequence.shape == (2, 7, latents[0].numel() // 7)
    assert torch.equal(sequence[1, 3], latents[1, ..., 3].flatten())
    assert torch.equal(sequence_to_latents(sequence, 5), latents)


def test_long_inputs_take_several_passes_with_the_same_result(model, monkeypatch):
    mel, n_frames = mels(n_frames=301), torch.tensor([301, 77])
    whole, lengths = model(mel, n_frames), []
    model.decoder.register_forward_hook(lambda module, inputs, outputs: lengths.append(inputs[0].shape[-2]))
    per_frame = 2 * 24 * 2 * model.config.n_rows
    monkeypatch.setattr("model.audio.vae_network.MAX_VALUES", 20 * per_frame)
    with torch.no_grad():
        pieces = model(mel, n_frames)
    assert len(lengths) > 3 and max(lengths) <= 20 + 2 * model.decoder.context
    for name in ("reconstruction", "mean", "logvar"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-4, atol=1e-4)
    model(mel, n_frames)  # With gradients there is one pass.
    assert lengths[-1] == -(-301 // model.config.compression)
    # So there is where ZeRO-3 shards the weights, which it marks by a number.
    for network in (model.encoder, model.decoder):
        monkeypatch.setattr(network.stem.weight, "ds_id", 0, raising=False)
    lengths.clear()
    with torch.no_grad():
        model(mel, n_frames)
    assert lengths == [-(-301 // model.config.compression)]
