"""Phone HMMs of several speakers: one for all, and one for each speaker who has enough to learn it from.

M mel bins, F mel frames, T tokens, S speakers, K kinds of states, D features.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.audio.alignment import Alignment, PhoneHMM


class SpeakerAligners:
    """Aligns a clip with the HMM of its speaker, or with the shared one.

    Args:
        shared: the HMM of all speakers.
        speakers: HMMs of single speakers, by name.
    """

    def __init__(self, shared: PhoneHMM, speakers: dict[str, PhoneHMM] | None = None):
        self.shared, self.speakers = shared, speakers or {}

    def fit(
        self,
        clips: Sequence[Tensor],
        symbols: Sequence[Tensor],
        speakers: Sequence[str],
        *,
        min_frames: int,
        n_passes: int = 3,
    ) -> list[float]:
        """Fit the shared HMM to all clips, then adapt it to each speaker who has enough, if there are several.

        Args:
            clips, symbols: as for `PhoneHMM.fit`.
            speakers: of each clip; "" where it is not known.
            min_frames: what a speaker must have more of.
            n_passes: of the shared HMM.
        Returns: history of the shared HMM, see `PhoneHMM.fit`.
        """
        prepared = self.shared.prepare(clips, symbols)
        history = self.shared.train(prepared, n_passes)
        # Speakers with enough frames, by name, and their clips.
        n_frames: dict[str, int] = {}
        for speaker, row in zip(speakers, prepared.features, strict=True):
            n_frames[speaker] = n_frames.get(speaker, 0) + len(row)
        several = len(n_frames) > 1
        names = sorted(name for name, number in n_frames.items() if name and several and number > min_frames)
        places = [place for place, speaker in enumerate(speakers) if speaker in names]
        models = [names.index(speakers[place]) for place in places]
        self.speakers = {}
        if names:
            own = prepared.of_models(places, [0] * len(places), 0)
            self.speakers = dict(zip(names, self.shared.adapted(own, models)))
        return history

    def align(self, clips: Sequence[Tensor], symbols: Sequence[Tensor], speakers: Sequence[str]) -> Alignment:
        """Durations by each speaker's HMM. Likelihoods are those of the shared one, which makes clips comparable.

        Args: as for `fit`.
        """
        n_clips, names = len(clips), list(self.speakers)
        prepared, n_tokens = self.shared.prepare(clips, symbols), list(map(len, symbols))
        # One search of all clips by the shared model, and of those with a model of their own once more.
        places = [*range(n_clips), *(place for place, name in enumerate(speakers) if name in self.speakers)]
        models = [0] * n_clips + [1 + names.index(speakers[place]) for place in places[n_clips:]]
        model = self.shared.side_by_side([self.shared, *self.speakers.values()])
        rows = prepared.of_models(places, models, self.shared.n_kinds)
        durations, likelihoods = model.durations(rows, [n_tokens[place] for place in places])
        for place, row in zip(places[n_clips:], durations[n_clips:]):
            durations[place] = row
        ratios = self.shared.likelihood_ratios(prepared, likelihoods[:n_clips])
        return Alignment(durations[:n_clips], likelihoods[:n_clips], ratios)

    # ---- Files.

    def dump(self) -> bytes:
        """The content of a safetensors file, which `load` reads, and `PhoneHMM.load` as the shared HMM."""
        content = self.shared.dump()
        if not self.speakers:
            return content
        tensors = safetensors.torch.load(content)
        for name in ("mean", "variance"):
            # (S, K, D).
            tensors[f"speaker_{name}"] = torch.stack([getattr(aligner, name) for aligner in self.speakers.values()])
        # Names as bytes: safetensors writes several metadata in any order, and equal models must give equal bytes.
        tensors["speakers"] = torch.tensor(list(json.dumps(list(self.speakers)).encode()), dtype=torch.uint8)
        return safetensors.torch.save(tensors, {"settings": self.shared.describe()})

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """The models in a file. Raises: OSError, ValueError: no such file, or not one of aligners."""
        aligners = cls(shared := PhoneHMM.load(file))
        try:
            with safetensors.safe_open(file, "pt") as content:
                is_known = "speakers" in content.keys()  # noqa: SIM118 (no dict)
                names = json.loads(bytes(content.get_tensor("speakers").tolist())) if is_known else []
                rows = [content.get_tensor(f"speaker_{name}") for name in ("mean", "variance")] if names else [[], []]
                for name, mean, variance in zip(names, *rows, strict=True):
                    aligners.speakers[name] = shared.with_gaussians(mean, variance)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it and fit it again") from error
        return aligners
