"""The recordings of clips whose cache holds latents alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset_loading.audio.cached import VocoderDataset
from dataset_loading.content import DIGEST, STATE, digest_of_sample
from dataset_loading.files import read_manifest
from dataset_loading.packs import splits_of
from model.audio.spectral import MelSettings


class Recordings:
    """Waveforms and log-mels of clips, from a folder that preprocess_audio_vocoder_dataset.py made of the same files.

    Clips are found by their key, or else by source and copy.

    Args:
        folder: the cache.
        mel: the log-mel that it must have.
        owner: whose log-mel this is, for the message.
    Raises: FileNotFoundError, ValueError: no such cache, or one of another stage or log-mel.
    """

    def __init__(self, folder: str | Path, mel: MelSettings, owner: str):
        self.folder = Path(folder)
        splits = splits_of(self.folder, VocoderDataset.stage)
        self.places: dict[Any, tuple[VocoderDataset, int]] = {}
        for name in splits:
            dataset = VocoderDataset(self.folder, name).expect_mel(mel, owner).expect_recorded("--waveforms")
            for index, entry in enumerate(dataset.entries):
                self.places[entry["source"], entry["copy"]] = self.places[entry["key"]] = dataset, index

    def find(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """The `waveform` (S,) and the `mel` (M, F) of a clip of latents.

        Raises: ValueError: the folder lacks the clip, or has it with another length.
        """
        remedy = "give a folder made from the same files with the same --trim_db, --segment_seconds and --mel"
        place = self.places.get(entry["key"]) or self.places.get((entry["source"], entry["copy"]))
        if place is None:
            raise ValueError(f"--waveforms {self.folder} has no clip {entry['key']} ({entry['source']}); {remedy}")
        dataset, index = place
        # Latents of a cache that notes no digests know the file of their log-mel alone.
        digest = digest_of_sample(dataset.entries[index]).get("digest")
        if digest and STATE[0] not in entry and entry.get(DIGEST, digest) != digest:
            raise ValueError(
                f"--waveforms {self.folder}: {entry['source']} is another recording than that of the latents, one "
                f"of both caches has a former content; {remedy}"
            )
        sample = dataset[index]
        n_frames = sample["mel"].shape[1]
        if n_frames != entry["mel_frames"]:
            raise ValueError(
                f"--waveforms {self.folder}: {entry['key']} has {n_frames} mel frames, its latents have "
                f"{entry['mel_frames']}; {remedy}"
            )
        return sample


def folder_of_recordings(latents: Mapping[str, Any]) -> str:
    """The folder for `--waveforms` from which latents of speech were made; "" where it is gone or has no recordings.

    Args: latents: the settings of their cache.
    """
    folder = Path(latents.get("made_from", {}).get("folder", ""))
    if latents["conditioning"] != "speech":
        return ""
    try:
        settings = read_manifest(folder, VocoderDataset.stage)["settings"]
    except (OSError, ValueError):
        return ""
    is_near = folder.is_relative_to(Path.cwd())
    return "" if settings.get("vae_fingerprint") else os.path.relpath(folder) if is_near else str(folder)
