"""Log-mels with the conditions of a model: who speaks, and what is said.  T text tokens."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset_loading.audio.cached import AudioVAEDataset, Crop
from dataset_loading.files import fingerprint
from model.text.tokenizer import encode_caption

MAX_TOKENS = 1 << 20  # Transcripts are never cut.


class Conditions(NamedTuple):
    """Index of a clip's speaker, and its transcript in lower case; each None where items do not have it."""

    speaker: int | None
    transcript: str | None


class DescribedAudioDataset(AudioVAEDataset):
    """Items of `AudioVAEDataset` with further keys:

    speaker: int64 scalar, the index of the clip's speaker in `speaker_names`, where there are any.
    tokens: (T,) int64, begin-of-text and the bytes of the transcript in lower case, where `use_tokens`; begin-of-text
        alone where the transcript is not known.

    The `fingerprint` is that of the folder; where items have speakers or transcripts, "+" and a hash of these follow.

    Args:
        speaker_names: names in the model's order; empty: items have no speaker.
        use_tokens: items have tokens.
    Raises: ValueError: a clip's speaker is not among the names, or no clip has a transcript.
    """

    def __init__(self, folder: str | Path, split: str, speaker_names: list[str], *, use_tokens: bool):
        super().__init__(folder, split)
        self.speaker_indices = {name: index for index, name in enumerate(speaker_names)}
        self.use_tokens = use_tokens
        # Every clip must have a speaker that the model knows; some transcripts may be missing, but not all.
        for entry in self.entries if speaker_names else []:
            if entry["speaker"] not in self.speaker_indices:
                raise ValueError(
                    f"{self.folder}: clip {entry['key']} in split {split!r} has speaker {entry['speaker']!r}, which "
                    f"is not among the model's {len(speaker_names)} speakers; preprocess with a speaker for every "
                    "clip, or train without --use_speakers"
                )
        if use_tokens and not any(entry["caption"].strip() for entry in self.entries):
            raise ValueError(f"{self.folder} has no transcripts in split {split!r}, which --ctc_weight needs; use 0")
        # The folder's fingerprint does not cover them: two folders may differ in speakers alone.
        if self.speaker_indices or use_tokens:
            described = [[entry["key"], *self.conditions(entry)] for entry in self.entries]
            self.fingerprint = f"{self.fingerprint}+{fingerprint([speaker_names, described])}"

    def conditions(self, entry: dict[str, Any]) -> Conditions:
        """What a model may be told of a clip."""
        return Conditions(
            speaker=self.speaker_indices[entry["speaker"]] if self.speaker_indices else None,
            transcript=entry["caption"].strip().lower() if self.use_tokens else None,
        )

    def __getitem__(self, index: int | Crop) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        speaker, transcript = self.conditions(self.entries[int(sample["index"])])
        conditions = {}
        if speaker is not None:
            conditions["speaker"] = torch.tensor(speaker)
        if transcript is not None:
            conditions["tokens"] = torch.tensor(encode_caption(transcript, MAX_TOKENS))
        return {**sample, **conditions}
