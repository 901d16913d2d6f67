"""Agreement of images, or sounds, with their captions, measured by a probe that predicts words from their features.

N images, D features, W words, M captions. The probe is fitted in closed form to real images and their captions, so the
same data give the same probe. It is a bag-of-words model of the more frequent words.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.image.feature_extractors import EfficientNetFeatures
from model.layers import FrozenModule, in_double

N_POOLED = 1280  # the first features; distances between sets of images use these alone
GRID, COLOUR_GRID = 2, 4  # rows and columns to which a tap, and the image itself, are average-pooled
BLOCKS = (N_POOLED, *(GRID**2 * width for width in (16, 24, 40, 112, 320)), 3 * COLOUR_GRID**2)
N_FEATURES = sum(BLOCKS)  # those of a network that the user gives come after these
MIN_OCCURRENCES = 5  # minimum number of captions with a word, and of captions without it
MAX_WORDS, MAX_TRAINING, N_FOLDS = 1000, 5000, 10
FEW_CAPTIONS = 20  # Of fewer distinct ones, retrieval is near chance, or right by chance, whatever the model.
PENALTIES = torch.logspace(-5, 1, 13).tolist()  # in units of the mean squared length of an image's features


class UnusableCaptionsError(ValueError):
    """No probe can be fitted to these captions; the message gives the reason."""


class ImageFeatures(FrozenModule):
    """EfficientNet-Lite0 (ImageNet): pooled features, its taps pooled to 2 x 2, and the image pooled to 4 x 4.

    Args: given: a network of the user, whose features come last.
    """

    def __init__(self, given: nn.Module | None = None):
        super().__init__()
        self.network, self.given = EfficientNetFeatures(), given
        self.freeze()

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: (B, 3, Y, X) in [-1, 1], sides at least 32.
        Returns: (B, D) fp32 on the CPU, blocks as in BLOCKS, the pooled features first; then those of `given`."""
        pooled = self.network.extract(image.float()).mean((2, 3))
        taps, self.network.taps = self.network.taps, []
        coarse = [F.adaptive_avg_pool2d(tap, GRID).flatten(1) for tap in taps]
        colours = F.adaptive_avg_pool2d(image.float(), COLOUR_GRID).flatten(1)
        features = torch.cat([pooled, *coarse, colours], dim=1).float().cpu()
        return features if self.given is None else torch.cat([features, self.given(image)], dim=1)


def words_of(caption: str) -> set[str]:
    """The words of a caption, in lower case."""
    return set(re.findall(r"\w+", caption.lower()))


def other_captions(captions: Sequence[str], seed: int) -> list[str]:
    """For each caption a different caption of the same set; equal captions get equal ones.

    Raises: UnusableCaptionsError: all captions are equal.
    """
    distinct = sorted(set(captions))
    if len(distinct) < 2:
        raise UnusableCaptionsError(f"there is only one caption, {distinct[0]!r}" if distinct else "no captions")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    following = {distinct[order[i - 1]]: distinct[order[i]] for i in range(len(order))}
    return [following[caption] for caption in captions]


def chance_of(captions: Sequence[str]) -> float:
    """The expected `top1` of guessing, see `TextProbe.agreement`: one over the number of distinct captions."""
    return 1 / len(set(captions))


def describe_few(captions: Sequence[str]) -> str:
    """What few distinct captions do to `top1`, see `TextProbe.agreement`; `""` where there are enough."""
    counts = Counter(captions)
    if len(counts) >= FEW_CAPTIONS:
        return ""
    if len(counts) < 2:
        return "all captions are equal, so that there is no agreement with them"
    share = max(counts.values()) / len(captions)
    return (
        f"agreement with only {len(counts)} distinct captions: chance is {chance_of(captions):.3f}, the same caption "
        f"for all scores up to {share:.3f}, and even noise may score 1; compare {FEW_CAPTIONS} or more"
    )


class TextProbe:
    """Ridge regression from the features of an image to the words of its caption.

    Features are standardised, and each block has the same total variance; words are standardised too. The penalty is
    chosen by 10-fold cross-validation over distinct captions, in closed form from one decomposition.

    Args:
        features: of real images, (N, D), see `ImageFeatures`; at most 5000 are used, evenly spaced.
        captions: N texts.
        blocks: widths of the blocks of features; further features are not read.
    Attributes:
        words: its vocabulary of W words.
        explained: share of the words' variance that it predicts for held-out captions (R^2).
    Raises:
        UnusableCaptionsError: no word occurs in 5 captions and is absent from 5 others.
    """

    def __init__(self, features: Tensor, captions: Sequence[str], blocks: Sequence[int] = BLOCKS):
        chosen = [i * len(captions) // MAX_TRAINING for i in range(MAX_TRAINING)]
        if len(captions) > MAX_TRAINING:
            features, captions = features[chosen], [captions[i] for i in chosen]
        self.words, self.width = choose_words(captions), sum(blocks)
        features = features[:, : self.width]
        # Standardise features and words. A block of `size` features is divided by sqrt(size).
        self.center, self.scale = features.mean(0), features.std(0).clamp_min(1e-6)
        self.scale = self.scale * torch.cat([torch.full((size,), size**0.5) for size in blocks])
        share = self.count_words(captions).mean(0)
        self.share, self.std = share, (share * (1 - share)).sqrt()  # of a Bernoulli variable
        x, y = self.standardise(features), self.word_vectors(captions)
        # Ridge regression for every penalty from one decomposition; the best one by cross-validation is kept.
        u, s, v = thin_svd(x)
        folds, projected = caption_folds(captions), u.T @ y
        penalties = [penalty * float(s.sum()) / len(x) for penalty in PENALTIES]
        errors = [held_out_error(u, s / (s + penalty), y, projected=projected, folds=folds) for penalty in penalties]
        best = min(range(len(errors)), key=errors.__getitem__)
        self.explained = 1 - errors[best]
        self.weight = v @ (projected * (s.sqrt() / (s + penalties[best]))[:, None])  # (D, W)

    def standardise(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D) with zero mean and the same total variance in every block."""
        return (features[:, : self.width] - self.center) / self.scale

    def count_words(self, captions: Sequence[str]) -> Tensor:
        """(N, W) fp32, 1 where the caption has the word."""
        return torch.tensor([[word in words for word in self.words] for words in map(words_of, captions)]).float()

    def word_vectors(self, captions: Sequence[str]) -> Tensor:
        """(N, W), zero mean and unit variance over the training captions."""
        return (self.count_words(captions) - self.share) / self.std

    def predict(self, features: Tensor) -> Tensor:
        """(N, D) -> word vectors (N, W)."""
        return self.standardise(features) @ self.weight

    def similarity(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarity of the word vectors predicted from N images and those of M captions, (N, M)."""
        return F.normalize(self.predict(features), dim=1) @ F.normalize(self.word_vectors(captions), dim=1).T

    def agreement(self, features: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Agreement of images (N, D) with their N captions.

        top1      retrieval accuracy: share of images whose own caption has the highest similarity among the distinct
                  captions; ties count fractionally
        words     area under the ROC curve of predicting a word, mean over the words that some but not all captions
                  have; 0.5 is chance
        Raises: UnusableCaptionsError: all captions are equal.
        """
        distinct = sorted(set(captions))
        if len(distinct) < 2:
            raise UnusableCaptionsError(f"there is only one caption, {distinct[0]!r}")
        indices = {caption: i for i, caption in enumerate(distinct)}
        scores = self.similarity(features, distinct)  # (N, M)
        best = scores >= scores.amax(1, keepdim=True) - 1e-6
        target = torch.tensor([indices[caption] for caption in captions])
        credit = best[torch.arange(len(target)), target] / best.sum(1)
        return {"top1": credit.mean().item(), "words": self.rank_words(features, captions)}

    def rank_words(self, features: Tensor, captions: Sequence[str]) -> float:
        """See `words` in `agreement`; 0.5 where no word of the vocabulary differs between the captions."""
        return mean_auc(self.count_words(captions), self.predict(features))


def mean_auc(has: Tensor, predicted: Tensor) -> float:
    """Area under the ROC curve, mean over the columns that have both classes; 0.5 where there is none.

    Args: has: (N, W), 0 or 1. predicted: scores, (N, W).
    """
    differs = (has.float().mean(0) % 1) > 0
    has, predicted = in_double(has[:, differs]), in_double(predicted[:, differs])
    if has.shape[1] == 0:
        return 0.5
    # AUC as the Mann-Whitney U statistic of the ranks.
    ranks = predicted.argsort(0).argsort(0) + 1
    n_with, n_without = has.sum(0), (1 - has).sum(0)
    return (((ranks * has).sum(0) - n_with * (n_with + 1) / 2) / (n_with * n_without)).mean().item()


def choose_words(captions: Sequence[str]) -> list[str]:
    """Words that occur in at least 5 captions and are absent from at least 5; at most the 1000 most frequent."""
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
        f"no word occurs in {MIN_OCCURRENCES} of {len(captions)} captions and is absent from {MIN_OCCURRENCES} others"
    )


def thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of x (N, D): u (N, R), squared singular values (R,), v (D, R), from the smaller of x x^T and x^T x."""
    s, vectors = torch.linalg.eigh(x @ x.T if len(x) <= x.shape[1] else x.T @ x)
    is_significant = s > 1e-6 * s[-1]  # Directions without variance would be divided by zero.
    s, vectors = s[is_significant], vectors[:, is_significant]
    if len(x) <= x.shape[1]:
        return vectors, s, x.T @ vectors / s.sqrt()
    return x @ vectors / s.sqrt(), s, vectors


def caption_folds(captions: Sequence[str]) -> list[Tensor]:
    """Indices of the images in each of at most ten folds; equal captions are in the same fold."""
    distinct = sorted(set(captions), key=lambda caption: hashlib.sha256(caption.encode()).digest())
    fold = {caption: i % N_FOLDS for i, caption in enumerate(distinct)}
    folds = torch.tensor([fold[caption] for caption in captions])
    return [torch.nonzero(folds == i)[:, 0] for i in range(min(N_FOLDS, len(distinct)))]


def held_out_error(u: Tensor, shrink: Tensor, y: Tensor, *, projected: Tensor, folds: list[Tensor]) -> float:
    """Mean squared error of ridge regression in cross-validation.

    With the hat matrix H = u diag(shrink) u^T + 1/N (the mean), the residual of a held-out fold f is
    (I - H_ff)^-1 (y - H y)_f.

    Args:
        u: left singular vectors of the features, (N, R).
        shrink: s / (s + penalty), (R,).
        y: word vectors, (N, W).
        projected: u^T y, (R, W).
        folds: indices of the images in each fold.
    """
    residual = y - u @ (shrink[:, None] * projected)
    total = 0.0
    for fold in folds:
        hat = (u[fold] * shrink) @ u[fold].T + 1 / len(y)
        left_out = torch.linalg.solve(torch.eye(len(fold)) - hat, residual[fold])
        total += left_out.square().sum().item()
    return total / y.numel()
