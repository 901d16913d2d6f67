"""The probe of text and image: images whose captions are known, and the closed forms behind it."""

import pytest
import torch

from utils.metrics.caption_agreement import (
    BLOCKS,
    ImageFeatures,
    TextProbe,
    UnusableCaptionsError,
    caption_folds,
    chance_of,
    describe_few,
    held_out_error,
    other_captions,
    thin_svd,
)

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
GROUNDS = {"white": 1.0, "gray": 0.0, "black": -1.0}
PLACES = {"left": slice(2, 14), "right": slice(18, 30)}


def scene(colour, place, ground, generator):
    """A coloured square on a ground, with a little noise."""
    image = torch.full((3, 32, 32), GROUNDS[ground])
    image[:, 8:24, PLACES[place]] = torch.tensor(COLOURS[colour]).view(3, 1, 1).float()
    return (image + 0.1 * torch.randn(3, 32, 32, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def scenes():
    """Features and captions of 24 scenes, each drawn eight times; six of the 24 are held out."""
    generator = torch.Generator().manual_seed(0)
    rows = [(c, p, g) for c in COLOURS for p in PLACES for g in GROUNDS for _ in range(8)]
    look = ImageFeatures()
    with torch.no_grad():
        features = look(torch.stack([scene(*row, generator) for row in rows]))
    captions = [f"A {colour} square at the {place} on {ground}." for colour, place, ground in rows]
    held_out = torch.tensor(
        [(list(COLOURS).index(c) + list(PLACES).index(p) + list(GROUNDS).index(g)) % 4 == 0 for c, p, g in rows]
    )
    part = lambda flags: (features[flags], [caption for caption, flag in zip(captions, flags) if flag])  # noqa: E731
    return part(~held_out), part(held_out)


@pytest.fixture(scope="module")
def probe(scenes):
    return TextProbe(*scenes[0])


def test_captions_of_unseen_combinations_are_found(probe, scenes):
    features, captions = scenes[1]
    assert features.shape == (48, sum(BLOCKS)) and len(set(captions)) == 6
    assert set(probe.words) == {*COLOURS, *PLACES, *GROUNDS}  # "a square at the on" are in every caption.
    assert probe.explained > 0.8
    scores = probe.agreement(features, captions)
    assert scores["top1"] > 0.95 and scores["words"] > 0.99


def test_shuffled_captions_are_not_found(probe, scenes):
    features, captions = scenes[1]
    shuffled = other_captions(captions, seed=0)
    assert probe.agreement(features, shuffled)["top1"] < 0.05
    assert probe.agreement(features, shuffled)["words"] < 0.75
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)) * probe.scale + probe.center
    assert abs(probe.agreement(noise, captions)["top1"] - 1 / 6) < 0.17
    assert abs(probe.agreement(noise, captions)["words"] - 0.5) < 0.15


def test_every_image_gets_another_caption():
    captions = ["a", "b", "a", "c", "d"]
    for seed in range(5):
        others = other_captions(captions, seed)
        assert all(one != other for one, other in zip(captions, others)) and others[0] == others[2]
        assert set(others) == set(captions)
    with pytest.raises(UnusableCaptionsError, match="only one caption, 'a'"):
        other_captions(["a", "a"], 0)


def test_equally_similar_captions_share_the_point(probe, scenes):
    features, captions = scenes[1]
    doubled = [f"{caption} {'indeed' if i % 2 else 'perhaps'}" for i, caption in enumerate(captions)]
    assert probe.agreement(features, doubled)["top1"] == pytest.approx(
        0.5 * probe.agreement(features, captions)["top1"], abs=1e-6
    )


def test_few_distinct_captions_come_with_chance_and_the_score_of_one_for_all(probe):
    two = ["A red square at the left on white."] * 3 + ["A blue square at the right on black."]
    remark = describe_few(two)
    assert chance_of(two) == 0.5 and "only 2 distinct captions: chance is 0.500" in remark and "up to 0.750" in remark
    # Noise gets the same caption each time, and the remark's score if that is the frequent one.
    generator = torch.Generator().manual_seed(0)
    noise = ImageFeatures()(torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1)
    assert probe.agreement(noise, two)["top1"] in (0.25, 0.75)
    assert "all captions are equal" in describe_few(two[:3])
    assert describe_few([str(number) for number in range(20)]) == ""


def test_the_same_data_give_the_same_probe(probe, scenes):
    assert torch.equal(TextProbe(*scenes[0]).weight, probe.weight)


@pytest.mark.parametrize(
    "captions, reason",
    [
        ([""] * 20, "captions are empty"),
        (["one caption"] * 20, "there is only one caption, 'one caption'"),
        ([f"number{i}" for i in range(20)], "no word occurs in 5 of 20 captions"),
    ],
)
def test_captions_that_teach_nothing_are_named(captions, reason):
    with pytest.raises(UnusableCaptionsError, match=reason):
        TextProbe(torch.randn(20, sum(BLOCKS)), captions)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)], ids=["dual", "primal"])
def test_ridge_and_its_left_out_errors_are_those_of_the_normal_equations(shape):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape[0], width, generator=generator).double() for width in (shape[1], 3))
    x, y, penalty = x - x.mean(0), y - y.mean(0), 2.5
    u, s, v = thin_svd(x)
    assert torch.allclose((u * s.sqrt()) @ v.T, x)
    solve = lambda x, y: torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).double(), x.T @ y)  # noqa: E731
    assert torch.allclose(v @ (u.T @ y * (s.sqrt() / (s + penalty))[:, None]), solve(x, y))
    folds = caption_folds([f"caption {i // 2}" for i in range(len(x))])
    assert all(len(fold) % 2 == 0 for fold in folds) and sorted(torch.cat(folds).tolist()) == list(range(len(x)))
    total = 0.0
    for fold in folds:
        kept = [i for i in range(len(x)) if i not in fold.tolist()]
        center, level = x[kept].mean(0), y[kept].mean(0)
        weight = solve(x[kept] - center, y[kept] - level)
        total += (y[fold] - level - (x[fold] - center) @ weight).square().sum().item()
    error = held_out_error(u, s / (s + penalty), y, projected=u.T @ y, folds=folds)
    assert error == pytest.approx(total / y.numel(), rel=1e-9)
