"""Does an image show what its caption says? A probe reads the caption's words from frozen features of the image.

N images, D features, W words, M captions. The probe is trained on real images and their captions in closed form:
the same data give the same probe. It knows single words that occur often enough, not their order.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image.feature_extractors import EfficientNetFeatures, FrozenModule

N_POOLED = 1280  # the first features; distances between sets of images are taken on these alone
GRID, COLOUR_GRID = 2, 4  # rows and columns that a tap, and the image itself, are averaged to
BLOCKS = (N_POOLED, *(GRID**2 * width for width in (16, 24, 40, 112, 320)), 3 * COLOUR_GRID**2)
MIN_OCCURRENCES = 5  # captions that have a word, and that lack it
MAX_WORDS, MAX_TRAINING, N_FOLDS = 1000, 5000, 10
PENALTIES = torch.logspace(-5, 1, 13).tolist()  # in units of the mean squared length of an image's features


class UnusableCaptionsError(ValueError):
    """No probe can be trained on these captions; the message says why."""


class ImageFeatures(FrozenModule):
    """EfficientNet-Lite0 (ImageNet): pooled features, its taps on a grid of 2 x 2, and colours on one of 4 x 4."""

    def __init__(self):
        super().__init__()
        self.network = EfficientNetFeatures()
        self.freeze()

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: (B, 3, Y, X) in [-1, 1], sides at least 32.
        Returns: (B, D) fp32 on the CPU, parts as in BLOCKS, the pooled ones first."""
        pooled = self.network.extract(image.float()).mean((2, 3))
        taps, self.network.taps = self.network.taps, []
        coarse = [F.adaptive_avg_pool2d(tap, GRID).flatten(1) for tap in taps]
        colours = F.adaptive_avg_pool2d(image.float(), COLOUR_GRID).flatten(1)
        return torch.cat([pooled, *coarse, colours], dim=1).float().cpu()


def words_of(caption: str) -> set[str]:
    """The words of a caption, in lower case."""
    return set(re.findall(r"\w+", caption.lower()))


def other_captions(captions: Sequence[str], seed: int) -> list[str]:
    """For each caption a different one of the same set; equal ones get equal ones.

    Raises: UnusableCaptionsError: all captions are equal.
    """
    distinct = sorted(set(captions))
    if len(distinct) < 2:
        raise UnusableCaptionsError(f"there is only one caption, {distinct[0]!r}" if distinct else "no captions")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    following = {distinct[order[i - 1]]: distinct[order[i]] for i in range(len(order))}
    return [following[caption] for caption in captions]


class TextProbe:
    """Ridge regression from the features of an image to the words of its caption.

    Features are standardised and each block weighs the same; words are standardised too. The penalty is the one with
    the smallest error on captions left out, a tenth at a time (in closed form, from one decomposition).

    Args:
        features: of real images, (N, D), see `ImageFeatures`; at most 5000 are used, spread evenly.
        captions: N texts.
    Attributes:
        words: the W words it knows.
        explained: share of the words' variance that it predicts for captions left out.
    Raises:
        UnusableCaptionsError: no word occurs in 5 captions and is missing in 5 others.
    """

    def __init__(self, features: Tensor, captions: Sequence[str]):
        chosen = [i * len(captions) // MAX_TRAINING for i in range(MAX_TRAINING)]
        if len(captions) > MAX_TRAINING:
            features, captions = features[chosen], [captions[i] for i in chosen]
        self.words = choose_words(captions)
        self.center, self.scale = features.mean(0), features.std(0).clamp_min(1e-6)
        self.scale = self.scale * torch.cat([torch.full((size,), size**0.5) for size in BLOCKS])
        share = self.count_words(captions).mean(0)
        self.share, self.deviation = share, (share * (1 - share)).sqrt()
        x, y = self.standardise(features), self.word_vectors(captions)
        u, s, v = thin_svd(x)
        folds, projected = caption_folds(captions), u.T @ y
        penalties = [penalty * float(s.sum()) / len(x) for penalty in PENALTIES]
        errors = [held_out_error(u, s / (s + penalty), y, projected, folds) for penalty in penalties]
        best = min(range(len(errors)), key=errors.__getitem__)
        self.explained = 1 - errors[best]
        self.weight = v @ (projected * (s.sqrt() / (s + penalties[best]))[:, None])  # (D, W)

    def standardise(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D), zero mean; all blocks with the same total variance."""
        return (features - self.center) / self.scale

    def count_words(self, captions: Sequence[str]) -> Tensor:
        """(N, W) fp32, 1 where the caption has the word."""
        return torch.tensor([[word in found for word in self.words] for found in map(words_of, captions)]).float()

    def word_vectors(self, captions: Sequence[str]) -> Tensor:
        """(N, W), zero mean and unit variance over the training captions."""
        return (self.count_words(captions) - self.share) / self.deviation

    def predict(self, features: Tensor) -> Tensor:
        """(N, D) -> word vectors (N, W)."""
        return self.standardise(features) @ self.weight

    def similarity(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine between what each image shows and what each caption says, (N, M)."""
        return F.normalize(self.predict(features), dim=1) @ F.normalize(self.word_vectors(captions), dim=1).T

    def agreement(self, features: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """How well images (N, D) and their N captions go together.

        top1      share of images that are most similar to their own caption among the distinct ones; several equally
                  similar captions share the point
        words     probability that a word is predicted higher for an image whose caption has it than for one whose
                  caption has not, mean over the words that some but not all captions have; 0.5 is chance
        Raises: UnusableCaptionsError: all captions are equal.
        """
        distinct = sorted(set(captions))
        if len(distinct) < 2:
            raise UnusableCaptionsError(f"there is only one caption, {distinct[0]!r}")
        number = {caption: i for i, caption in enumerate(distinct)}
        scores = self.similarity(features, distinct)
        best = scores >= scores.amax(1, keepdim=True) - 1e-6
        own = torch.tensor([number[caption] for caption in captions])
        credit = best[torch.arange(len(own)), own] / best.sum(1)
        return {"top1": credit.mean().item(), "words": self.rank_words(features, captions)}

    def rank_words(self, features: Tensor, captions: Sequence[str]) -> float:
        """See `words` in `agreement`; 0.5 where no known word tells the captions apart."""
        has = self.count_words(captions)
        has, predicted = (each[:, (has.mean(0) % 1) > 0].double() for each in (has, self.predict(features)))
        if has.shape[1] == 0:
            return 0.5
        ranks = predicted.argsort(0).argsort(0) + 1
        n_with, n_without = has.sum(0), (1 - has).sum(0)
        return (((ranks * has).sum(0) - n_with * (n_with + 1) / 2) / (n_with * n_without)).mean().item()


def choose_words(captions: Sequence[str]) -> list[str]:
    """Words that at least 5 captions have and at least 5 lack, the 1000 most frequent of them."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    enough = range(MIN_OCCURRENCES, len(captions) - MIN_OCCURRENCES + 1)
    words = sorted((word for word, count in counts.items() if count in enough), key=lambda word: (-counts[word], word))
    if words:
        return words[:MAX_WORDS]
    if not counts:
        raise UnusableCaptionsError("captions are empty")
    if len(set(captions)) == 1:
        raise UnusableCaptionsError(f"there is only one caption, {captions[0]!r}")
    raise UnusableCaptionsError(
        f"no word occurs in {MIN_OCCURRENCES} of {len(captions)} captions and is missing in {MIN_OCCURRENCES} others"
    )


def thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (N, R), squared singular values (R,), v (D, R) of (N, D), from the smaller of x x^T and x^T x."""
    s, vectors = torch.linalg.eigh(x @ x.T if len(x) <= x.shape[1] else x.T @ x)
    kept = s > 1e-6 * s[-1]
    s, vectors = s[kept], vectors[:, kept]
    if len(x) <= x.shape[1]:
        return vectors, s, x.T @ vectors / s.sqrt()
    return x @ vectors / s.sqrt(), s, vectors


def caption_folds(captions: Sequence[str]) -> list[Tensor]:
    """Indices of the images in each of at most ten parts; equal captions are in one part."""
    distinct = sorted(set(captions), key=lambda caption: hashlib.sha256(caption.encode()).digest())
    part = {caption: i % N_FOLDS for i, caption in enumerate(distinct)}
    parts = torch.tensor([part[caption] for caption in captions])
    return [torch.nonzero(parts == i)[:, 0] for i in range(min(N_FOLDS, len(distinct)))]


def held_out_error(u: Tensor, shrink: Tensor, y: Tensor, projected: Tensor, folds: list[Tensor]) -> float:
    """Mean squared error of ridge regression on each fold when it is left out.

    With the hat matrix H = u diag(shrink) u^T + 1/N (the mean), the residual of a fold that is left out is
    (I - H_ff)^-1 (y - H y)_f.
    """
    residual = y - u @ (shrink[:, None] * projected)
    total = 0.0
    for fold in folds:
        hat = (u[fold] * shrink) @ u[fold].T + 1 / len(y)
        left_out = torch.linalg.solve(torch.eye(len(fold)) - hat, residual[fold])
        total += left_out.square().sum().item()
    return total / y.numel()
