"""The mask and the layout of streams, each against a loop that states the rules in words."""

import itertools

import pytest
import torch

from model.attention import attention_in_blocks
from model.multimodal.layout import (
    Part,
    Stream,
    audio_latents,
    audio_tokens,
    build_stream,
    image_latents,
    image_tokens,
    join_streams,
    target_kinds,
)
from model.multimodal.mask import Placement, mask_function, span_mask, stream_blocks, stream_mask
from model.presets import MULTIMODAL
from utils.configuration import MegaTransformerConfig
from utils.options import from_preset

CONFIG = from_preset(MegaTransformerConfig, MULTIMODAL, "multimodal-tiny", image_size=32)  # 4 tokens of an image
BOS, EOS, BOI, EOI, BOA, EOA, LENGTH = 1, 1, 259, 260, 261, 262, 263
IMAGE = Part("image", n_tokens=4)


def sees(tokens, q, k):
    """Whether token q of a row sees token k: tokens are (document, index, span, copy)."""
    if q == k:
        return True
    (document, q_index, q_span, q_copy), (k_document, k_index, k_span, k_copy) = tokens[q], tokens[k]
    if document != k_document or k_document < 0:
        return False
    if q_span >= 0 and q_span == k_span and q_copy == k_copy:
        return True
    if k_copy > 0 or (q_copy > 0 and k_span == q_span):
        return False
    return k_index < q_index


def random_row(generator, n_tokens):
    """Tokens (document, index, span, copy): pieces as long as chance has it, and two of padding."""
    rows, document, span = [], 0, 0
    while len(rows) < n_tokens:
        kind, length = torch.randint(0, 4, (2,), generator=generator).tolist()
        document += kind == 0
        span += kind == 1
        copies = [[], [1, 0], [2, 1, 0], [0]][kind]
        pieces = [(span, copy) for copy in copies] or [(-1, 0)]
        rows += [(document, *piece) for piece in pieces for _ in range(length + 1)]
    rows = rows[: n_tokens - 2] + [(-1, -1, 0)] * 2
    return [(document, index, span, copy) for index, (document, span, copy) in enumerate(rows)]


def placement_of(*rows):
    return Placement(*(torch.tensor(vectors) for vectors in zip(*(zip(*row, strict=True) for row in rows))))


def test_mask_equals_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    n_pairs = {True: 0, False: 0}
    for _ in range(20):
        tokens = random_row(generator, 24)
        placement = placement_of(tokens)
        mask = stream_mask(placement)[0, 0]
        for q, k in itertools.product(range(24), repeat=2):
            assert bool(mask[q, k]) == sees(tokens, q, k), (tokens[q], tokens[k])
            n_pairs[sees(tokens, q, k)] += 1
    assert min(n_pairs.values()) > 1000


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_has_the_mask_of_the_dense_kernel():
    """More than one block of 128, two rows, grouped heads."""
    generator = torch.Generator().manual_seed(1)
    placement = placement_of(*(random_row(generator, 150) for _ in range(2)))
    mask = stream_mask(placement)
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(150), torch.arange(150), indexing="ij")
    assert torch.equal(mask_function(placement)(row, row, query, key), mask[:, 0])
    q, k, v = (torch.randn(2, heads, 150, 16, generator=generator) for heads in (4, 2, 2))
    with torch.no_grad():
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        blocks = stream_blocks(placement)
        assert (attention_in_blocks(q, k, v, blocks) - dense).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1.*no dropout"):
        attention_in_blocks(q, k, v, blocks, p=0.1)


def test_mask_within_spans_is_bidirectional():
    mask = span_mask(torch.tensor([2, 3]), 3)[:, 0]
    assert mask[0].tolist() == [[True, True, False], [True, True, False], [True, True, True]] and bool(mask[1].all())


STREAMS = [
    # Parts, ids (0 in spans), positions, targets (by place), copies of spans.
    ([Part("text", [7, 8]), IMAGE], [BOS, 7, 8, BOI, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4, 4, 4], {3}, [1] * 4),
    (
        [IMAGE, Part("text", [7, 8])],
        [BOS, BOI, 0, 0, 0, 0, EOI, 7, 8, EOS],
        [0, 1, 2, 2, 2, 2, 3, 4, 5, 6],
        {7, 8, 9},
        [0] * 4,
    ),
    (
        [Part("text", [7, 8, 9, 10]), Part("audio", n_tokens=2)],
        [BOS, 7, 8, 9, 10, BOA, LENGTH + 1, 0, 0],
        [0, 1, 2, 3, 4, 5, 6, 1.5, 3.5],
        {5, 6},
        [1] * 2,
    ),
    (
        [Part("audio", n_tokens=3), Part("text", [7])],
        [BOS, BOA, LENGTH + 2, 0, 0, 0, EOA, 7, EOS],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        {7, 8},
        [0] * 3,
    ),
    ([Part("text", [7, 8])], [BOS, 7, 8, EOS], [0, 1, 2, 3], {1, 2, 3}, []),
    (
        [Part("text", [7]), IMAGE, Part("text", [8, 9]), Part("audio", n_tokens=1), Part("text", [5])],
        [BOS, 7, BOI, *[0] * 8, EOI, 8, 9, BOA, LENGTH, 0, 0, EOA, 5, EOS],
        [0, 1, 2, *[3] * 8, 4, 5, 6, 7, 8, 5.5, 5.5, 9, 10, 11],
        {2, 12, 13, 14, 15, 19, 20},
        [1] * 4 + [0] * 4 + [1, 0],
    ),
]


@pytest.mark.parametrize("parts, ids, positions, targets, copies", STREAMS)
def test_streams_are_laid_out_token_by_token(parts, ids, positions, targets, copies):
    stream = build_stream(CONFIG, parts)
    assert stream.ids == ids and stream.positions == positions
    assert stream.labels == [token if place in targets else -100 for place, token in enumerate(ids)]
    assert [copy for copy, span in zip(stream.copy, stream.span) if span >= 0] == copies
    # Every copy of a span is stated once, where its tokens are.
    tokens = [place for span in stream.spans for place in range(span.start, span.start + span.n_tokens)]
    assert tokens == [place for place, span in enumerate(stream.span) if span >= 0]
    assert all(stream.copy[span.start] == span.is_noisy for span in stream.spans)


def test_an_open_stream_has_no_target_and_no_noise():
    stream = build_stream(CONFIG, [Part("text", [7]), IMAGE], is_open=True)
    assert stream.ids == [BOS, 7, BOI, 0, 0, 0, 0, EOI] and stream.cursor == 5
    assert set(stream.labels) == {-100} and not any(stream.copy)


def test_audio_counts_where_the_configuration_says_so():
    stream = build_stream(CONFIG.replace(audio_position="count"), [Part("text", [7]), Part("audio", n_tokens=2)])
    assert stream.positions == [0, 1, 2, 3, 4, 5]


def test_kinds_of_targets_of_a_stream():
    labels = torch.tensor([-100, 7, BOI, 7, BOA, LENGTH, LENGTH + 95, EOS, BOI - 1])
    kinds = {name: is_kind.nonzero().flatten().tolist() for name, is_kind in target_kinds(CONFIG, labels).items()}
    assert kinds == {"text": [1, 3, 7, 8], "begin": [2, 4], "length": [5, 6]}


def test_packed_documents_see_themselves_alone():
    stream = Stream()
    stream.add_documents([1, 7, 8, 1, 9], [0, 0, 0, 1, 1])
    batch = join_streams([stream, build_stream(CONFIG, [Part("text", [7])])], 0)
    assert batch.labels[0].tolist() == [-100, 7, 8, -100, 9] and batch.positions[0].tolist() == [0, 1, 2, 3, 4]
    mask = stream_mask(batch.placement)[:, 0]
    assert mask[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert mask[1, :3, :3].sum() == 6 and mask[1, :3, 3:].sum() == 0


def test_a_later_span_is_hidden_and_padding_too():
    parts = [[Part("text", [7]), IMAGE, Part("text", [8])], [Part("text", [7])]]
    batch = join_streams([build_stream(CONFIG, each) for each in parts], 0)
    mask = stream_mask(batch.placement)[:, 0]
    noise, clean, text = slice(3, 7), slice(7, 11), 12
    assert not mask[0, clean, noise].any() and not mask[0, noise, clean].any() and not mask[0, text, noise].any()
    assert mask[0, noise, noise].all() and mask[0, clean, clean].all() and mask[0, text, clean].all()
    assert mask[1, :3, 3:].sum() == 0 and batch.labels[1].tolist()[:3] == [-100, 7, 1]


@pytest.mark.parametrize(
    "part, message",
    [
        (Part("audio", n_tokens=97), "audio has 97 tokens.*audio_max_tokens=96"),
        (Part("audio"), "audio has 0 tokens"),
        (Part("image", n_tokens=3), "image has 3 tokens; it must have 4"),
    ],
)
def test_spans_of_a_wrong_length_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        build_stream(CONFIG, [Part("text", [7]), part])
    with pytest.raises(ValueError, match=r"modality 'audio'.*modalities="):
        build_stream(CONFIG.with_modalities(["text", "image"]), [Part("audio", n_tokens=1)])


def test_latents_become_tokens_and_back():
    latents = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    tokens = image_tokens(latents, 2)
    assert tokens.shape == (2, 4, 12) and tokens[0, 1].tolist() == latents[0, :, :2, 2:].flatten().tolist()
    assert torch.equal(image_latents(tokens, 2), latents)
    frames = torch.arange(10.0).view(5, 2)
    tokens = audio_tokens(frames, 4)
    assert tokens.tolist() == [[*range(8)], [8, 9] * 4] and torch.equal(audio_latents(tokens, 4)[:5], frames)
