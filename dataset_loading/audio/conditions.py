"""Log-mels with what is known of them: who speaks, and what is said.  T text tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.files import fingerprint
from model.text.tokenizer import encode_caption

MAX_TOKENS = 1 << 20  # Transcripts are never cut.


class DescribedAudioDataset(AudioVAEDataset):
    """Items of `AudioVAEDataset`, and beside them

    speaker: int64 scalar, the place of the clip's speaker in `speaker_names`, where there are any.
    tokens: (T,) int64, begin-of-text and the bytes of the transcript in lower case, where `use_tokens`; begin-of-text
        alone where the transcript is not known.

    The `fingerprint` of a folder does not know of speakers and transcripts; where items have them, "+" and a hash of
    those that they have stand behind it.

    Args:
        speaker_names: names in the model's order; empty: items have no speaker.
        use_tokens: items have tokens.
    Raises: ValueError: a clip's speaker is not among the names, or no clip has a transcript.
    """

    def __init__(self, folder: str | Path, split: str, speaker_names: list[str], use_tokens: bool):
        super().__init__(folder, split)
        self.places = {name: place for place, name in enumerate(speaker_names)}
        self.use_tokens = use_tokens
        for entry in self.entries if speaker_names else []:
            if entry["speaker"] not in self.places:
                raise ValueError(
                    f"{self.folder}: clip {entry['key']} in split {split!r} has speaker {entry['speaker']!r}, which "
                    f"is not among the model's {len(speaker_names)} speakers; preprocess with a speaker for every "
                    "clip, or train without --use_speakers"
                )
        if use_tokens and not any(entry["caption"].strip() for entry in self.entries):
            raise ValueError(
                f"{self.folder} has no transcripts in split {split!r}, so --ctc_weight has nothing to read; use 0"
            )
        if self.places or use_tokens:
            served = [[entry["key"], *self.conditions(entry)] for entry in self.entries]
            self.fingerprint = f"{self.fingerprint}+{fingerprint([speaker_names, served])}"

    def conditions(self, entry: dict[str, Any]) -> tuple[int | None, str | None]:
        """The place of a clip's speaker, and its transcript, each None where items do not have it."""
        place = self.places[entry["speaker"]] if self.places else None
        return place, entry["caption"].strip().lower() if self.use_tokens else None

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        place, transcript = self.conditions(self.entries[int(sample["index"])])
        if place is not None:
            sample["speaker"] = torch.tensor(place)
        if transcript is not None:
            sample["tokens"] = torch.tensor(encode_caption(transcript, MAX_TOKENS))
        return sample
