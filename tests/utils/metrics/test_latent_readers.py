"""Readers of latents: what they learn, what they say of wrong texts, and when a saved one is used."""

import pytest
import torch

from utils.metrics.caption_agreement import UnusableCaptionsError, mean_auc
from utils.metrics.latent_readers import FactorLabels, LatentReader, WordLabels, labels_of, saved_reader, train_reader

COLORS, THINGS = ("red", "blue"), ("bear", "fish", "bird")


def factors(text):
    words = text.split()
    return {"color": words[1], "thing": words[2]} if len(words) == 3 and words[0] == "a" else None


def items(modality, n=48):
    """Latents whose first channel is the colour and second one the thing, in frames 0 to 3 and 4 to 7."""
    generator = torch.Generator().manual_seed(0)
    latents, texts = [], []
    for number in range(n):
        color, thing = number % 2, number // 2 % 3
        size = (4, 6, 6) if modality == "image" else (9 + number % 5, 4)
        x = 0.3 * torch.randn(size, generator=generator)
        if modality == "image":
            x[0] += 2 * color
            x[1, :3] += 2 * (thing - 1)
        else:
            x[:4, 0] += 4 * color
            x[4:8, 1] += 4 * (thing - 1)
        latents.append(x)
        texts.append(f"a {COLORS[color]} {THINGS[thing]}")
    return latents, texts


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize("kind", ["factors", "words"])
def test_a_reader_learns_what_latents_show(modality, kind):
    latents, texts = items(modality)
    labels = FactorLabels(texts, factors) if kind == "factors" else WordLabels(texts)
    reader = train_reader(LatentReader(modality, labels, 4, width=16), latents[:36], texts[:36], n_steps=80)
    scores = reader.score(latents[36:], texts[36:])
    wrong = reader.score(latents[36:], [*texts[37:], texts[36]])
    if kind == "factors":
        assert min(scores.values()) >= 0.9 and wrong["all"] == 0
    else:
        assert scores["words"] >= 0.95 and scores["top1"] >= 0.8 and wrong["top1"] <= 0.1
    # A clip on its own is read as in a batch with longer ones.
    alone = torch.cat([reader.read([row]) for row in latents[36:]])
    torch.testing.assert_close(alone, reader.read(latents[36:]), atol=1e-4, rtol=1e-4)


def test_texts_decide_what_is_read():
    _, texts = items("image")
    labels = labels_of(texts, factors)
    assert isinstance(labels, FactorLabels) and labels.describe() == {"color": 2, "thing": 3}
    assert labels.targets(["a red bird", "a green bear"])["color"].tolist() == [1, -1]
    words = labels_of([*texts, "something else"], factors)
    assert isinstance(words, WordLabels) and set(words.words) == {*COLORS, *THINGS}
    with pytest.raises(UnusableCaptionsError, match="only one caption"):
        labels_of(["the same text"] * 20, factors)
    with pytest.raises(ValueError, match="'something' has no factors"):
        FactorLabels(["something"], factors)


def test_equal_texts_share_the_credit():
    labels = WordLabels([f"{color} thing {number}" for number in range(6) for color in COLORS])
    # Both texts have the same known words, so that neither is nearer.
    scores = labels.scores(torch.zeros(2, labels.width), ["blue one", "blue two"])
    assert scores["top1"] == pytest.approx(0.5) and scores["words"] == 0.5
    assert mean_auc(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [1.0]])) == 0


def test_a_saved_reader_is_used_for_the_same_data_alone(tmp_path):
    latents, texts = items("image", 12)
    calls = []

    def load():
        calls.append(1)
        return latents, texts

    def read(**identity):
        reader = LatentReader("image", FactorLabels(texts, factors), 4, width=4)
        options = {"n_steps": identity.pop("n_steps", 3), "identity": identity}
        return saved_reader(tmp_path / "readers" / "image.safetensors", reader, load, **options).read(latents)

    first = read(data="x")
    assert torch.equal(read(data="x"), first) and len(calls) == 1
    read(data="y")
    read(data="y", n_steps=4)
    assert len(calls) == 3
    # A damaged file is replaced.
    (tmp_path / "readers" / "image.safetensors").write_bytes(b"damaged")
    assert torch.equal(read(data="x"), first) and len(calls) == 4
