import pytest
import torch

from model.image.diffusion import ImageDiffusion, ImageDiffusionConfig
from model.layers import ZeroConv2d, ZeroLinear
from model.text.tokenizer import encode_caption, pad_tokens

TINY = {
    "latent_channels": 4,
    "latent_size": 8,
    "widths": [8, 16],
    "n_blocks": [1, 1],
    "head_width": 8,
    "text_width": 16,
    "text_head_width": 8,
    "max_tokens": 32,
    "n_gram_buckets": 16,
}
FROZEN = {**TINY, "text_encoder": "frozen", "text_embedding_width": 12}
VARIANTS = {
    "bytes": TINY,
    "frozen": FROZEN,
    "ldm": {**TINY, "architecture": "ldm", "n_norm_groups": 4, "n_heads": 2},
}


def build(name="bytes", **changes):
    """A model away from the zeros it starts with."""
    torch.manual_seed(0)
    model = ImageDiffusion(ImageDiffusionConfig(**{**VARIANTS[name], **changes}))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(model, captions=("a red apple", "sun"), multiple=8):
    """Arguments of forward."""
    tokens, mask = pad_tokens([encode_caption(caption, 32) for caption in captions], multiple)
    generator = torch.Generator().manual_seed(1)
    B = len(captions)
    text = {"tokens": tokens, "mask": mask}
    if model.config.text_encoder == "frozen":
        text = {"text_states": torch.randn(B, tokens.shape[1], 12, generator=generator), "mask": mask}
    latents = torch.randn(B, 4, 8, 8, generator=generator)
    return {"latents": latents, "time": torch.linspace(0.2, 0.9, B), **text}


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(request.param)


def test_prediction_has_the_shape_of_the_latents(model):
    inputs = batch(model)
    prediction = model(**inputs).prediction
    assert prediction.shape == inputs["latents"].shape and prediction.dtype == torch.float32
    assert model.latent_shape() == (4, 8, 8)


def test_text_encoded_once_gives_the_same(model):
    inputs = batch(model)
    text = {name: inputs[name] for name in inputs if name not in ("latents", "time")}
    condition = model.encode_text(**text)
    assert torch.equal(model.predict(inputs["latents"], inputs["time"], condition), model(**inputs).prediction)


@pytest.mark.parametrize(
    "process", [{}, {"schedule": "edm", "prediction": "v"}, {"schedule": "cosine", "prediction": "epsilon"}]
)
def test_the_network_is_fed_what_the_process_says(process):
    model = build(**process)
    inputs = batch(model)
    condition = model.encode_text(inputs["tokens"], mask=inputs["mask"])
    x = model.process.network_input(inputs["latents"], inputs["time"])
    expected = model.network(x, model.process.network_time(inputs["time"]), condition)
    assert torch.equal(model(**inputs).prediction, expected)


def test_dropped_captions_equal_the_null_condition(model):
    inputs = batch(model)
    prediction = model(**inputs, drop=torch.tensor([False, True])).prediction
    expected = model(**inputs).prediction
    null = model.predict(inputs["latents"], inputs["time"], model.null_condition(2))
    torch.testing.assert_close(prediction[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction[1], null[1], atol=1e-5, rtol=0)
    assert (prediction[1] - expected[1]).abs().max() > 1e-4
    uncaptioned = model(inputs["latents"], inputs["time"]).prediction
    assert torch.equal(uncaptioned, null)


def test_padding_and_neighbours_change_nothing(model):
    inputs = batch(model)
    expected = model(**inputs).prediction
    padded = {name: torch.cat([inputs[name], torch.zeros_like(inputs[name])], 1) for name in list(inputs)[2:]}
    longer = model(**{**inputs, **padded}).prediction
    torch.testing.assert_close(longer, expected, atol=1e-5, rtol=0)
    n_tokens = inputs["mask"][1].sum()
    alone = {name: value[1:, :n_tokens] for name, value in list(inputs.items())[2:]}
    single = model(inputs["latents"][1:], inputs["time"][1:], **alone).prediction
    torch.testing.assert_close(single[0], expected[1], atol=1e-5, rtol=0)


def test_guidance_in_one_batch_equals_two(model):
    inputs = batch(model)
    latents, time = inputs["latents"], inputs["time"]
    text = model.encode_text(**{name: inputs[name] for name in list(inputs)[2:]})
    both = model.predict(latents.repeat(2, 1, 1, 1), time.repeat(2), text.cat(model.null_condition(2)))
    torch.testing.assert_close(both[:2], model.predict(latents, time, text), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[2:], model.predict(latents, time, model.null_condition(2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_fresh_models_predict_zero_also_after_loading(name, tmp_path):
    model = ImageDiffusion(ImageDiffusionConfig(**VARIANTS[name]))
    model.save_pretrained(tmp_path)
    for fresh in (model, ImageDiffusion.from_pretrained(tmp_path)):
        assert not fresh(**batch(fresh)).prediction.any()
        zeros = [module for module in fresh.modules() if isinstance(module, ZeroConv2d | ZeroLinear)]
        assert zeros and not any(module.weight.any() or module.bias.any() for module in zeros)


def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ImageDiffusion.from_pretrained(tmp_path)
    assert loaded.config.describe() == model.config.describe()
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded(**batch(loaded)).prediction, model.eval()(**batch(model)).prediction)


def test_missing_weights_are_initialised(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("null")}
    loaded = ImageDiffusion.from_pretrained(None, config=model.config, state_dict=weights)
    assert loaded.null.state.isfinite().all() and 0.1 < loaded.null.state.std() < 3


def test_gradient_reaches_every_weight(model):
    inputs = batch(model)
    model.train()(**inputs, drop=torch.tensor([False, True])).prediction.square().mean().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-10}
    assert not silent


def test_checkpointing_changes_nothing(model):
    inputs = batch(model)
    drop = torch.tensor([False, True])
    model.train()(**inputs, drop=drop).prediction.square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, drop=drop).prediction.square().mean().backward()
    for first, p in zip(plain, model.parameters(), strict=True):
        assert torch.equal(first, p.grad)


def test_compiles_without_graph_breaks():
    model = build()
    inputs = {**batch(model), "drop": torch.tensor([False, True])}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).prediction, model(**inputs).prediction)


def test_gradient_checkpointing_runs_blocks_twice():
    model, calls = build().train(), []
    for block in (model.network.middle.blocks[0], model.network.middle.attentions[0], model.text_encoder.layers[0]):
        block.norm.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch(model)).prediction.mean().backward()
    assert len(calls) == 6


def test_bf16_autocast_stays_close_and_keeps_times_apart(model):
    inputs = batch(model)
    expected = model(**inputs).prediction
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(**inputs).prediction
        times = model.network.time(torch.tensor([700.0, 700.5]))
    assert prediction.dtype == times.dtype == torch.float32
    assert not torch.equal(times[0], times[1])
    assert (prediction - expected).norm() < 0.05 * expected.norm()


def test_a_few_steps_learn_a_caption():
    model = ImageDiffusion(ImageDiffusionConfig(**TINY)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 4, 8, 8, generator=generator)
    tokens, mask = pad_tokens([encode_caption(caption, 32) for caption in ("sun", "moon")])
    losses = []
    for _ in range(60):
        rows = torch.randint(2, (8,), generator=generator)
        noise, time = torch.randn(8, 4, 8, 8, generator=generator), torch.rand(8, generator=generator)
        x = model.process.add_noise(images[rows], noise, time)
        prediction = model(x, time, tokens=tokens[rows], mask=mask[rows]).prediction
        loss = (prediction - model.process.target(images[rows], noise, time)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction": "epsilon"}, "prediction='epsilon' does not go with schedule='rectified_flow'"),
        ({"n_blocks": [1]}, r"n_blocks=\[1\] must have as many entries as widths=\[8, 16\]"),
        ({"use_attention": [True] * 3}, "use_attention=.*as many entries as widths"),
        ({"latent_size": 7}, "latent_size=7 must be divisible by 2"),
        ({"widths": [7, 14], "use_attention": [False] * 2}, r"widths=\[7, 14\]: the first must be even"),
        ({"widths": [8, 12]}, r"widths=\[8, 12\]: 12 must divide 4 \* 8"),
        ({"head_width": 6}, "head_width=6 must divide every width with attention, not 16"),
        ({"n_heads": 2}, "n_heads=2 has no effect with architecture='residual'"),
        ({"n_norm_groups": 4}, "n_norm_groups=4 has no effect"),
        ({"use_linear_projection": True}, "use_linear_projection=True has no effect"),
        ({"max_tokens": 30}, "max_tokens=30 must be divisible by 8"),
        ({"text_embedding_width": 4}, "text_embedding_width=4 has no effect with text_encoder='bytes'"),
        ({"text_encoder": "frozen"}, "text_embedding_width=None must be the width"),
        ({"text_head_width": 5}, "text_head_width=5 must divide text_width=16"),
        ({"architecture": "ldm", "n_norm_groups": 3}, "n_norm_groups=3 must divide every width, not 8"),
        ({**VARIANTS["ldm"], "n_heads": 3}, "n_heads=3 must divide every width, not 8"),
        ({**VARIANTS["ldm"], "conditioning_width": 8}, r"conditioning_width=8 must be None or 4 \* 8"),
        (
            {**VARIANTS["ldm"], "text_encoder": "frozen", "text_embedding_width": 4},
            "text_embedding_width=4 must be text_width=16",
        ),
        ({"n_gram_sizes": [1]}, r"n_gram_sizes=\[1\] must be >= 2"),
        ({"width": 8}, "no field 'width'; did you mean 'widths'"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ImageDiffusionConfig(**{**TINY, **changes})


def test_text_of_the_other_kind_is_refused():
    states = torch.randn(2, 8, 12)
    with pytest.raises(ValueError, match="text_encoder='bytes' takes tokens and nothing else, but text_states came"):
        build().encode_text(text_states=states)
    with pytest.raises(ValueError, match=r"text_encoder='frozen' takes text_states .* but no caption came"):
        build("frozen").encode_text()
    with pytest.raises(ValueError, match="width 5 do not fit text_embedding_width=12"):
        build("frozen").encode_text(text_states=states[..., :5])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 7, 8), (2, 4, 8, 9), (4, 8, 8)])
def test_wrong_latents_are_named(shape):
    with pytest.raises(ValueError, match=r"latents of shape .* do not fit: expected \(B, 4, y, x\) .* divisible by 2"):
        build()(torch.randn(shape), torch.rand(2))


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        ImageDiffusion.from_preset("tinny")
