"""The datasets of preprocessed audio.  M mel bins, F mel frames, S samples."""

import dataclasses
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dataset_loading.cached import CachedDataset
from dataset_loading.files import MANIFEST, Record
from model.audio.lengths import crop_starts
from model.audio.spectral import MEL_PRESETS, MelSettings, check_same_mel

EVALUATED_FRAMES = 2048  # Of a validation clip: half a minute of speech, more tells no more.
MEL_TYPES = {field.name: (int, float) for field in dataclasses.fields(MelSettings)}


class Crop(NamedTuple):
    """What is asked of a data set in place of an index: a part of a clip, all of it where it is shorter.

    Attributes:
        index: of the clip.
        n_frames: of the part.
        uniform: in [0, 1): where it begins, of all places that fit; 0: with the clip.
    """

    index: int
    n_frames: int
    uniform: float = 0.0


class AudioDataset(CachedDataset):
    """Preprocessed audio clips: items, at an index or a `Crop`, with

    mel: natural-log mel, (M, F) float32, see `model.audio.spectral`.
    waveform: (S,) float32 in [-1, 1], S = F * hop_length, where the folder has it.
    index: the index in `entries`.

    Attributes:
        mel: the definition of the log-mels.
        max_frames: at most so many frames of a clip are read; None: all.
        vae_fingerprint: of the audio VAE that reconstructed the log-mels; empty: they are those of the recordings.
        speakers: sorted names of the speakers in both splits; empty where they are not known.

    Entries hold `key`, `source`, `copy`, `caption` (the transcript), `speaker`, `length` (frames F), `seconds`.
    """

    entry_types = {**CachedDataset.entry_types, "speaker": str, "length": int, "seconds": (int, float)}

    def __init__(self, folder: str | Path, split: str):
        super().__init__(folder, split)
        self.speakers = [name for name in self.distinct("speaker") if name]
        self.max_frames: int | None = None

    def cut(self, max_frames: int) -> Self:
        """From now on items hold at most the first `max_frames` of their clip, so that one long clip does not make a
        batch large. Returns: this dataset."""
        self.max_frames = max_frames
        return self

    def __getitem__(self, index: int | Crop) -> dict[str, Tensor]:
        if not isinstance(index, Crop):
            if self.max_frames is None:
                return super().__getitem__(index)
            index = Crop(index, self.max_frames)
        place = range(len(self.entries))[index.index]
        n_frames, length, hop_length = index.n_frames, self.value(place, "length"), self.mel.hop_length
        if length <= n_frames:
            return super().__getitem__(place)
        start = int(crop_starts(torch.tensor(length), n_frames, torch.tensor(index.uniform)))
        stop = start + n_frames
        return self.window(
            place, {"mel": slice(start, stop), "waveform": slice(start * hop_length, stop * hop_length)}
        )

    def check_kind(self):
        # Caches of audio latents name the log-mel of their VAE, and hold none.
        if "mel" not in self.manifest["settings"] or self.manifest["stage"] == "audio_diffusion":
            raise ValueError(
                f"{self.folder} was made for stage {self.manifest['stage']!r} and holds no log-mels; make them with: "
                f"python preprocess_{self.stage or 'audio_vae'}_dataset.py --dataset_name <hub name or folder>"
            )
        is_reconstructed = "vae_fingerprint" in self.manifest["settings"]
        types = {"mel": Record, **({"vae_fingerprint": str} if is_reconstructed else {})}
        self.manifest["settings"].expect_types(types, "settings")
        self.manifest["settings"]["mel"].expect_types(MEL_TYPES, "settings.mel")
        try:
            self.mel = MelSettings(**self.manifest["settings"]["mel"])
        except (TypeError, ValueError) as error:
            raise self.manifest.damaged(f"settings.mel: {error}") from error
        self.vae_fingerprint: str = self.manifest["settings"].get("vae_fingerprint", "")

    def tensor_kinds(self, entry):
        return {"mel": (torch.float32, (self.mel.n_mels, entry["length"]))}

    def expect_mel(self, mel: MelSettings, name: str, fix: str = "") -> Self:
        """Compare the definition of the log-mels with the one that a model needs.

        Args:
            name: what needs it, for the message.
            fix: what else could be done, a sentence.
        Returns: this dataset.
        Raises: ValueError: they differ; the message shows both and the command that makes what is needed.
        """
        remedy = f"this makes it: {self.command(**self.mel_flags(mel))}"
        remedy = f"{remedy}\n{fix}" if fix else remedy
        check_same_mel(self.mel, mel, first_name=str(self.folder), second_name=name, remedy=remedy)
        return self

    def expect_recorded(self, name: str) -> Self:
        """Refuse log-mels that an audio VAE reconstructed.

        Args: name: what needs those of the recordings, for the message.
        Returns: this dataset.
        Raises: ValueError: they are reconstructions; the message names the VAE's fingerprint and the command that
            makes what is needed.
        """
        if self.vae_fingerprint:
            flags = dict.fromkeys(("through_vae", "vae_config", "batch_size", "bf16"))
            command = self.command(**flags, output_dir=f"{str(self.folder).rstrip('/')}_recorded")
            raise ValueError(
                f"{self.folder} holds log-mels reconstructed by an audio VAE (vae_fingerprint="
                f"{self.vae_fingerprint!r}), {name} needs those of the recordings; this makes them: {command}"
            )
        return self

    def mel_flags(self, mel: MelSettings) -> dict[str, object]:
        """The flags of the command that makes a folder with other log-mels."""
        fields, folder = mel.as_dict(), str(self.folder).rstrip("/")
        # Reconstructions have the log-mel of their VAE.
        if self.vae_fingerprint:
            unset = dict.fromkeys(("mel", *fields))
            return {**unset, "through_vae": "<VAE of that log-mel>", "output_dir": f"{folder}_other_mel"}
        # A preset's name alone, unless the folder's command sets single fields, which would override the preset's.
        preset = next((name for name, settings in MEL_PRESETS.items() if settings == mel), None)
        if preset and not any(f"--{field}" in self.manifest["command"] for field in fields):
            return {"mel": preset, "output_dir": f"{folder}_{preset}"}
        # Otherwise the fields that differ.
        fields_of_folder = self.mel.as_dict()
        changes = {field: value for field, value in fields.items() if value != fields_of_folder[field]}
        suffix = "_".join(f"{field}_{value}" for field, value in changes.items())
        return {**changes, "output_dir": f"{folder}_{suffix}"}


class VocoderDataset(AudioDataset):
    """Log-mels and their waveforms."""

    stage = "audio_vocoder"

    def tensor_kinds(self, entry):
        n_samples = entry["length"] * self.mel.hop_length
        return {**super().tensor_kinds(entry), "waveform": (torch.float32, (n_samples,))}


class AudioVAEDataset(AudioDataset):
    """Log-mels alone; a folder made for vocoders serves as well."""

    def __init__(self, folder: str | Path, split: str):
        self.stage = None if (Path(folder) / MANIFEST).exists() else "audio_vae"  # For the message.
        super().__init__(folder, split)
        self.expect_recorded("an audio VAE")

    def __getitem__(self, index: int | Crop) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {name: tensor for name, tensor in sample.items() if name != "waveform"}
