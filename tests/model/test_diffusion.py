import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.diffusion import (
    HASH_BASE,
    HASH_MODULUS,
    AdaptiveNorm,
    Attention,
    ByteTextEncoder,
    NullCondition,
    TextCondition,
    TimeEmbedding,
    UNet,
    coordinates,
    init_diffusion_weights,
    n_gram_buckets,
    pool,
    time_features,
)
from model.text.tokenizer import encode_caption, pad_tokens


def awake(module):
    """The module away from the zeros it starts with."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture
def unet():
    network = UNet(
        in_channels=4,
        out_channels=4,
        widths=[8, 16],
        n_blocks=[2, 2],
        use_attention=[False, True],
        head_width=8,
        conditioning_width=12,
        text_width=8,
    )
    network.apply(init_diffusion_weights)
    return network


@pytest.fixture
def encoder():
    return awake(ByteTextEncoder(16, 2, head_width=8, max_tokens=48, n_gram_sizes=[2, 3], n_gram_buckets=32))


def condition(B=2, T=8, width=8, lengths=(8, 3)):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(B, T, width, generator=generator)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return TextCondition(states, mask, pool(states, mask))


def noisy(B=2, C=4, Y=8, X=12):
    return torch.randn(B, C, Y, X, generator=torch.Generator().manual_seed(1)), torch.linspace(10, 900, B)


def test_time_features_are_cosines_and_sines_of_a_geometric_row():
    features = time_features(torch.tensor([0.0, 3.0, 999.5]), 8)
    for b, t in enumerate([0.0, 3.0, 999.5]):
        for i in range(4):
            frequency = 10_000 ** (-i / 4)
            assert features[b, i] == pytest.approx(math.cos(t * frequency), abs=2e-4)
            assert features[b, 4 + i] == pytest.approx(math.sin(t * frequency), abs=2e-4)


def test_time_embedding_is_fp32_under_autocast():
    embedding, time = TimeEmbedding(8, 16), torch.tensor([700.0, 700.5])
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = embedding(time)
    assert under_autocast.dtype == torch.float32 and torch.equal(under_autocast, embedding(time))
    assert not torch.equal(under_autocast[0], under_autocast[1])  # bf16 cannot tell these times apart


def test_adaptive_norm_is_its_definition():
    norm, x, conditioning = awake(AdaptiveNorm(6, 5)), torch.randn(2, 6, 3, 4), torch.randn(2, 5)
    y = norm(x, conditioning)
    scale, shift = norm.scale_shift(conditioning).chunk(2, dim=1)
    for b, row, column in [(0, 0, 0), (1, 2, 3)]:
        v = x[b, :, row, column]
        normed = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(y[b, :, row, column], normed * (1 + scale[b]) + shift[b])


def test_norm_statistics_are_fp32_under_autocast():
    norm, x = AdaptiveNorm(64, 5), 100 + torch.randn(1, 64, 2, 2)
    norm.apply(init_diffusion_weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, torch.randn(1, 5)).float()
    torch.testing.assert_close(y, norm(x, torch.randn(1, 5)), atol=0.02, rtol=0.01)


def test_masked_attention_against_a_loop():
    attention = awake(Attention(8, 6, head_width=4))
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    y = attention(x, context, mask)
    for b, n_tokens in enumerate((7, 3)):
        q, kv = attention.query(x[b]), attention.key_value(context[b, :n_tokens])
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            k, v = kv[:, :8][:, h], kv[:, 8:][:, h]
            logits = attention.query_norm(q[:, h]) @ attention.key_norm(k).T / math.sqrt(4)
            heads.append(logits.softmax(dim=1) @ v)
        torch.testing.assert_close(y[b], attention.out(torch.cat(heads, dim=1)))


def test_queries_and_keys_of_any_size_give_the_same_attention():
    attention, x = awake(Attention(8, 8, head_width=4)), torch.randn(1, 5, 8)
    expected = attention(x, x)
    for layer in (attention.query.weight, attention.query.bias, attention.key_value.weight, attention.key_value.bias):
        layer.data[:8] *= 100  # key_value: keys come first
    torch.testing.assert_close(attention(x, x), expected, atol=1e-3, rtol=0)


def test_the_network_starts_at_zero(unet):
    x, time = noisy()
    prediction = unet(x, time, condition())
    assert prediction.shape == x.shape and not prediction.any()


def test_every_residual_branch_starts_at_zero(unet):
    block, attention = unet.middle.blocks[0], unet.middle.attentions[0]
    x, text = torch.randn(2, 16, 4, 4), condition()
    assert torch.equal(block(x, torch.randn(2, 12)), x)
    assert torch.equal(attention(x, text.states, text.mask), x)


def test_gradient_reaches_every_weight(unet):
    x, time = noisy()
    awake(unet)(x, time, condition()).square().mean().backward()
    # Nothing is silent: keys are normalised, and so even their bias counts.
    assert not [name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]


def test_other_resolutions_and_channels():
    network = UNet(
        in_channels=3,
        out_channels=5,
        widths=[8, 16, 16],
        n_blocks=[1, 1, 1],
        use_attention=[False, False, True],
        head_width=8,
        conditioning_width=8,
        text_width=8,
    )
    x = torch.randn(2, 3, 16, 8)
    assert network(x, torch.rand(2), condition()).shape == (2, 5, 16, 8)


def test_output_is_fp32_under_autocast(unet):
    x, time = noisy()
    expected = awake(unet)(x, time, condition())
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(x, time, condition())
    assert prediction.dtype == torch.float32
    assert (prediction - expected).norm() < 0.05 * expected.norm()


def test_padding_and_neighbours_change_nothing(unet):
    x, time = noisy()
    text = condition()
    expected = awake(unet)(x, time, text)
    torch.testing.assert_close(unet(x, time, text.pad(24)), expected, atol=1e-5, rtol=0)
    other = text.pad(16)
    other.states[~other.mask] = 1e3
    torch.testing.assert_close(unet(x, time, other), expected, atol=1e-5, rtol=0)
    alone = TextCondition(text.states[1:, :3], text.mask[1:, :3], text.pooled[1:])
    torch.testing.assert_close(unet(x[1:], time[1:], alone), expected[1:], atol=1e-5, rtol=0)


def test_conditions_are_joined_and_selected():
    text, short = condition(), condition(1, 3, lengths=(2,))
    both = text.cat(short)
    assert len(both) == 3 and both.states.shape == (3, 8, 8) and both.mask.sum(dim=1).tolist() == [8, 3, 2]
    last = both.select([2])
    assert torch.equal(last.states[:, :3], short.states) and torch.equal(last.pooled, short.pooled)
    assert short.cat(text).mask.sum(dim=1).tolist() == [2, 8, 3]


def test_hashes_against_a_loop():
    tokens = torch.tensor([[1, 100, 257, 30, 30]])
    buckets = n_gram_buckets(tokens, [2, 4], 50)
    for k, size in enumerate((2, 4)):
        for i in range(5):
            last = [tokens[0, i - j].item() if i >= j else 0 for j in range(size)]
            value = sum(token * pow(HASH_BASE, j, HASH_MODULUS) for j, token in enumerate(last))
            assert buckets[0, i, k] == value % HASH_MODULUS % 50 + 50 * k


def test_n_grams_longer_than_the_text():
    assert n_gram_buckets(torch.tensor([[1, 2]]), [6], 50).shape == (1, 2, 1)


def test_byte_encoder_ignores_padding_and_neighbours(encoder):
    captions = ["a red apple", "sun", ""]
    tokens, mask = pad_tokens([encode_caption(caption, 32) for caption in captions])
    states = encoder(tokens, mask)
    for b, caption in enumerate(captions):
        alone, alone_mask = pad_tokens([encode_caption(caption, 32)], multiple=1)
        expected = encoder(alone, alone_mask)[0]
        torch.testing.assert_close(states[b, : len(expected)], expected, atol=1e-5, rtol=0)
    tokens[~mask] = 77
    torch.testing.assert_close(encoder(tokens, mask)[mask], states[mask], atol=1e-5, rtol=0)


def test_byte_encoder_reads_order_and_letters(encoder):
    tokens, mask = pad_tokens([encode_caption(caption, 32) for caption in ("tab", "bat", "bad")])
    pooled = pool(encoder(tokens, mask), mask)
    assert F.pairwise_distance(pooled[0], pooled[1]) > 0.01 and F.pairwise_distance(pooled[1], pooled[2]) > 0.01


def test_too_long_captions_are_refused(encoder):
    with pytest.raises(ValueError, match="captions of 56 tokens exceed max_tokens=48"):
        encoder(torch.ones(1, 56, dtype=torch.int64), torch.ones(1, 56, dtype=torch.bool))


def test_positions_hold_for_other_sizes(unet):
    """Positions are shares of the sides: those of a finer grid average to those of a coarser one, and a network away
    from its initial zeros computes numbers of the same spread at every size."""
    fine = coordinates(torch.zeros(1, 3, 16, 24))
    torch.testing.assert_close(F.avg_pool2d(fine, 2), coordinates(torch.zeros(1, 3, 8, 12)))
    network, text = awake(unet), condition(B=1, lengths=(8,))
    coarse = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))

    def predict(*size: int) -> torch.Tensor:
        x = F.interpolate(coarse, size=size, mode="bilinear")
        return network(x, torch.tensor([500.0]), text)

    with torch.no_grad():
        square = predict(8, 8)
        for size in ((8, 16), (16, 8), (6, 10), (32, 32)):
            other = predict(*size)
            assert other.shape[-2:] == size and 0.8 < other.std() / square.std() < 1.25
            # The same image, up to what kernels of a fixed size see of it.
            pair = torch.stack([square.flatten(), F.interpolate(other, size=(8, 8), mode="area").flatten()])
            assert torch.corrcoef(pair)[0, 1] > 0.3


def test_coordinates_name_row_and_column():
    rows, columns = coordinates(torch.zeros(2, 3, 4, 2))[1]
    assert rows[:, 0].tolist() == [-0.75, -0.25, 0.25, 0.75] and torch.equal(rows[:, 0], rows[:, 1])
    assert columns[0].tolist() == [-0.5, 0.5] and torch.equal(columns[0], columns[3])


def test_pool_is_the_maximum_over_the_tokens():
    text = condition()
    torch.testing.assert_close(pool(text.states, text.mask)[1], text.states[1, :3].max(dim=0).values)


def test_null_replaces_the_dropped_rows_only():
    null, text = NullCondition(8), condition()
    null.apply(init_diffusion_weights)
    mixed = null.replace(text, torch.tensor([False, True]))
    assert torch.equal(mixed.states[0], text.states[0]) and torch.equal(mixed.mask[0], text.mask[0])
    assert mixed.mask[1].sum() == 1 and torch.equal(mixed.states[1, 0], null.state)
    assert torch.equal(mixed.pooled[1], null(1).pooled[0])


def test_every_kind_of_layer_is_initialised(encoder, unet):
    for module in [*encoder.modules(), *unet.modules(), NullCondition(8)]:
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, math.pi)
        init_diffusion_weights(module)
        assert not any((p == math.pi).any() for p in module.parameters(recurse=False)), module
