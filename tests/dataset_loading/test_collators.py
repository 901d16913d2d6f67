import pytest
import torch

from dataset_loading.collators import (
    batches_of,
    collate_audio,
    collate_by_length,
    collate_by_shape,
    collate_captioned,
    collate_stack,
    in_order,
)


def test_samples_are_stacked_along_a_new_axis():
    batch = collate_stack([{"image": torch.full((3, 2, 2), i), "index": torch.tensor(i)} for i in range(4)])
    assert batch["image"].shape == (4, 3, 2, 2)
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_different_shapes_are_named():
    with pytest.raises(ValueError, match=r"'image' has different shapes .*\(3, 2, 2\), \(3, 4, 4\)"):
        collate_stack([{"image": torch.zeros(3, 2, 2)}, {"image": torch.zeros(3, 4, 4)}])


def test_different_keys_are_named():
    with pytest.raises(ValueError, match=r"\['image'\] and \['image', 'text'\]"):
        collate_stack([{"image": torch.zeros(1)}, {"image": torch.zeros(1), "text": torch.zeros(1)}])


def captioned(lengths, **extra):
    rows = [{"mean": torch.full((2, 4, 4), float(n)), "index": torch.tensor(n)} for n in range(len(lengths))]
    tokens = [torch.arange(1, length + 1) for length in lengths]
    return [
        {**row, "tokens": one, **{name: value[n] for name, value in extra.items()}}
        for n, (row, one) in enumerate(zip(rows, tokens))
    ]


@pytest.mark.parametrize(("lengths", "width"), [((1, 3, 7), 8), ((8, 2), 8), ((9, 1), 16)])
def test_captions_are_padded_to_a_multiple_of_eight(lengths, width):
    batch = collate_captioned(captioned(lengths))
    assert batch.keys() == {"mean", "index", "tokens", "mask"}
    assert batch["tokens"].shape == (len(lengths), width) and batch["tokens"].dtype == torch.int64
    assert batch["mask"].dtype == torch.bool and batch["mask"].sum(1).tolist() == list(lengths)
    for b, length in enumerate(lengths):
        assert batch["tokens"][b].tolist() == [*range(1, length + 1), *[0] * (width - length)]
        assert batch["mask"][b, :length].all()
    assert batch["mean"][:, 0, 0, 0].tolist() == batch["index"].tolist() == list(range(len(lengths)))


def test_frozen_states_take_the_place_of_tokens():
    states = [torch.randn(length, 6).bfloat16() for length in (2, 11)]
    batch = collate_captioned(captioned((5, 6), text_states=states))
    assert batch.keys() == {"mean", "index", "text_states", "mask"}
    assert batch["text_states"].shape == (2, 16, 6) and batch["text_states"].dtype == torch.bfloat16
    for b, one in enumerate(states):
        assert torch.equal(batch["text_states"][b, : len(one)], one)
        assert not batch["text_states"][b, len(one) :].any()
        assert batch["mask"][b].tolist() == [n < len(one) for n in range(16)]


def test_captions_of_different_folders_do_not_mix():
    with pytest.raises(ValueError, match="different keys"):
        collate_captioned([*captioned((2,)), *captioned((2,), text_states=[torch.ones(1, 4)])])
    with pytest.raises(ValueError, match="without tokens"):
        collate_captioned(captioned((2, 0)))


def test_clips_of_like_length_share_a_batch():
    lengths = (9, 3, 30, 4)
    clips = [{"mel": torch.full((2, n), float(n)), "waveform": torch.ones(10 * n)} for n in lengths]
    parts = collate_by_length(clips, -9.0, 20)
    # Shortest first: 3 and 4 frames share a batch, the long clip is alone, though it exceeds the budget.
    assert [batch["n_frames"].tolist() for batch in parts["batches"].values()] == [[3, 4], [9], [30]]
    assert [batch["waveform"].shape[1] for batch in parts["batches"].values()] == [40, 90, 300]
    assert parts["rows"].tolist() == [1, 3, 0, 2]
    # A batch that is small enough is what it was.
    (whole,) = (together := collate_by_length(clips, -9.0, 120))["batches"].values()
    assert together["rows"].tolist() == [0, 1, 2, 3]
    assert all(torch.equal(value, whole[name]) for name, value in collate_audio(clips, -9.0).items())


def test_samples_of_several_shapes_are_batches_of_one_shape_each():
    shapes = [(1, 2), (2, 1), (1, 2), (1, 1)]
    samples = [{"image": torch.zeros(shape), "index": torch.tensor(row)} for row, shape in enumerate(shapes)]
    mixed = collate_by_shape(samples, collate_stack, "image")
    assert [batch["image"].shape[1:] for batch in batches_of(mixed)] == [(1, 2), (2, 1), (1, 1)]
    indices = [index for batch in batches_of(mixed) for index in batch["index"].tolist()]
    assert indices == [0, 2, 1, 3] and in_order(mixed, indices) == [0, 1, 2, 3]
    # Samples of one shape are a batch as before.
    (batch,) = batches_of(collate_by_shape(samples[::2], collate_stack, "image"))
    assert batch["index"].tolist() == in_order(batch, [0, 2]) == [0, 2]
