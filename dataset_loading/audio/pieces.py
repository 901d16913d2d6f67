"""Long clips of speech cut at pauses.  L latent frames, T tokens, c mel frames of a latent frame.

Batches by a budget of frames leave out what exceeds the budget, and a clip of about the budget is a batch by itself.
Pieces are clips like others: they begin and end with silence, and are whole latent frames.
"""

import logging
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dataset_loading.audio.latents import AudioLatentDataset

logger = logging.getLogger(__name__)

EVALUATED_LATENTS = 4096  # Latent frames of a validation clip; longer ones are left out.


class Piece(NamedTuple):
    """Mel frames [start, stop) of a clip; start is a multiple of c, and so is stop unless the clip ends there."""

    start: int
    stop: int


def cut_at_pauses(durations: Tensor, is_pause: Tensor, *, max_frames: int, multiple: int) -> list[Piece]:
    """Pieces of a clip that follow one another, as alike in length as its pauses allow.

    A piece that is too long is cut in the pause that is nearest to its middle, until it has no more pause.

    Args:
        durations: mel frames of each token, (T,).
        is_pause: (T,) bool.
        max_frames: mel frames of a piece, which more frames without a pause exceed.
        multiple: c; a pause of at least 2 c mel frames can be cut.
    """
    ends = durations.cumsum(0)
    can_cut = is_pause & (durations >= 2 * multiple)
    middles = ends[can_cut] - durations[can_cut].div(2, rounding_mode="floor")
    # The silence at both ends of the clip belongs to it.
    cuts = [cut - cut % multiple for cut in middles.tolist()]
    total = int(ends[-1])
    inside = [cut for cut in cuts if int(durations[0]) < cut < total - int(durations[-1])]

    def split(piece: Piece) -> list[Piece]:
        candidates = [cut for cut in inside if piece.start < cut < piece.stop]
        if piece.stop - piece.start <= max_frames or not candidates:
            return [piece]
        cut = min(candidates, key=lambda cut: abs(2 * cut - piece.start - piece.stop))
        return [*split(Piece(piece.start, cut)), *split(Piece(cut, piece.stop))]

    return split(Piece(0, total))


class AudioLatentPieces(AudioLatentDataset):
    """`AudioLatentDataset` of speech whose clips of more than `max_frames` latent frames are cut at pauses.

    The first piece of a clip has the clip's index, further pieces follow after the last clip: what is not cut is
    numbered as in the whole data set. `entries` are those of the clips.

    Args:
        max_frames: latent frames of a piece; 0: nothing is cut. Captions describe whole clips, which stay whole.
    """

    def __init__(self, folder: str | Path, split: str, *, max_frames: int):
        super().__init__(folder, split)
        self.pieces: list[tuple[int, Piece]] = [(clip, Piece(0, n)) for clip, n in enumerate(self.mel_lengths())]
        if self.tokenizer is None or not max_frames:
            return
        for clip, length in enumerate(list(self.lengths)):
            if length > max_frames:
                first, *others = self.cut(clip, max_frames)
                self.pieces[clip] = (clip, first)
                self.pieces += [(clip, piece) for piece in others]
        self.lengths = [-(-(piece.stop - piece.start) // self.multiple) for _, piece in self.pieces]

    def without_longer(self, max_frames: int) -> Self:
        """Leave out clips of more latent frames, with a warning; for data sets that are not cut.

        Returns: this data set.
        Raises: ValueError: none is left; names the folder and the longest clip.
        """
        longest = max(self.lengths)
        if longest <= max_frames:
            return self
        short = [clip for clip, length in enumerate(self.numbers("length")) if length <= max_frames]
        message = (
            f"{self.folder}: {len(self.entries) - len(short)} of {len(self.entries)} clips of {self.split} have "
            f"more than {max_frames} latent frames, the longest {longest}"
        )
        if not short:
            raise ValueError(f"{message}; make the latents of shorter clips, see --segment_seconds")
        logger.warning("%s; they are left out", message)
        self.keep(short)
        self.lengths = self.numbers("length")
        self.pieces = [(clip, Piece(0, n)) for clip, n in enumerate(self.mel_lengths())]
        return self

    @property
    def multiple(self) -> int:
        """c."""
        return self.manifest["settings"]["mel_frames_per_latent"]

    def mel_lengths(self) -> list[int]:
        """Mel frames of every clip."""
        return self.numbers("mel_frames")

    def cut(self, clip: int, max_frames: int) -> list[Piece]:
        """The pieces of a clip."""
        sample = super().__getitem__(clip)
        is_pause = torch.isin(sample["tokens"][:, 0], torch.tensor(self.tokenizer.pauses))
        limit, multiple = max_frames * self.multiple, self.multiple
        return cut_at_pauses(sample["durations"], is_pause, max_frames=limit, multiple=multiple)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]  # Negative ones from the end; IndexError beyond it.
        clip, (start, stop) = self.pieces[index]
        sample = {**super().__getitem__(clip), "index": torch.tensor(index)}
        total = self.value(clip, "mel_frames")
        if (start, stop) == (0, total):
            return sample
        # The tokens that have frames within the piece, and those frames; a cut pause is the silence at an end.
        ends = sample["durations"].cumsum(0)
        begins = ends - sample["durations"]
        inside = ((ends > start) | (start == 0)) & ((begins < stop) | (stop == total))
        is_cut = ((begins < start) & (ends > start)) | ((begins < stop) & (ends > stop))
        tokens = torch.where(is_cut[:, None], sample["tokens"][0], sample["tokens"])
        frames = ends.clamp(start, stop).diff(prepend=torch.tensor([start]))
        latents = slice(start // self.multiple, -(-stop // self.multiple))
        return {
            **sample,
            "mean": sample["mean"][latents],
            "std": sample["std"][latents],
            "tokens": tokens[inside],
            "durations": frames[inside],
            "n_mel_frames": torch.tensor(stop - start),
        }
