import math

import pytest
import torch

from model.image.recurrent_decoder import CanvasCode, pack, unpack
from model.image.recurrent_vae import RecurrentVAE, RecurrentVAEConfig
from model.image.vae import ImageVAE, PatchCode

TINY = {"image_size": 16, "encoder_widths": [8, 16], "latent_channels": 4, "decoder_width": 8, "n_steps": 3}
RATES = (0.25, 0.5, 1, 2, 4, 8)


def build(**changes):
    torch.manual_seed(0)
    vae = RecurrentVAE(RecurrentVAEConfig(**{**TINY, **changes}))
    for parameter in vae.parameters():  # Away from the zeros it starts with.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return vae.eval()


@pytest.fixture
def model():
    return build()


def images(n=2, height=16, width=24):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noise(n=2):
    return torch.randn(n, 4, 2, 3, generator=torch.Generator().manual_seed(2))


def gradients(model, **arguments):
    """Gradients of a loss on all images that have a graph."""
    model.zero_grad()
    output = model(image=images(), noise=noise(), **arguments)
    (output.reconstruction.square().mean() + output.intermediates.abs().sum() / 1000).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("patch_size, stages", [(2, 1), (4, 2), (2, 3)])
def test_shapes_round_trip(patch_size, stages):
    f = patch_size * 2 ** (stages - 1)
    vae = build(patch_size=patch_size, encoder_widths=[8] * stages, n_encoder_blocks=[1] * stages, image_size=32)
    output = vae(image=images(1, 32, 64))
    assert output.reconstruction.shape == (1, 3, 32, 64) and output.intermediates.shape == (2, 1, 3, 32, 64)
    assert output.mean.shape == output.logvar.shape == (1, *vae.latent_shape(32)[:1], 32 // f, 64 // f)


def test_starts_as_the_cosine_code_at_every_depth():
    vae = RecurrentVAE(RecurrentVAEConfig(**TINY))
    fields = {"image_size": 16, "encoder_widths": [8, 16], "decoder_widths": [8, 16], "latent_channels": 4}
    expected = ImageVAE.from_preset("tiny", **fields)(image=images())
    for k in (1, 2, 20):
        output = vae(image=images(), n_steps=k)
        torch.testing.assert_close(output.reconstruction, expected.reconstruction, atol=1e-5, rtol=0)
    assert (output.logvar == -5).all()


def test_decoding_is_the_recurrence_written_out(model):
    """The same steps by hand, on whole images and block by block."""
    silu, step, latents, P, f = torch.nn.functional.silu, model.decoder.step, noise(), 2, 8
    canvas = base = model.decoder.code(latents)
    state, correction = torch.zeros(2, 8, 12, 8), 0.0
    found = []
    for k in range(1, 6):
        scale, shift = step.embedding.out(silu(step.embedding.hidden(torch.tensor([k**-c for c in RATES])))).chunk(2)
        seen = torch.zeros(2, 8, 12, 8)
        for y in range(2):
            for x in range(3):
                block = canvas[:, :, f * y : f * y + f, f * x : f * x + f]
                patches = [
                    block[:, :, u : u + P, v : v + P].flatten(1) for u in range(0, f, P) for v in range(0, f, P)
                ]
                missing = latents[:, :, y, x] - step.code(torch.cat(patches, dim=1))
                features = step.latents_in(torch.cat([latents[:, :, y, x], missing], dim=1)).view(2, 4, 4, 8)
                seen[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = features
        spread = (state.var(3, correction=0, keepdim=True) + 1e-5).sqrt()
        normed = (state - state.mean(3, keepdim=True)) / spread
        unfolded = torch.nn.functional.pixel_unshuffle(canvas, P).permute(0, 2, 3, 1)
        proposed = normed * (1 + scale) + shift + seen + step.canvas_in(unfolded)
        for block in step.blocks:
            hidden = block.conv(block.norm(proposed).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            proposed = proposed + block.out(silu(hidden))
        share = (1, 1, 1, 3.5 / 4, 3.5 / 5)[k - 1]
        state = (1 - share) * state + share * proposed
        corrected = step.head(silu(step.norm_out(proposed))).permute(0, 3, 1, 2)
        correction = (1 - share) * correction + share * corrected
        canvas = base + torch.nn.functional.pixel_shuffle(correction, P)
        found.append(canvas)
    for k, image in zip((5, 1, 3), model.decode_steps(latents, [5, 1, 3])):
        torch.testing.assert_close(image, found[k - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(latents, n_steps=5), found[4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(latents), found[2], atol=1e-5, rtol=1e-5)


def test_the_canvas_code_starts_as_the_code_of_the_latents():
    code, canvas_code = PatchCode(8, 5, inverse=False), CanvasCode(8, 2, 5)
    for module in (code, canvas_code):
        module.weight.data.copy_(module.initial_weight())
        module.bias.data.zero_()
    canvas = torch.nn.functional.pixel_unshuffle(images(), 2).permute(0, 2, 3, 1)
    found = canvas_code(pack(canvas, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, code(images()), atol=1e-5, rtol=0)
    assert torch.equal(unpack(pack(canvas, 4), 4), canvas)


def test_forward_decodes_a_sample_of_the_posterior(model):
    output = model(image=images(), noise=noise(), n_steps=4, n_backprop_steps=2)
    shifted = output.mean + torch.exp(0.5 * output.logvar) * noise()
    before, last = model.decode_steps(shifted, [3, 4])
    torch.testing.assert_close(output.reconstruction, last)
    torch.testing.assert_close(output.intermediates, before[None])
    assert not len(model(image=images(), n_steps=1).intermediates)


def test_training_takes_full_steps(model):
    """Averaging starts at step 4, and outside training."""
    for n_steps, same in ((3, True), (4, False)):
        averaged = model.eval()(image=images(), n_steps=n_steps).reconstruction
        full = model.train()(image=images(), n_steps=n_steps).reconstruction
        assert torch.allclose(averaged, full, atol=1e-6) == same
    now = model.decoder.begin(noise())
    after, update = model.decoder.advance(now, 9)
    proposed = model.decoder.step(now.state, now.base, now.latents, log_step=torch.tensor(9.0).log())
    torch.testing.assert_close((after.state, update), proposed)


def test_step_numbers_matter_less_and_less(model):
    def embedded(k):
        return torch.cat(model.decoder.step.embedding(torch.tensor(float(k)).log())).detach()

    changes = [(embedded(2 * k) - embedded(k)).abs().max() for k in (1, 16, 256)]
    assert changes[0] > 1e-3 and changes[0] > changes[1] > changes[2] > 0
    assert (embedded(1.5) - embedded(1)).abs().max() < changes[0]  # Continuous: depths need not be whole numbers.


# ---- Early exit.


def alone(model, latent, threshold, n_steps):
    """One sample, decoded step by step until its image settles: the obvious loop."""
    previous = model.decoder.image(model.decoder.begin(latent))
    for k in range(1, n_steps + 1):
        (image,) = model.decode_steps(latent, [k])
        change = (image - previous).square().mean().sqrt().item()
        if change < threshold:
            return image, k
        previous = image
    return previous, n_steps


@pytest.fixture
def settling(model):
    """Latents of 12 samples, small to large, and a threshold that about half of them pass at step 4."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(12, 4, 2, 3, generator=generator) * torch.linspace(0.1, 8, 12).view(-1, 1, 1, 1)
    with torch.no_grad():
        before, after = model.decode_steps(latents, [3, 4])
    changes = (after - before).square().flatten(1).mean(1).sqrt().sort().values
    return latents, changes[5:7].mean().item()  # Between two samples: away from rounding.


def test_exit_equals_a_loop_per_sample(model, settling):
    latents, threshold = settling
    with torch.no_grad():
        decoded, steps = model.decode_until_settled(latents, threshold, 9)
        expected = [alone(model, latents[i : i + 1], threshold, 9) for i in range(12)]
        same = model.decode(latents, n_steps=9, exit_threshold=threshold)
    assert steps.tolist() == [k for _, k in expected] and len(set(steps.tolist())) >= 3
    torch.testing.assert_close(decoded, torch.cat([image for image, _ in expected]), atol=1e-5, rtol=0)
    assert torch.equal(same, decoded)


def test_settled_samples_leave_the_batch(model, settling):
    sizes = []
    model.decoder.step.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[1])))
    with torch.no_grad():
        _, steps = model.decode_until_settled(*settling, 9)
    assert sizes == [int((steps >= k).sum()) for k in range(1, int(steps.max()) + 1)] and sizes[0] > sizes[-1]


def test_exit_thresholds_at_the_ends(model):
    with torch.no_grad():
        never, steps = model.decode_until_settled(noise(), 1e-12, 5)
        assert steps.tolist() == [5, 5]
        torch.testing.assert_close(never, model.decode(noise(), n_steps=5))
        at_once, steps = model.decode_until_settled(noise(), 1e9)
        assert steps.tolist() == [1, 1]
        torch.testing.assert_close(at_once, model.decode(noise(), n_steps=1))


# ---- Training.


def saved_bytes(model, n_steps, n_backprop_steps):
    """Bytes of distinct tensors kept for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(image=images(), noise=noise(), n_steps=n_steps, n_backprop_steps=n_backprop_steps)
    assert output.reconstruction.requires_grad
    return sum(size for _, size in kept)


def test_memory_does_not_grow_with_the_depth(model):
    model.train()
    assert saved_bytes(model, 32, 4) <= 1.05 * saved_bytes(model, 8, 4)
    assert saved_bytes(model, 32, 32) > 2.5 * saved_bytes(model, 8, 8)  # What truncation saves.


def test_a_window_of_all_steps_is_the_full_graph(model):
    full, wide, cut = (gradients(model, n_steps=5, n_backprop_steps=n) for n in (None, 7, 2))
    assert all(torch.equal(full[name], wide[name]) for name in full)
    assert any(not torch.allclose(full[name], cut[name], rtol=1e-3) for name in full)


def test_truncated_gradient_is_that_of_the_last_steps_alone(model):
    cut = gradients(model, n_steps=5, n_backprop_steps=2)
    model.zero_grad()
    mean, logvar = model.encode(images())
    now = model.decoder.begin(mean + torch.exp(0.5 * logvar) * noise())
    for k in range(1, 4):
        now, _ = model.decoder.advance(now, k)
    now.state, now.correction = now.state.detach(), now.correction.detach()
    now, _ = model.decoder.advance(now, 4)
    intermediate = model.decoder.image(now)
    now, _ = model.decoder.advance(now, 5)
    (model.decoder.image(now).square().mean() + intermediate.abs().sum() / 1000).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(cut[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("n_refinements", [0, 2])
@pytest.mark.parametrize("n_steps, n_backprop_steps", [(1, 1), (2, 4), (9, 1), (9, 4)])
def test_every_parameter_takes_part_at_every_depth(bf16, n_refinements, n_steps, n_backprop_steps):
    model = build(n_posterior_refinements=n_refinements).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = gradients(model, n_steps=n_steps, n_backprop_steps=n_backprop_steps)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not [name for name, gradient in found.items() if not gradient.any()]


def test_gradient_checkpointing_changes_nothing(model):
    plain = gradients(model.train(), n_steps=4, n_backprop_steps=3)
    calls = []
    model.decoder.step.blocks[0].conv.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(model, n_steps=4, n_backprop_steps=3)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert len(calls) == 4 + 3  # The three steps with a graph run twice.
    plain_bytes = saved_bytes(build().train(), 4, 4)
    assert saved_bytes(model, 4, 4) < 0.8 * plain_bytes


def test_compiled_graphs_serve_every_depth():
    model, graphs = build(n_encoder_blocks=[0, 0]), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count)
    n_graphs = []
    with torch.no_grad():
        for n_steps in (2, 3, 9, 5):
            arguments = {"image": images(), "noise": noise(), "n_steps": n_steps}
            expected = model(**arguments).reconstruction
            torch.testing.assert_close(compiled(**arguments).reconstruction, expected)
            n_graphs.append(len(graphs))
    # The number of steps becomes a variable once it has changed.
    assert n_graphs[0] > 0 and n_graphs[1] == n_graphs[2] == n_graphs[3]


# ---- Posterior refinement.


def test_posterior_refinement_starts_at_nothing_and_is_used():
    plain, refined = (
        RecurrentVAE(RecurrentVAEConfig(**TINY, n_posterior_refinements=n)).requires_grad_(False) for n in (0, 2)
    )
    refined.load_state_dict(plain.state_dict(), strict=False)
    for first, second in zip(plain.encode(images()), refined.encode(images())):
        assert torch.equal(first, second)
    refined.refiner.head.weight.normal_(std=0.1)
    assert not torch.allclose(plain.encode(images())[0], refined.encode(images())[0], atol=1e-2)


def test_posterior_refinement_sees_the_error_of_the_reconstruction():
    model = build(n_posterior_refinements=1)
    seen = []
    model.refiner.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    with torch.no_grad():
        mean, _ = model.encode(images())
        (error, posterior, correction) = seen[0]
        before = posterior[:, :4]
        torch.testing.assert_close(error, images() - model.decode(before, n_steps=model.REFINEMENT_STEPS))
        torch.testing.assert_close(mean, before + correction[:, :4])


# ---- As every VAE.


def test_save_and_load_change_nothing(tmp_path):
    model = build(n_posterior_refinements=1)
    model.set_latent_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    model.save_pretrained(tmp_path)
    loaded = RecurrentVAE.from_pretrained(tmp_path)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    # Matrix products round differently where loaded weights lie at other offsets in memory.
    expected, found = (each(image=images()).reconstruction for each in (model, loaded))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_outputs_are_fp32_under_autocast(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(image=images(), noise=noise())
    assert {value.dtype for value in output.values()} == {torch.float32}
    exact = model(image=images(), noise=noise())
    torch.testing.assert_close(output.reconstruction, exact.reconstruction, atol=0.1, rtol=0.1)


def test_samples_are_independent(model):
    changed = torch.cat([images()[:1], -images()[1:]])
    assert torch.equal(model(image=images()).reconstruction[0], model(image=changed).reconstruction[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(torch.zeros(1, 3, 16, 20)), r"16x20 pixels cannot be encoded.*compression 8"),
        (lambda m: m.decode(torch.zeros(1, 3, 2, 2)), r"latents of shape \(1, 3, 2, 2\) cannot be decoded"),
        (lambda m: m.decode(noise(), n_steps=0), "n_steps=0 must be >= 1"),
        (lambda m: m.decode_steps(noise(), [2, 0]), "n_steps=0 must be >= 1"),
        (lambda m: m(image=images(), n_backprop_steps=0), "n_backprop_steps=0 must be >= 1"),
        (lambda m: m.decode(noise(), exit_threshold=0.0), "exit_threshold=0.0 must be > 0"),
    ],
)
def test_wrong_arguments_are_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_encoder_blocks": [1]}, r"n_encoder_blocks=\[1\] must have as many entries as encoder_widths"),
        ({"image_size": 20}, "image_size=20 must be divisible by the compression 8"),
        ({"encoder_widths": [8, 24]}, "24 must divide 4 \\* 8"),
        ({"latent_channels": 193}, "latent_channels=193 must be <= 192"),
        ({"n_steps": 0}, "n_steps=0 must be > 0"),
        ({"n_step": 2}, "no field 'n_step'; did you mean 'n_steps'"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RecurrentVAEConfig(**{**TINY, **wrong})


def test_untrained_latents_of_any_scale_stay_finite(model):
    with torch.no_grad():
        assert math.isfinite(model.decode(1e3 * noise(), n_steps=32).abs().max().item())
