"""Alignment of tokens with frames, for text to speech: which token lasts how long.

B batch, M mel bins, F frames, T tokens, N states, K kinds of states, D features, Z latent channels, L latent frames.

Tokens come in their order. Each lasts at least one frame, except optional ones (pauses), which may be skipped, though
never two in a row. `monotonic_alignment` finds the best such alignment for any log-likelihoods; `PhoneHMM` learns
those of phones from log-mels, or from latents, within seconds, from a flat start.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.audio.lengths import valid_frames

N_CEPSTRA = 13
CEPSTRA_FLOOR = -9.0  # Log-mels are clamped here: the depth of silence tells phones nothing.
MIN_VARIANCE = 0.02  # of the global variance
QUIET_SHARE = 0.12  # of a clip's frames; those of them at its ends count as pauses at first
PRIOR_FRAMES = (20.0, 3.0)  # Weight of the global Gaussian in the first pass, and in the later ones.
ADAPTATION_FRAMES = 20.0  # Weight of the Gaussians of all speakers in those of one.
MAX_CELLS = 2_000_000  # of clips x frames x states in a batch: about 50 MB
GAUSSIANS = ("mean", "variance")
Inputs = Literal["mel", "latents"]


# ---- The search.


@torch.no_grad()
def best_paths(log_likelihood: Tensor, n_states: Tensor, n_frames: Tensor, optional: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely path of each clip (Viterbi): from frame to frame it stays, goes on, or skips an optional state.

    It begins in the first state, or the second where the first is optional, and ends likewise.

    Args:
        log_likelihood: (B, F, N) of each frame in each state.
        n_states, n_frames: valid ones of each clip, (B,).
        optional: states that may be skipped, (B, N) bool.
    Returns: states (B, F) int64, meaningless beyond a clip's end, and the sum of log-likelihoods (B,), -inf where
        a clip has too few frames.
    """
    # Longest clips first: those that have not ended are always the first rows.
    lengths, order = n_frames.sort(descending=True, stable=True)
    if (lengths != n_frames).any():  # Else nothing needs to be copied.
        log_likelihood = log_likelihood[order]
    optional, last = optional[order], n_states[order] - 1
    B, n_all, N = log_likelihood.shape
    device, dtype = log_likelihood.device, log_likelihood.dtype
    # scores[:, s + 2] is that of the best path in state s so far; "state" -1 is the beginning.
    scores = torch.full((B, N + 2), -torch.inf, device=device, dtype=dtype)
    scores[:, 1] = 0
    # A skip comes from the state before an optional one.
    penalty = torch.full((B, N), -torch.inf, device=device, dtype=dtype)
    penalty[:, 1:].masked_fill_(optional[:, :-1], 0.0)
    # Whether the best path into a state comes from another one, and then whether it skips one.
    moved = torch.zeros((n_all, B, N), dtype=torch.bool, device=device)
    skipped = torch.zeros_like(moved)

    # Forwards, in stretches of frames in which the same clips go on.
    ends = sorted(set(lengths.tolist()))
    for start, end in itertools.pairwise([0, *ends]):
        n = int((lengths >= end).sum())
        skip, step, stay = scores[:n, :-2], scores[:n, 1:-1], scores[:n, 2:]
        best, penalties = torch.empty_like(stay), penalty[:n]
        columns = (
            log_likelihood[:n, start:end].unbind(1),
            moved[start:end, :n].unbind(),
            skipped[start:end, :n].unbind(),
        )
        for f, (value, is_move, is_skip) in enumerate(zip(*columns), start):
            torch.add(skip, penalties, out=best)
            torch.gt(best, step, out=is_skip)
            torch.maximum(best, step, out=best)
            torch.gt(best, stay, out=is_move)
            torch.maximum(best, stay, out=best)
            torch.add(best, value, out=stay)
            if f == 0:
                scores[:, 1] = -torch.inf  # The beginning lies behind all paths.

    # The last state, or the one before it where the last is optional; backwards from there.
    rows = torch.arange(B, device=device)
    finals = torch.stack([scores[rows, last + 2], scores[rows, last + 1]], 1)
    finals[:, 1].masked_fill_(~optional[rows, last], -torch.inf)
    total, earlier = finals.max(1)
    state = (last - earlier).clamp_min_(0)[:, None]  # (B, 1)
    moves = moved.byte().mul_(skipped.byte().add_(1))  # (F, B, N): 0, 1 or 2 states
    moves[0] = 0
    states = torch.empty((n_all, B, 1), dtype=torch.int64, device=device)
    for move, row in zip(reversed(moves.unbind()), reversed(states.unbind())):
        row.copy_(state)
        state -= move.gather(1, state)
    places = order.argsort()
    return states[:, places, 0].T, total[places]


def monotonic_alignment(
    log_likelihood: Tensor,
    n_tokens: Tensor,
    n_frames: Tensor,
    optional: Tensor | None = None,
    *,
    min_frames: int = 1,
) -> Tensor:
    """Frames of each token in the most likely monotonic alignment (algorithm 1 of Glow-TTS, arXiv 2005.11129; that
    tokens may be optional is added here).

    Args:
        log_likelihood: (B, F, T) of each frame in each token.
        n_tokens, n_frames: valid ones of each clip, (B,).
        optional: tokens that may last 0 frames, (B, T) bool, never two in a row; None: no token.
        min_frames: minimum of each other token.
    Returns: (B, T) int64, 0 beyond a clip's tokens; the sum of a clip is its number of frames.
    Raises: ValueError: clips with too few frames (named).
    """
    B, _, T = log_likelihood.shape
    optional = torch.zeros(B, T, dtype=torch.bool, device=log_likelihood.device) if optional is None else optional
    # A token is so many states in a row: (B, T) -> states (B, N) with the token of each.
    valid = valid_frames(n_tokens, T)
    repeats = torch.where(optional, 1, min_frames) * valid
    tokens = [torch.arange(T, device=valid.device).repeat_interleave(row) for row in repeats]
    token_of = pad_sequence(tokens, batch_first=True)  # (B, N)
    scores = log_likelihood.gather(2, token_of[:, None].expand(-1, log_likelihood.shape[1], -1))
    states, total = best_paths(scores, repeats.sum(1), n_frames, optional.gather(1, token_of))
    check_possible(total)
    return count_frames(token_of.gather(1, states), n_frames, T)


def count_frames(tokens: Tensor, n_frames: Tensor, n_tokens: int) -> Tensor:
    """Tokens of all frames (B, F) -> frames of all tokens (B, n_tokens) int64, without the frames after the end."""
    counts = torch.zeros(len(tokens), n_tokens, dtype=torch.int64, device=tokens.device)
    return counts.scatter_add_(1, tokens, valid_frames(n_frames, tokens.shape[1]).long())


def check_possible(total: Tensor) -> None:
    """Raises: ValueError: a path does not exist, or its likelihood is not finite."""
    impossible = (~total.isfinite()).nonzero()[:, 0].tolist()
    if impossible:
        raise ValueError(
            f"clips {impossible} of the batch have fewer frames than their tokens need, or likelihoods that are not "
            "finite; leave them out"
        )


# ---- The phone HMM.


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Alignments of several clips.

    Attributes:
        durations: mel frames of each token, (T,) int16 per clip; their sum is the clip's frames.
        log_likelihood: of each clip, the mean per frame.
        likelihood_ratio: the same minus that of the best state of each frame, whatever the text: at most 0, and far
            below it where the transcript is wrong.
    """

    durations: list[Tensor]
    log_likelihood: list[float]
    likelihood_ratio: list[float]


@dataclasses.dataclass(frozen=True)
class States:
    """The states of a clip's tokens in their order: numbers of their Gaussians, and places of their tokens, (N,)."""

    kinds: Tensor
    tokens: Tensor


class Clips(NamedTuple):
    """What the training sees of clips: features (F, D), states, and the best paths so far, Gaussians (F,)."""

    features: list[Tensor]
    states: list[States]
    paths: list[Tensor]

    def of_models(self, places: Sequence[int], models: Sequence[int], n_kinds: int) -> "Clips":
        """The clips at some places, each with the Gaussians of its model: see `PhoneHMM.side_by_side`."""
        offsets = [model * n_kinds for model in models]
        states = [self.states[place] for place in places]
        return Clips(
            [self.features[place] for place in places],
            [States(row.kinds + offset, row.tokens) for row, offset in zip(states, offsets, strict=True)],
            [self.paths[place] + offset for place, offset in zip(places, offsets, strict=True)],
        )


class PhoneHMM:
    """A hidden Markov model with one diagonal Gaussian per state, learned by Viterbi training from a flat start, as in
    HTK. A symbol has the same states wherever it stands; all pauses share one state; stress makes no difference.

    A state's Gaussian knows nothing of its neighbours: one that did would explain a misplaced boundary by its context.

    Args:
        n_symbols: size of the table of symbols.
        pauses: numbers of the symbols that may last 0 frames.
        n_states: states of each other symbol, and so its fewest frames.
        inputs: what is read of a clip: its log-mel (M, F), or latents at its mel frames, see `latents_at_frames`.
    """

    def __init__(self, n_symbols: int, pauses: Collection[int], n_states: int = 2, *, inputs: Inputs = "mel"):
        self.n_symbols, self.pauses, self.n_states, self.inputs = n_symbols, sorted(pauses), n_states, inputs
        # State 0 is the pause. Until `fit`, all Gaussians are alike.
        self.n_kinds = 1 + n_symbols * n_states
        self.mean = torch.zeros(self.n_kinds, 2 * N_CEPSTRA, dtype=torch.float64)
        self.variance = torch.ones_like(self.mean)

    def features(self, clip: Tensor) -> Tensor:
        """What the Gaussians are of: (F, D) fp32."""
        return cepstra(clip) if self.inputs == "mel" else clip.float()

    def fit(self, clips: Sequence[Tensor], symbols: Sequence[Tensor], n_passes: int = 3) -> list[float]:
        """Learn the Gaussians.

        Args:
            clips: log-mels (M, F) or latents (F, Z), see `inputs`.
            symbols: numbers of the symbols of each clip, (T,) each.
            n_passes: rounds of estimation and alignment.
        Returns: mean log-likelihood per frame of the alignment of each pass.
        Raises: ValueError: no clip, or one with fewer frames than `needed_frames`.
        """
        return self.train(self.prepare(clips, symbols), n_passes)

    def prepare(self, clips: Sequence[Tensor], symbols: Sequence[Tensor]) -> Clips:
        """What the other methods take of clips and their symbols, without paths; arguments as for `fit`."""
        features = [self.features(clip) for clip in clips]
        return Clips(features, [self.states(row) for row in symbols], [torch.zeros(0, dtype=torch.int64)] * len(clips))

    def train(self, clips: Clips, n_passes: int) -> list[float]:
        """`fit` on prepared clips, whose paths are then the best ones."""
        if not clips.features:
            raise ValueError("there are no clips to fit the aligner to")
        for i, pair in enumerate(zip(clips.features, clips.states, strict=True)):
            clips.paths[i] = self.flat_start(*pair)
        history = []
        for i in range(n_passes):
            self.estimate(clips, PRIOR_FRAMES[i > 0])
            history.append(self.find_paths(clips))
        return history

    def adapted(self, clips: Clips, models: Sequence[int], n_passes: int = 2) -> list[Self]:
        """Models of several speakers, whose Gaussians are drawn towards these (maximum a posteriori, Gauvain and Lee).

        Args:
            clips: with the best paths of this model.
            models: speaker of each clip, from 0 on.
        """
        n_models = max(models) + 1
        model = self.side_by_side([self] * n_models)
        prior, clips = copy.copy(model), clips.of_models(range(len(models)), models, self.n_kinds)
        for i in range(n_passes):
            if i > 0:
                model.find_paths(clips)
            model.estimate(clips, ADAPTATION_FRAMES, prior=prior)
        parts = (rows.chunk(n_models) for rows in (model.mean, model.variance))
        return [self.with_gaussians(*pair) for pair in zip(*parts)]

    def align(self, clips: Sequence[Tensor], symbols: Sequence[Tensor]) -> Alignment:
        """Frames of every token; arguments and errors as for `fit`."""
        prepared = self.prepare(clips, symbols)
        durations, likelihoods = self.durations(prepared, list(map(len, symbols)))
        return Alignment(durations, likelihoods, self.likelihood_ratios(prepared, likelihoods))

    def durations(self, clips: Clips, n_tokens: Sequence[int]) -> tuple[list[Tensor], list[float]]:
        """Frames of each token, (T,) int16 per clip, and mean log-likelihoods per frame."""
        durations, likelihoods = [torch.empty(0)] * len(n_tokens), [0.0] * len(n_tokens)
        for batch, best, total in self.search(clips):
            for row, clip, score in zip(best, batch, total.tolist()):
                n_frames = len(clips.features[clip])
                tokens = clips.states[clip].tokens[row[:n_frames]]
                durations[clip] = tokens.bincount(minlength=n_tokens[clip]).to(torch.int16)
                likelihoods[clip] = score / n_frames
        return durations, likelihoods

    def likelihood_ratios(self, clips: Clips, log_likelihood: Sequence[float]) -> list[float]:
        """See `Alignment`."""
        kinds = torch.arange(self.n_kinds)
        free = [self.scores(row.double(), kinds).amax(1).mean().item() for row in clips.features]
        return [min(score - best, 0.0) for score, best in zip(log_likelihood, free, strict=True)]

    def needed_frames(self, symbols: Tensor) -> int:
        """The fewest frames that tokens (T,) can last: pauses may be skipped, of several in a row every other one."""
        n_frames, n_pauses = 0, 0
        for is_pause in torch.isin(symbols, torch.tensor(self.pauses)).tolist():
            n_pauses = n_pauses + 1 if is_pause else 0
            n_frames += n_pauses % 2 == 0 if is_pause else self.n_states
        return max(n_frames, 1)

    # ---- Steps of the training.

    def states(self, symbols: Tensor) -> "States":
        """The states of a clip with symbols (T,)."""
        repeats = torch.where(torch.isin(symbols, torch.tensor(self.pauses)), 1, self.n_states)
        tokens = torch.arange(len(symbols)).repeat_interleave(repeats)
        place = torch.arange(len(tokens)) - (repeats.cumsum(0) - repeats)[tokens]  # of a state within its token
        kinds = 1 + self.n_states * symbols.long()[tokens] + place
        return States(kinds.where(~torch.isin(symbols, torch.tensor(self.pauses))[tokens], 0), tokens)

    def flat_start(self, features: Tensor, states: "States") -> Tensor:
        """Gaussians of all frames (F,): quiet ends are pauses, the states of all other tokens have equal shares.

        Of latents it is not known which tell loudness: pauses at the ends have a state's share.
        """
        kinds = states.kinds[states.kinds > 0]
        if self.inputs == "latents":
            is_inner = (states.kinds == 0) & (torch.arange(len(states.kinds)) % max(len(states.kinds) - 1, 1) > 0)
            kinds = states.kinds[~is_inner]
            return kinds[torch.arange(len(features)) * len(kinds) // len(features)]
        loudness = features[:, 0]
        loud = (loudness >= loudness.quantile(QUIET_SHARE)).nonzero()[:, 0]
        start, end = int(loud[0]), int(loud[-1]) + 1
        path = torch.zeros(len(features), dtype=torch.int64)
        if len(kinds):
            path[start:end] = kinds[torch.arange(end - start) * len(kinds) // (end - start)]
        return path

    def find_paths(self, clips: Clips) -> float:
        """Set the best path of every clip; returns the mean log-likelihood per frame."""
        log_likelihood = 0.0
        for batch, best, total in self.search(clips):
            log_likelihood += total.sum().item()
            for row, clip in zip(best, batch):
                clips.paths[clip] = clips.states[clip].kinds[row[: len(clips.features[clip])]]
        return log_likelihood / sum(map(len, clips.features))

    def estimate(self, clips: Clips, weight: float, *, prior: "PhoneHMM | None" = None) -> None:
        """Means and variances of the frames of each Gaussian, smoothed with `weight` frames of the global one, or of
        the same one of `prior`."""
        moments = torch.zeros(3, len(self.mean), clips.features[0].shape[1], dtype=torch.float64)
        for start in range(0, len(clips.features), 256):
            chunk = slice(start, start + 256)
            x, path = torch.cat(clips.features[chunk]).double(), torch.cat(clips.paths[chunk])
            for moment, values in zip(moments, (torch.ones_like(x), x, x.square())):
                moment.index_add_(0, path, values)
        # The global Gaussian, of each model: (models, kinds, D).
        n_frames, total, squares = moments.unflatten(1, (-1, self.n_kinds))
        mean = total.sum(1, keepdim=True) / n_frames.sum(1, keepdim=True)
        square = squares.sum(1, keepdim=True) / n_frames.sum(1, keepdim=True)
        variance = (square - mean.square()).clamp_min(1e-6)  # A constant feature has no variance.
        if prior is not None:
            mean, square = (rows.view_as(total) for rows in (prior.mean, prior.variance + prior.mean.square()))
        # Those of the states.
        own_mean = (total + weight * mean) / (n_frames + weight)
        own = (squares + weight * square) / (n_frames + weight) - own_mean.square()
        self.mean, self.variance = own_mean.flatten(0, 1), torch.maximum(own, MIN_VARIANCE * variance).flatten(0, 1)

    def search(self, clips: Clips) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Best paths of all clips, in batches of like length.

        Yields: places of the clips, states of all frames (B, F), log-likelihoods (B,).
        """
        features, states = clips.features, clips.states
        batch: list[int] = []
        N = 0
        for clip in sorted(range(len(features)), key=lambda clip: -len(features[clip])):
            N_with = max(N, len(states[clip].kinds))
            if batch and (len(batch) + 1) * len(features[batch[0]]) * N_with > MAX_CELLS:
                yield batch, *self.search_batch([features[i] for i in batch], [states[i] for i in batch])
                batch, N_with = [], len(states[clip].kinds)
            batch, N = [*batch, clip], N_with
        if batch:
            yield batch, *self.search_batch([features[i] for i in batch], [states[i] for i in batch])

    def search_batch(self, features: list[Tensor], states: list["States"]) -> tuple[Tensor, Tensor]:
        """`best_paths` of some clips, which are padded. Raises: ValueError: one has too few frames."""
        kinds = pad_sequence([row.kinds for row in states], batch_first=True)  # (B, N)
        n_states, n_frames = (torch.tensor(list(map(len, rows))) for rows in ([row.kinds for row in states], features))
        x = pad_sequence(features, batch_first=True).double()  # (B, F, D)
        best, total = best_paths(self.scores(x, kinds), n_states, n_frames, kinds % self.n_kinds == 0)
        check_possible(total)
        return best, total

    def scores(self, x: Tensor, kinds: Tensor) -> Tensor:
        """Log-likelihoods of features (..., F, D) in Gaussians (..., N): (..., F, N)."""
        # log N(x) = -(x^2 / v - 2 x m / v + m^2 / v + log 2 pi v) / 2, summed over features.
        precision = 1 / self.variance
        weights = torch.cat([-0.5 * precision, self.mean * precision], 1)[kinds]  # (..., N, 2 D)
        constant = -0.5 * (self.mean.square() * precision + (2 * math.pi * self.variance).log()).sum(1)[kinds]
        return torch.cat([x.square(), x], -1) @ weights.transpose(-2, -1) + constant[..., None, :]

    # ---- Files.

    def dump(self) -> bytes:
        """The content of a safetensors file, which `load` reads; equal models give equal bytes."""
        tensors = {"mean": self.mean.contiguous(), "variance": self.variance.contiguous()}
        return safetensors.torch.save(tensors, {"settings": self.describe()})

    def describe(self) -> str:
        """The arguments as JSON."""
        settings = {"n_symbols": self.n_symbols, "pauses": self.pauses, "n_states": self.n_states}
        return json.dumps(settings if self.inputs == "mel" else {**settings, "inputs": self.inputs})

    def with_gaussians(self, mean: Tensor, variance: Tensor) -> Self:
        """The same states with other Gaussians, (K, D) fp64."""
        model = copy.copy(self)
        model.mean, model.variance = mean, variance
        return model

    def side_by_side(self, models: "Sequence[PhoneHMM]") -> Self:
        """Several models of these states as one, so that clips of all are searched in common batches: Gaussians
        (models x K, D), those of model i from i K on. See `Clips.of_models`."""
        return self.with_gaussians(*(torch.cat([getattr(model, name) for model in models]) for name in GAUSSIANS))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """The model in a file. Raises: OSError, ValueError: no such file, or not one of an aligner."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} does not exist")
        try:
            with safetensors.safe_open(file, "pt") as content:
                model = cls(**json.loads(content.metadata()["settings"]))
                model.mean, model.variance = content.get_tensor("mean"), content.get_tensor("variance")
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} holds no aligner, or is damaged ({error}); delete it and fit it again"
            ) from error
        return model


def cepstra(mel: Tensor) -> Tensor:
    """Cepstral coefficients of a log-mel and their slopes over time: (M, F) -> (F, D) fp32."""
    coefficients = cosines(mel.shape[0]) @ mel.float().clamp_min(CEPSTRA_FLOOR)  # (13, F)
    # Slope of the regression line over 5 frames, the ends repeated.
    padded = F.pad(coefficients, (2, 2), mode="replicate")
    slope = (2 * (padded[:, 4:] - padded[:, :-4]) + padded[:, 3:-1] - padded[:, 1:-3]) / 10
    return torch.cat([coefficients, slope]).T.contiguous()


def latents_at_frames(latents: Tensor, n_frames: int, compression: int) -> Tensor:
    """Latents (L, Z) between latent frames, linearly: (F, Z) at the mel frames, `compression` of each latent frame."""
    dense = F.interpolate(latents.float().T[None], scale_factor=compression, mode="linear", align_corners=False)
    return dense[0, :, :n_frames].T.contiguous()


@functools.cache
def cosines(M: int) -> Tensor:
    """The first rows of the orthonormal discrete cosine transform of type II, (13, M) fp32."""
    bins = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    basis = torch.cos(math.pi * torch.arange(N_CEPSTRA)[:, None] * bins) * math.sqrt(2 / M)
    basis[0] /= math.sqrt(2)
    return basis.float()
