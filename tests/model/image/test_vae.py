import pytest
import torch

from model.image.vae import ImageVAE, ImageVAEConfig, PatchCode, cosine_patterns

TINY = {"image_size": 16, "encoder_widths": [8, 16], "decoder_widths": [8, 16], "latent_channels": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    vae = ImageVAE(ImageVAEConfig(**TINY))
    for parameter in vae.parameters():  # Away from the zeros it starts with.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return vae


def images(n=2, height=16, width=24):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("patch_size, stages", [(2, 2), (4, 2), (4, 3)])
def test_shapes_round_trip(patch_size, stages):
    widths = {"encoder_widths": [8] * stages, "decoder_widths": [8] * stages}
    blocks = {"n_encoder_blocks": [1] * stages, "n_decoder_blocks": [1] * stages}
    vae = ImageVAE(ImageVAEConfig(image_size=32, patch_size=patch_size, latent_channels=5, **widths, **blocks))
    f = patch_size * 2 ** (stages - 1)
    assert vae.config.compression == f and vae.latent_shape(32) == (5, 32 // f, 32 // f)
    output = vae(image=images(1, 32, 64))
    assert output.reconstruction.shape == (1, 3, 32, 64)
    assert output.mean.shape == output.logvar.shape == (1, 5, 32 // f, 64 // f)


def test_starts_as_the_cosine_code():
    vae = ImageVAE(ImageVAEConfig(**TINY))
    flat = torch.tensor([0.5, -0.25, 0.75]).view(1, 3, 1, 1).expand(1, 3, 16, 16).contiguous()
    output = vae(image=flat)
    torch.testing.assert_close(output.reconstruction, flat, atol=1e-5, rtol=0)
    assert (output.logvar == -5).all()


def test_patterns_are_orthonormal_and_nested():
    patterns = cosine_patterns(4, 48)
    torch.testing.assert_close(patterns @ patterns.T, torch.eye(48), atol=1e-5, rtol=0)
    assert torch.equal(cosine_patterns(4, 10), patterns[:10])
    code, back = PatchCode(4, 48, inverse=False), PatchCode(4, 48, inverse=True)
    for module in (code, back):
        module.weight.data.copy_(module.initial_weight())
        module.bias.data.zero_()
    torch.testing.assert_close(back(code(images())), images(), atol=1e-5, rtol=0)


def test_noise_is_in_units_of_the_posterior(model):
    image = images()
    output = model(image=image, noise=torch.ones(2, 4, 2, 3))
    shifted = model.decode(output.mean + torch.exp(0.5 * output.logvar))
    torch.testing.assert_close(output.reconstruction, shifted)
    torch.testing.assert_close(model(image=image).reconstruction, model.decode(output.mean))


def test_save_and_load_change_nothing(model, tmp_path):
    model.set_latent_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    model.save_pretrained(tmp_path)
    loaded = ImageVAE.from_pretrained(tmp_path)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert torch.equal(model(image=images()).reconstruction, loaded(image=images()).reconstruction)


def test_zero_initialised_layers_stay_zero():
    vae = ImageVAE(ImageVAEConfig(**TINY))
    block = next(block for block in vae.decoder.blocks if hasattr(block, "out"))
    assert not block.out.weight.any() and not vae.decoder.head.weight.any() and not vae.encoder.head.weight.any()


def test_gradient_checkpointing_runs_blocks_twice(model):
    calls = []
    model.encoder.blocks[0].conv.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(image=images()).reconstruction.mean().backward()
    assert len(calls) == 2


def test_gradient_checkpointing_changes_nothing(model):
    def gradients():
        model.zero_grad()
        model.train()(image=images(), noise=torch.ones(2, 4, 2, 3)).reconstruction.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for first, second in zip(plain, gradients(), strict=True):
        assert torch.equal(first, second)


def test_compiles_without_graph_breaks(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(image=images(), noise=torch.ones(2, 4, 2, 3))
    torch.testing.assert_close(
        compiled(image=images(), noise=torch.ones(2, 4, 2, 3)).reconstruction, expected.reconstruction
    )


def test_posterior_stays_in_fp32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image=images(), noise=torch.zeros(2, 4, 2, 3))
    assert {value.dtype for value in output.values()} == {torch.float32}
    exact = model(image=images())
    torch.testing.assert_close(output.mean, exact.mean, atol=0.05, rtol=0.05)


def test_samples_are_independent(model):
    image = images()
    changed = torch.cat([image[:1], -image[1:]])
    assert torch.equal(model(image=image).reconstruction[0], model(image=changed).reconstruction[0])


def test_latent_statistics_standardise(model):
    model.set_latent_statistics(torch.full((4,), 2.0), torch.full((4,), 0.5))
    latents = torch.randn(2, 4, 2, 3)
    torch.testing.assert_close(model.normalize_latents(latents), (latents - 2) / 0.5)
    torch.testing.assert_close(model.denormalize_latents(model.normalize_latents(latents)), latents)


@pytest.mark.parametrize(
    "mean, std, message",
    [
        (torch.zeros(3), torch.ones(4), r"latent mean has shape \(3,\), expected \(4,\)"),
        (torch.zeros(4), torch.zeros(4), "latent std must be positive"),
        (torch.full((4,), torch.nan), torch.ones(4), "latent mean is not finite"),
    ],
)
def test_wrong_statistics_are_refused(model, mean, std, message):
    with pytest.raises(ValueError, match=message):
        model.set_latent_statistics(mean, std)


def test_wrong_sizes_are_refused(model):
    with pytest.raises(ValueError, match=r"16x20 pixels cannot be encoded.*compression 8"):
        model.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"latents of shape \(1, 3, 2, 2\) cannot be decoded"):
        model.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="image_size=20 is not divisible"):
        model.latent_shape(20)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_encoder_blocks": [1]}, r"n_encoder_blocks=\[1\] must have as many entries as encoder_widths"),
        ({"image_size": 20}, "image_size=20 must be divisible by the compression 8"),
        ({"encoder_widths": [8, 24]}, "24 must divide 4 \\* 8"),
        ({"latent_channels": 193}, "latent_channels=193 exceed the 192 values"),
        ({"n_norm_groups": 8}, "n_norm_groups=8 has no effect with architecture='residual'"),
        ({"use_quant_conv": True}, "use_quant_conv=True has no effect with architecture='residual'"),
        ({"architecture": "ldm"}, "patch_size=4 must be 1 for architecture='ldm'"),
        ({"architecture": "ldm", "patch_size": 1}, "n_norm_groups=32 must divide every width"),
        ({"architecture": "resnet"}, "architecture='resnet' must be one of"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageVAEConfig(**{**TINY, **wrong})
