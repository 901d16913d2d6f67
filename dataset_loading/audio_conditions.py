"""Log-mels with what is known of them: who speaks, and what is said.  T text tokens."""

from pathlib import Path

import torch
from torch import Tensor

from dataset_loading.audio_dataset import AudioVAEDataset
from model.text.tokenizer import encode_caption

MAX_TOKENS = 1 << 20  # Transcripts are never cut.


class DescribedAudioDataset(AudioVAEDataset):
    """Items of `AudioVAEDataset`, and beside them

    speaker: int64 scalar, the place of the clip's speaker in `speaker_names`, where there are any.
    tokens: (T,) int64, begin-of-text and the bytes of the transcript in lower case, where `use_tokens`.

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

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        entry = self.entries[int(sample["index"])]
        if self.places:
            sample["speaker"] = torch.tensor(self.places[entry["speaker"]])
        if self.use_tokens:
            sample["tokens"] = torch.tensor(encode_caption(entry["caption"].strip().lower(), MAX_TOKENS))
        return sample
