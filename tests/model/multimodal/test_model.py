"""The multimodal model: what training computes at once, generation computes with a cache; absent modalities."""

import typing

import pytest
import torch

from model.multimodal import MegaTransformerMultimodal
from model.multimodal.generation import Rows, Sampling
from model.multimodal.layout import Part, build_stream, join_streams
from model.multimodal.mask import Placement
from model.multimodal.spans import Spans, spans_in
from model.presets import MULTIMODAL
from model.thinking import CarriedState, Thinking
from utils.configuration import MegaTransformerConfig
from utils.flags.choices import SamplerKind
from utils.options import from_preset

TOLERANCE = 5e-6
SIZES = {"hidden_size": 32, "head_width": 16, "n_heads": 2, "n_query_groups": 1, "image_size": 32}
DEPTHS = {
    "flat": {"n_layers": 2},
    "recurrent": {"n_layers": 1, "n_recurrent_layers": 1, "n_coda_layers": 1, "recurrent_mean_thinking_steps": 3},
}
ALL = pytest.mark.parametrize("depth", DEPTHS)
TEXT = [30, 31, 32, 33, 34]


def build(depth="flat", **fields):
    torch.manual_seed(0)
    config = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny", **{**SIZES, **DEPTHS[depth], **fields})
    model = MegaTransformerMultimodal(config).eval()
    for parameter in model.parameters():  # No branch starts at zero, and every position matters.
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1, 0.1)
    return model


def latents(config, modality, n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, config.token_width(modality), generator=generator)


def part(model, modality, n_tokens=4, seed=0):
    return Part(modality, latents=latents(model.config, modality, n_tokens, seed))


def at_once(model, rows, time=0.4, noise_seed=9, has_gradient=False):
    """The output of the training graph for rows of parts; noise copies are at one time."""
    streams = [build_stream(model.config, parts) for parts in rows]
    batch = join_streams(streams, 0)
    spans = {}
    for name in ("image", "audio"):
        numbers, places = spans_in(streams, name)
        if not places:
            continue
        values = []
        for row, place in places:
            clean = rows[row][place.part].latents
            noise = latents(model.config, name, len(clean), noise_seed)
            values.append((1 - time) * clean + time * noise if place.is_noisy else clean)
        is_noisy = torch.tensor([place.is_noisy for _, place in places])
        padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        spans[name] = Spans(padded, time * is_noisy, is_noisy, *numbers)
    core = Thinking(n_steps=3) if model.config.n_recurrent_layers else None
    with torch.set_grad_enabled(has_gradient):
        return model(
            batch.ids, batch.positions, batch.placement, spans=spans, labels=batch.labels, thinking=core
        ), spans


def cached_prediction(model, prompts, modality, noisy, time, sizes, scale=1.0):
    """The prediction that a solver asks for at one time, in generation; after other calls that were taken back."""
    seen = []

    def spy(state, name, x, times, **keywords):
        if not seen:
            padded = torch.nn.utils.rnn.pad_sequence(noisy, batch_first=True)
            rows = padded.new_zeros(len(state.streams), *x.shape[1:])
            rows[: len(padded)] = padded
            original(state, name, torch.randn_like(rows), torch.ones(len(rows)), **keywords)  # Taken back.
            seen.append(original(state, name, rows, torch.full((len(rows),), time), **keywords))
        return original(state, name, x, times, **keywords)

    original, model.span_prediction = model.span_prediction, spy
    sampling = Sampling(modality, [modality], guidance_scale={modality: scale}, n_steps={modality: 1})
    generators = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    model.generate(prompts, sampling, generators=generators, lengths=sizes if modality == "audio" else None)
    model.span_prediction = original
    return seen[0]


@ALL
@pytest.mark.parametrize("modality, n_tokens", [("image", 4), ("audio", 7)])
def test_training_graph_equals_cached_generation(depth, modality, n_tokens):
    model = build(depth)
    # A long prompt with a clean span in it, and a short one that is padded beside it.
    rows = [
        [part(model, "image", 4, 3), Part("text", TEXT), part(model, modality, n_tokens, 1)],
        [Part("text", TEXT[:2]), part(model, modality, n_tokens, 2)],
    ]
    output, spans = at_once(model, rows)
    noisy = list(spans[modality].latents[spans[modality].is_noisy][:, :n_tokens])
    for scale in (1.0, 2.0):
        prompts, sizes = [parts[:-1] for parts in rows], [n_tokens] * 2
        cached = cached_prediction(model, prompts, modality, noisy, 0.4, sizes, scale)
        assert (cached[:2] - output.predictions[modality]).abs().max() <= TOLERANCE
        assert output.predictions[modality].std() > 0.05


@ALL
def test_guidance_rows_are_streams_without_text(depth):
    model = build(depth)
    parts = [Part("text", TEXT), part(model, "audio", 5)]
    dropped, spans = at_once(model, [[Part("text", [model.config.null_token_id]), parts[1]]])
    seen = []
    original = model.span_prediction

    def spy(state, name, x, times, **keywords):
        if name == "audio":
            both = spans["audio"].latents.expand(2, -1, -1)
            seen.append(original(state, name, both, torch.full((2,), 0.4), **keywords)[1])
        return original(state, name, x, times, **keywords)

    model.span_prediction = spy
    # A first image of the answer leaves nothing in the row of guidance.
    for begin in (["audio"], ["image", "audio"]):
        state = model.begin_streams([parts[:1]], Sampling(guidance_scale={"audio": 2.0, "image": 2.0}))
        for modality in begin:
            model.generate_spans(state, modality, Rows([0]), state.sampling, [torch.Generator()], [5])
        assert (seen[0] - dropped.predictions["audio"][0]).abs().max() <= TOLERANCE
        seen.clear()


@ALL
def test_text_after_spans_step_by_step_equals_at_once(depth):
    model = build(depth)
    parts = [Part("text", TEXT[:2]), part(model, "audio", 5, 1), Part("text", TEXT[2:]), part(model, "image", 4, 2)]
    parts = [*parts, Part("text", TEXT)]
    expected, _ = at_once(model, [parts])
    stream = build_stream(model.config, parts)
    prompt = [[parts[0]], [Part("text", TEXT)]]  # A second, longer row beside it.
    state = model.begin_streams(prompt, Sampling(guidance_scale={"image": 1.0, "audio": 1.0}))
    differences, place = [], 3

    def compare():
        target = stream.labels[place]
        nats = torch.nn.functional.cross_entropy(state.logits[:1], torch.tensor([target]))
        differences.append((nats - expected.nats[0, place - 1]).abs().item())

    for piece in parts[1:]:
        if piece.modality == "text":
            for token in piece.ids:
                compare()
                model.feed_tokens(state, [token, None])
                place += 1
            continue
        compare()
        model.generate_spans(state, piece.modality, Rows([0]), state.sampling, [torch.Generator()] * 2, [5, 5])
        model.append_spans(state, piece.modality, {0: piece})
        place = stream.spans[[span.modality for span in stream.spans].index(piece.modality) + 1].start
        place += piece.n_tokens + 1
    compare()
    assert len(differences) == 11 and max(differences) <= TOLERANCE and expected.nats.max() > 1
    assert state.streams[0].cursor == stream.positions[place - 1] + 1


@ALL
def test_a_later_span_leaves_earlier_outputs_alone(depth):
    model = build(depth)
    rows = [[Part("text", TEXT), part(model, "image", 4, seed), Part("text", TEXT), part(model, "audio", 3, seed)] for
            seed in (1, 2)]  # fmt: skip
    rows[1][1] = rows[0][1]
    first, second = (at_once(model, [parts])[0] for parts in rows)
    other_noise = at_once(model, [rows[0]], noise_seed=5)[0]
    assert (first.predictions["image"] - second.predictions["image"]).abs().max() <= 1e-6
    assert (first.predictions["audio"] - second.predictions["audio"]).abs().max() > 1e-2
    assert (first.nats - second.nats).abs().max() <= 1e-6
    assert (first.nats - other_noise.nats).abs().max() <= 1e-6  # Noise reaches no text.


@ALL
def test_padding_and_batches_change_nothing(depth):
    model = build(depth)
    rows = [
        [Part("text", TEXT), part(model, "audio", 9, 1)],
        [part(model, "audio", 2, 2), Part("text", TEXT[:3])],
        [Part("text", TEXT[:1]), part(model, "audio", 3, 3), Part("text", TEXT)],
        [Part("text", TEXT[:4]), part(model, "image", 4, 4)],
    ]
    together, _ = at_once(model, rows)
    noisy = {"audio": [0, 2], "image": [3]}
    for row, parts in enumerate(rows):
        alone, _ = at_once(model, [parts])
        length = alone.nats.shape[1]
        assert (alone.nats[0] - together.nats[row, :length]).abs().max() <= TOLERANCE
        assert together.nats[row, length:].abs().sum() == 0
        for name in (name for name, numbers in noisy.items() if row in numbers):
            prediction = alone.predictions[name]
            other = together.predictions[name][noisy[name].index(row), : prediction.shape[1]]
            assert (prediction[0] - other).abs().max() <= TOLERANCE


@ALL
def test_answers_do_not_depend_on_the_batch(depth):
    model = build(depth)
    prompts = [[Part("text", TEXT)], [part(model, "image", 4, 1)], [Part("text", TEXT[:1])]]
    seeds = [3, 4, 5]

    def answers(numbers, **options):
        generators = [torch.Generator().manual_seed(seeds[n]) for n in numbers]
        options = {"max_new_tokens": 6, "max_spans": 2, "temperature": 1.0, "length_temperature": 1.0, **options}
        steps = {"n_steps": {"image": 2, "audio": 2}}
        return model.generate([prompts[n] for n in numbers], Sampling(**options, **steps), generators=generators)

    kinds = set()
    stochastic = {"begin": "audio", "sampler": {"audio": "ddpm", "image": "ddpm"}}
    for options in ({}, stochastic, {"begin": "image", "modalities": ["image"]}):
        together = answers([0, 1, 2], **options)
        for number, answer in enumerate(together):
            (alone,) = answers([number], **options)
            assert [piece.modality for piece in alone] == [piece.modality for piece in answer]
            kinds |= {piece.modality for piece in answer}
            for one, other in zip(alone, answer):
                assert list(one.ids) == list(other.ids)
                assert one.latents is None or (one.latents - other.latents).abs().max() <= 1e-4
    assert kinds == {"text", "image", "audio"}


@pytest.mark.parametrize("modality, n_tokens", [("image", 4), ("audio", 5)])
def test_every_sampler_solves_spans(modality, n_tokens):
    """With many steps all of them agree about where the flow leads, except for the one that adds noise."""
    model = build("flat", n_layers=1)

    def solve(sampler, n_steps):
        options = {"sampler": {modality: sampler}, "n_steps": {modality: n_steps}, "guidance_scale": {modality: 1.0}}
        sampling, generators = Sampling(modality, [modality], **options), [torch.Generator().manual_seed(0)]
        (answer,) = model.generate([[Part("text", TEXT)]], sampling, generators=generators, lengths=[n_tokens])
        assert answer[0].latents.shape == (n_tokens, model.config.token_width(modality))
        return answer[0].latents

    exact = solve("heun", 24)
    for sampler in typing.get_args(SamplerKind):
        distance = (solve(sampler, 8) - exact).norm() / exact.norm()
        assert distance > 0.1 if sampler == "ddpm" else distance < 0.1, (sampler, distance)


def test_tokens_are_handed_over_at_once():
    model, events = build(), []
    model.generate(
        [[Part("text", TEXT)], [Part("text", TEXT[:2])]],
        Sampling(max_new_tokens=4, max_spans=1, temperature=1.0, n_steps={"image": 1, "audio": 1}),
        generators=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        on_token=lambda row, token: events.append((row, [token])),
        on_part=lambda row, piece: events.append((row, piece)),
    )
    for row in (0, 1):
        waiting = []
        for value in (value for number, value in events if number == row):
            if isinstance(value, list):
                waiting += value
            elif value.modality == "text":
                assert waiting == list(value.ids)
                waiting = []
        assert not waiting
    assert any(isinstance(value, list) for _, value in events)


def test_estimates_of_spans_are_handed_over():
    model, seen = build(), []
    sampling = Sampling("image", ["image"], n_steps={"image": 3}, sampler={"image": "heun"})

    def solve(**keywords):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        prompts = [[Part("text", TEXT)], [Part("text", TEXT[:2])]]
        return model.generate(prompts, sampling, generators=generators, **keywords)

    def show(modality, number, spans):
        seen.append((modality, number, [span.latents.clone() for span in spans]))

    answers = solve(on_estimate=show)
    assert [entry[:2] for entry in seen] == [("image", number) for number in range(1, 6)]
    for row, (shown, plain) in enumerate(zip(answers, solve())):
        assert torch.equal(shown[0].latents, plain[0].latents)
        assert all(latents[row].shape == plain[0].latents.shape for _, _, latents in seen)

    def end(modality, number, spans):
        raise KeyboardInterrupt(number)

    with pytest.raises(KeyboardInterrupt, match="1"):
        solve(on_estimate=end)


def test_a_state_that_is_carried_as_zeros_over_all_steps_changes_nothing():
    model = build("recurrent")
    state = model.begin_streams([[Part("text", TEXT)]], Sampling(guidance_scale={"image": 1.0, "audio": 1.0}))
    latent, one = latents(model.config, "image", 4)[None], torch.ones(1)
    keywords = {"counts": torch.tensor([4]), "positions": torch.full((1, 4), 7.0)}

    def predict(carried=None, time=1.0):
        state.carried = carried
        with torch.no_grad():
            return model.span_prediction(state, "image", latent, time * one, **keywords)

    sizes = [layer.get_seq_length() for layer in state.cache.layers]
    plain, zeros = predict(), torch.zeros(1, 4, model.config.hidden_size)
    assert torch.equal(predict(CarriedState(3, zeros)), plain)
    # The first evaluation takes all steps, the next one a single one from its state.
    carried = CarriedState(1)
    assert torch.equal(predict(carried), plain) and carried.state is not None
    assert (predict(carried, 0.5) - predict(None, 0.5)).abs().max() > 1e-2
    # The cache holds what it held before.
    assert torch.equal(predict(), plain) and sizes == [layer.get_seq_length() for layer in state.cache.layers]


def test_generation_carries_the_state_over_the_steps_of_a_span():
    model, seen = build("recurrent"), []
    original = model.model.core.forward

    def spy(*args, thinking, **keywords):
        seen.append((thinking.n_taken, thinking.carried is not None))
        return original(*args, thinking=thinking, **keywords)

    model.model.core.forward = spy
    steps = {"n_steps": {"image": 3}, "guidance_scale": {"image": 2.0}}
    for n_carried, expected in ((None, [3, 3, 3]), (2, [3, 2, 2])):
        sampling = Sampling("image", ["image"], n_carried_steps=n_carried, **steps)
        model.generate([[Part("text", TEXT)]], sampling, generators=[torch.Generator()])
        solved = [taken for taken, is_carried in seen if is_carried == (n_carried is not None)]
        assert solved[-3:] == expected
        seen.clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_trunk_by_flex_attention_equals_that_by_the_dense_mask():
    model = build("recurrent")
    rows = [[Part("text", TEXT), part(model, "audio", 9, 1), Part("text", TEXT)], [part(model, "image", 4, 2)]]
    dense, _ = at_once(model, rows)
    model.uses_flex_attention = True
    by_blocks, _ = at_once(model, rows)
    assert (dense.nats - by_blocks.nats).abs().max() <= 1e-5
    for name, prediction in dense.predictions.items():
        assert (prediction - by_blocks.predictions[name]).abs().max() <= 1e-5


def test_a_long_row_sees_keys_on_both_sides():
    """At more than 128 queries kernels for causal masks would cut what comes after."""
    model = build("flat", audio_encoder_patch_size=1, audio_max_tokens=90, image_size=64, image_encoder_patch_size=1)
    rows = [[Part("text", TEXT * 20), part(model, "audio", 90, 1), part(model, "image", 64, 2)]]
    output, spans = at_once(model, rows)
    model.config._attn_implementation = "eager"
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    by_definition, _ = at_once(model, rows)
    for name, prediction in output.predictions.items():
        assert spans[name].latents.shape[1] in (64, 90)
        assert (prediction - by_definition.predictions[name]).abs().max() <= TOLERANCE


def test_every_parameter_gets_a_gradient_whatever_is_absent():
    model = build("recurrent").train()
    names = {name for name, _ in model.named_parameters()}
    rows = [
        [[Part("text", TEXT)]],
        [[part(model, "image"), Part("text", TEXT)]],
        [[Part("text", TEXT), part(model, "audio")]],
    ]
    for parts in rows:
        model.zero_grad()
        stream = build_stream(model.config, parts[0])
        batch = join_streams([stream], 0)
        spans = {}
        for place in stream.spans:
            number = torch.tensor([[place.n_tokens, 0, place.start]])
            is_noisy = torch.tensor([place.is_noisy])
            values = parts[0][place.part].latents[None]
            spans[place.modality] = Spans(values, 0.5 * is_noisy, is_noisy, *number.unbind(1))
        output = model(batch.ids, batch.positions, batch.placement, spans=spans, labels=batch.labels)
        loss = output.text_loss + output.begin_loss + output.length_loss
        (loss + sum(each.square().mean() for each in output.predictions.values())).backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names
        absent = {"image", "audio"} - {place.modality for place in stream.spans}
        assert all(output.predictions[modality].abs().max() == 0 for modality in absent)
        for name, parameter in model.named_parameters():
            if any(f"encoders.{modality}" in name or f"decoders.{modality}" in name for modality in absent):
                assert parameter.grad.abs().max() == 0


def test_the_core_begins_with_gradients_like_those_of_flat_layers():
    """Norms after branches that begin small, by the depth-scaled initialisation, would make them about 50 times as
    large; clipped, they hide those of encoders and decoders."""
    generator, norms = torch.Generator().manual_seed(0), {}
    text, tokens = Part("text", ids=TEXT * 2), torch.randn(16, 64, generator=generator)
    for name in ("multimodal-tiny", "multimodal-recurrent-tiny"):
        torch.manual_seed(0)
        model = MegaTransformerMultimodal.from_preset(name)
        torch.nn.init.normal_(model.decoders["image"].out_proj.weight, std=0.02)  # Begins at zero.
        output, _ = at_once(model, [[text, Part("image", latents=tokens)]], has_gradient=True)
        output.predictions["image"].square().mean().backward()
        weights = dict(model.model.named_parameters())
        gradients = [weight.grad for path, weight in weights.items() if path.startswith(("main", "core"))]
        norms[name] = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert norms["multimodal-recurrent-tiny"] < 3 * norms["multimodal-tiny"]


def test_losses_are_sums_over_given_numbers():
    model = build()
    rows = [[Part("text", TEXT[:1]), part(model, "audio", 3)], [Part("text", TEXT)]]
    batch = join_streams([build_stream(model.config, parts) for parts in rows], 0)
    number = torch.tensor([[3, 0, 4]])
    audio = Spans(part(model, "audio", 3).latents[None], torch.ones(1), torch.ones(1) > 0, *number.unbind(1))
    given = {"text": 10.0, "begin": 2.0, "length": 4.0}
    output = model(
        batch.ids, batch.positions, batch.placement, spans={"audio": audio}, labels=batch.labels, n_targets=given
    )
    # Targets are <boa>, the length, and the second row's text with its end.
    begin, length = output.nats[0, 1:3]
    assert batch.labels[0, 2:4].tolist() == [261, 265]
    torch.testing.assert_close(output.length_loss, length / 4)
    torch.testing.assert_close(output.begin_loss, begin / 2)
    torch.testing.assert_close(output.text_loss, (output.nats.sum() - begin - length) / 10)
    assert (output.nats > 0).sum() == 2 + 6 and isinstance(batch.placement, Placement)
    # A kind without targets has no loss, also where the first token has another target.
    alone = join_streams([build_stream(model.config, rows[1])], 0)
    output = model(alone.ids, alone.positions, alone.placement, labels=alone.labels)
    assert output.text_loss > 1 and output.begin_loss == output.length_loss == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"begin": "audio", "modalities": ["text", "audio"]}, "modality 'audio'.*modalities="),
        ({"modalities": ["image"]}, "begin=None.*needs begin='image'"),
        ({"n_steps": {"audio": 3}}, "n_steps of 'audio' has no effect"),
        ({"sampler": {"image": "rk4"}, "begin": "image"}, "sampler='rk4' is unknown; choose from ddpm"),
        ({"guidance_scale": {"image": 3.0}}, r"guidance_scale=3\.0 of 'image'.*image_condition_dropout=0"),
        ({"n_thinking_steps": 2}, "n_thinking_steps=2 has no effect: this model has no recurrent core"),
        ({"n_carried_steps": 2}, "n_carried_steps=2 has no effect"),
        ({"max_new_tokens": 3000}, "prompt 0 has 1 tokens.*max_new_tokens=3000.*max_position_embeddings=2048"),
    ],
)
def test_wrong_options_of_generation_are_refused(options, message):
    config = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny", **SIZES, n_layers=1)
    config = config.with_modalities(["text", "image"]).replace(image_condition_dropout=0.0, image_guidance_scale=1.0)
    model = MegaTransformerMultimodal(config).eval()
    with pytest.raises(ValueError, match=message):
        model.generate([[]], Sampling(**{"modalities": ["text", "image"], **options}), generators=[torch.Generator()])
    assert model.generate([], Sampling(modalities=["text"]), generators=[]) == []
    with pytest.raises(ValueError, match="generators has 0 entries for 1 prompts"):
        model.generate([[]], generators=[])
    with pytest.raises(ValueError, match=r"model\.eval"):
        model.train().generate([[]], generators=[torch.Generator()])
    with pytest.raises(ValueError, match="null_token_id=None must be given"):
        MegaTransformerMultimodal(MegaTransformerConfig(modalities=["text", "image"], eos_token_id=1))
