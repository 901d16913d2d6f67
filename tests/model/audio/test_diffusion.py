"""Audio diffusion: clips of a batch are independent of each other and of padding; guidance; speakers; durations."""

import numpy as np
import pytest
import torch

from model.audio.configuration import AudioDiffusionConfig
from model.audio.diffusion import AudioDiffusion
from model.audio.text_conditioning import duration_errors
from model.samplers import euler
from tests.helpers.speech_batch import collate, speech_clips

TINY = {
    "latent_channels": 6,
    "widths": [16, 24],
    "n_blocks": [1, 2],
    "n_attentions": [0, 1],
    "head_width": 8,
    "conditioning_width": 16,
    "text_width": 16,
}
SPEECH = {
    **TINY,
    "n_symbols": 12,
    "frame_width": 16,
    "n_token_blocks": 1,
    "n_duration_blocks": 1,
    "n_trunk_blocks": 1,
    "text_dropout": 0.0,
    "pause_symbols": [0, 5],
    "speakers": ["ada", "bo"],
    "languages": ["en", "de"],
}
CAPTION = {**TINY, "conditioning": "caption", "n_text_layers": 1, "max_tokens": 32}
VARIANTS = {
    "speech": SPEECH,
    "levels": {**SPEECH, "widths": [8, 16, 24], "n_blocks": [1, 1, 1], "n_attentions": [0, 1, 1], "speakers": [],
               "languages": [], "compression": 3},
    "bytes": CAPTION,
    "frozen": {**TINY, "conditioning": "caption", "caption_encoder": "frozen", "caption_width": 10},
}  # fmt: skip


def build(name="speech", **changes) -> AudioDiffusion:
    """A model away from the zeros it starts with."""
    torch.manual_seed(0)
    model = AudioDiffusion(AudioDiffusionConfig(**{**VARIANTS[name], **changes}))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(model, clips, **padding) -> dict:
    """Arguments of forward."""
    batch = collate(clips, **padding)
    B, index = len(clips), batch.pop("index")
    shared = {"latents": batch["latents"], "n_latent_frames": batch["n_latent_frames"]}
    shared |= {"time": 0.1 + 0.25 * index, "drop": index == 1}
    if model.config.conditioning == "speech":
        return {**shared, **{name: batch[name] for name in ("tokens", "n_tokens", "durations", "speakers")},
                "languages": batch["speakers"]}  # fmt: skip
    n_caption = 3 + 2 * index
    S = int(n_caption.max()) + padding.get("extra", 0)
    shape = (B, S, 10) if model.config.caption_encoder == "frozen" else (B, S)
    states = torch.full(shape, padding.get("padding", 0.0))
    for row, n, clip in zip(states, n_caption, index.tolist()):
        content = torch.randn(8, *shape[2:], generator=torch.Generator().manual_seed(clip))[:n]
        row[:n] = content if row.ndim > 1 else (100 * content.abs()).clamp_max(250)
    return {**shared, "caption_states": states if len(shape) == 3 else states.long(), "n_caption": n_caption}


def sums(model, inputs) -> torch.Tensor:
    """The three losses of each clip, (B, 3)."""
    output = model(**inputs)
    L = inputs["latents"].shape[1]
    mask = (torch.arange(L) < inputs["n_latent_frames"][:, None])[..., None]
    flow = (output.prediction - 1).square().where(mask, 0).sum((1, 2))
    if output.prior is None:
        return flow[:, None]
    prior = (output.prior - inputs["latents"]).square().where(mask, 0).sum((1, 2))
    return torch.stack(
        [flow, prior, duration_errors(output.log_durations, inputs["durations"], inputs["n_tokens"])], 1
    )


def clips_for(model):
    return speech_clips(compression=model.config.compression)


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(request.param)


def gradients(model, inputs):
    model.zero_grad()
    sums(model, inputs).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_mixed_batch_equals_single_clips_in_losses_and_gradients(model):
    clips = clips_for(model)
    together, total = sums(model, inputs_of(model, clips)), gradients(model, inputs_of(model, clips))
    singles = [inputs_of(model, [clip]) for clip in clips]
    torch.testing.assert_close(torch.cat([sums(model, single) for single in singles]), together, atol=1e-4, rtol=1e-5)
    alone = [gradients(model, single) for single in singles]
    for name, gradient in total.items():
        scale = gradient.abs().max() + 1e-3
        assert (sum(each[name] for each in alone) - gradient).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("padding", [3.0, 1.0])
def test_what_stands_in_padding_changes_nothing(model, padding):
    clips = clips_for(model)
    expected = model(**inputs_of(model, clips))
    padded = model(**inputs_of(model, clips, extra=5, padding=padding))
    L = expected.prediction.shape[1]
    torch.testing.assert_close(padded.prediction[:, :L], expected.prediction, atol=1e-5, rtol=0)
    assert not padded.prediction[:, L:].any()
    # Padding of the network alone may be anything.
    inputs = inputs_of(model, clips)
    mask = torch.arange(L) < inputs["n_latent_frames"][:, None]
    inputs["latents"] = inputs["latents"].where(mask[..., None], torch.inf)
    torch.testing.assert_close(model(**inputs).prediction, expected.prediction, atol=1e-5, rtol=0)


def test_gradients_reach_every_weight_also_with_dropped_text(model):
    inputs = inputs_of(model, clips_for(model))
    silent = {name for name, p in model.named_parameters()} - gradients(model, inputs).keys()
    assert not silent
    dropped = gradients(model, {**inputs, "drop": torch.ones(3, dtype=torch.bool)})
    assert dropped["null.state"].abs().max() > 1e-4
    if "prior.weight" in dropped:  # Dropped from the network alone.
        assert dropped["prior.weight"].abs().max() > 1e-4 and dropped["durations.out.weight"].abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing(model):
    changes = {"text_dropout": 0.2} if model.config.conditioning == "speech" else {}
    model = AudioDiffusion(model.config.replace(network_dropout=0.3, **changes)).train()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    inputs, calls = inputs_of(model, clips_for(model)), []
    model.network.middle.blocks[0].norm.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    recomputed = gradients(model, inputs)
    assert len(calls) == 3 and plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_dropout_belongs_to_the_keys_of_clips(model):
    changes = {"text_dropout": 0.2} if model.config.conditioning == "speech" else {}
    weights, clips = model.state_dict(), clips_for(model)
    model = AudioDiffusion(model.config.replace(network_dropout=0.3, **changes)).train()
    model.load_state_dict(weights)
    keys = torch.tensor([5, -7, 11])
    together = sums(model, inputs_of(model, clips, extra=3) | {"dropout_keys": keys})
    singles = [inputs_of(model, [clip]) | {"dropout_keys": key[None]} for clip, key in zip(clips, keys)]
    torch.testing.assert_close(torch.cat([sums(model, single) for single in singles]), together, atol=1e-4, rtol=1e-5)
    others = sums(model, inputs_of(model, clips, extra=3) | {"dropout_keys": keys + 1})
    assert ((others - together).abs() > 1e-3).all()
    with pytest.raises(ValueError, match=r"dropout_keys.* \(3,\)"):
        model(**inputs_of(model, clips), dropout_keys=keys[:2])


def test_bf16_stays_close_with_fp32_results(model):
    inputs = inputs_of(model, clips_for(model))
    expected, exact_time = model(**inputs), model.network.time(torch.tensor([500.0, 501.0]))
    with torch.autocast("cpu", torch.bfloat16):
        output, time = model(**inputs), model.network.time(torch.tensor([500.0, 501.0]))
    assert torch.equal(time, exact_time)
    for name, value in output.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).abs().max() < 0.05 * expected[name].abs().max(), name


def test_prior_and_durations_do_not_reach_back_where_they_should_not():
    model = build()
    inputs = inputs_of(model, clips_for(model))
    output = model(**inputs)
    gradient = torch.autograd.grad(output.log_durations.sum(), model.text_encoder.symbols.weight, allow_unused=True)
    assert gradient == (None,)
    assert torch.autograd.grad(output.prediction.sum(), model.prior.weight, allow_unused=True) == (None,)


# ---- Sampling.


def speech_condition(model, clips, durations=None, speed=1.0, **changes):
    inputs = {**inputs_of(model, clips), **changes}
    text = model.encode_speech(
        inputs["tokens"], inputs["n_tokens"], speakers=inputs["speakers"], languages=inputs["languages"]
    )
    durations = model.predicted_durations(text, speed) if durations is None else durations
    return model.speech_condition(text, durations)[0]


def seeded(*seeds):
    return [np.random.default_rng(seed) for seed in seeds]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_a_seed_gives_the_same_latents_in_every_batch(sampler):
    model, clips = build(), speech_clips()
    settings = {"sampler": sampler, "n_steps": 3, "guidance_scale": 2.0}
    together = model.sample(speech_condition(model, clips), seeded(7, 8, 9), **settings)
    for row, clip, seed in zip(together, clips, (7, 8, 9)):
        alone = model.sample(speech_condition(model, [clip]), seeded(seed), **settings)[0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-4, rtol=0)
        assert not row[len(alone) :].any()
    other = model.sample(speech_condition(model, clips), seeded(1, 8, 9), **settings)
    assert (other[0] - together[0]).abs().max() > 0.1 and torch.equal(other[1], together[1])


def test_temperature_is_the_std_of_the_first_noise():
    model = AudioDiffusion(AudioDiffusionConfig(**SPEECH)).eval()  # Fresh weights predict no velocity.
    condition = speech_condition(model, speech_clips(), durations=torch.full((3, 14), 40))
    latents = model.sample(condition, seeded(1, 2, 3), n_steps=2, temperature=0.6)
    assert latents[condition.mask].std() == pytest.approx(0.6, rel=0.02)


def test_captioned_sounds_have_the_length_that_is_asked_for():
    model = build("frozen")
    inputs = inputs_of(model, speech_clips())
    condition = model.caption_condition(torch.tensor([4, 9, 7]), inputs["caption_states"], inputs["n_caption"])
    latents = model.sample(condition, seeded(1, 2, 3), n_steps=2, guidance_scale=3.0)
    assert latents.shape == (3, 9, 6) and latents[2, 6].any() and not latents[2, 7:].any()
    shorter = model.caption_condition(torch.tensor([4, 8, 7]), inputs["caption_states"], inputs["n_caption"])
    again = model.sample(shorter, seeded(1, 2, 3), n_steps=2, guidance_scale=3.0)
    torch.testing.assert_close(again[0, :4], latents[0, :4], atol=1e-5, rtol=0)
    assert (again[1, :4] - latents[1, :4]).abs().max() > 1e-3  # The network knows the length.


@pytest.mark.parametrize("name", ["speech", "bytes"])
def test_guidance_is_its_formula_and_1_is_none(name):
    model = build(name)
    inputs = inputs_of(model, speech_clips())
    if name == "speech":
        condition = speech_condition(model, speech_clips())
    else:
        condition = model.caption_condition(inputs["n_latent_frames"], inputs["caption_states"], inputs["n_caption"])
    null, process, calls = model.null_condition(condition), model.process, []

    def denoiser(scale):
        def denoise(x, t):
            with_text, without = (model.network(x, process.network_time(t), c) for c in (condition, null))
            return process.to_x0(without + scale * (with_text - without), x, t)

        return denoise

    model.network.register_forward_hook(lambda _, arguments, __: calls.append(len(arguments[0])))
    for scale in (1.0, 2.5):
        latents = model.sample(condition, seeded(1, 2, 3), n_steps=2, guidance_scale=scale)
        assert calls == ([3, 3] if scale == 1 else [6, 6])
        noise = torch.zeros_like(latents)
        for row, n, generator in zip(noise, condition.mask.sum(1).tolist(), seeded(1, 2, 3)):
            row[:n] = torch.from_numpy(generator.standard_normal((n, 6), dtype=np.float32))
        with torch.no_grad():
            expected = euler(denoiser(scale), noise, process, times=process.sampling_times(2, "uniform"))
        torch.testing.assert_close(latents, expected.where(condition.mask[..., None], 0), atol=1e-4, rtol=0)
        calls.clear()


def test_speakers_and_languages_change_sound_and_durations():
    model, clips = build(), speech_clips()
    inputs = inputs_of(model, clips)
    expected = model(**inputs)
    for name in ("speakers", "languages"):
        other = model(**{**inputs, name: 1 - inputs[name]})
        for key in ("prediction", "prior", "log_durations"):
            assert (other[key] - expected[key])[0].abs().max() > 1e-3, (name, key)
    # Without text, the network still knows who speaks.
    dropped = {**inputs, "drop": torch.ones(3, dtype=torch.bool)}
    nobody = model(**dropped).prediction
    assert (model(**{**dropped, "speakers": 1 - inputs["speakers"]}).prediction - nobody).abs().max() > 1e-3
    assert torch.equal(model(**{**dropped, "languages": 1 - inputs["languages"]}).prediction, nobody)


def test_speed_and_the_fitted_factor_scale_durations():
    model, clips = build(), speech_clips(lengths=(60,))
    model.durations.out.bias.data.fill_(2.0)
    inputs = inputs_of(model, clips)
    text = model.encode_speech(inputs["tokens"], inputs["n_tokens"], speakers=inputs["speakers"],
                               languages=inputs["languages"])  # fmt: skip
    usual = model.predicted_durations(text).sum().item()
    assert model.predicted_durations(text, 0.5).sum().item() == pytest.approx(2 * usual, rel=0.02)
    model.set_duration_factor(1.25)
    assert model.predicted_durations(text).sum().item() == pytest.approx(1.25 * usual, rel=0.02)
    model.set_duration_factor(9.0)
    assert model.duration_factor == 2.0
    with pytest.raises(ValueError, match="duration factor=nan"):
        model.set_duration_factor(float("nan"))
    with pytest.raises(ValueError, match="speed=0"):
        model.predicted_durations(text, 0.0)


def test_a_text_of_pauses_has_a_frame():
    model = build(pause_symbols=list(range(12)))
    model.durations.out.bias.data.fill_(-9.0)
    assert speech_condition(model, speech_clips()).mask.sum(1).tolist() == [1, 1, 1]


def test_the_factor_survives_saving(tmp_path):
    model = build()
    model.set_duration_factor(1.125)
    model.save_pretrained(tmp_path)
    loaded = AudioDiffusion.from_pretrained(tmp_path)
    assert loaded.duration_factor == 1.125 and loaded.config.speakers == ["ada", "bo"]
    inputs = inputs_of(model, speech_clips())
    assert torch.equal(loaded(**inputs).prediction, model(**inputs).prediction)


def test_fresh_models_predict_zero():
    for variant in VARIANTS.values():
        model = AudioDiffusion(AudioDiffusionConfig(**variant))
        assert not model(**inputs_of(model, clips_for(model))).prediction.any()


# ---- What is refused.


def test_what_does_not_fit_is_refused():
    model = build()
    inputs = inputs_of(model, speech_clips())
    wrong = [
        ({"latents": inputs["latents"].transpose(1, 2)}, "time first"),
        ({"durations": inputs["durations"] + 1}, "n_latent_frames"),
        ({"tokens": inputs["tokens"][..., 0]}, r"\(B, T, 3\)"),
        ({"tokens": None}, "conditioning='speech' needs tokens"),
        ({"speakers": None}, "give speakers"),
        ({"languages": None}, "give languages"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change})
    condition = speech_condition(model, speech_clips())
    with pytest.raises(ValueError, match="sampler='ddpm'"):
        model.sample(condition, seeded(1, 2, 3), sampler="ddpm")
    with pytest.raises(ValueError, match="generators has 1 entries for 3"):
        model.sample(condition, seeded(1))
    captions = build("frozen")
    with pytest.raises(ValueError, match="caption_encoder='frozen' takes"):
        captions(**{**inputs_of(captions, speech_clips()), "caption_states": inputs["tokens"][..., 0]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_blocks": [1]}, r"n_blocks=\[1\] must have as many entries"),
        ({"n_attentions": [0, 9]}, "n_attentions"),
        ({"head_width": 48}, "head_width=48 must divide"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"schedule": "cosine"}, "prediction='velocity'"),
        ({"symbols": ["a", "b"]}, "n_symbols=64 must be the number of symbols, 2"),
        ({"pause_symbols": [64]}, "pause_symbols"),
        ({"speakers": ["a", "a"]}, "names one twice"),
        ({"caption_width": 7}, "caption_width=7 has no effect"),
        ({"conditioning": "caption", "speakers": ["a"]}, "speakers"),
        ({"conditioning": "caption", "caption_encoder": "frozen"}, "caption_width=None"),
        ({"text_dropout": 1.0}, "text_dropout"),
        ({"n_symbol": 3}, "did you mean 'n_symbols'"),
    ],
)
def test_wrong_configurations_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        AudioDiffusionConfig(**fields)
