"""The dataset of preprocessed audio latents, their batches, and batches of like length.

B batch, Z latent channels (times latent rows), L latent frames, T tokens, S caption tokens, E width of caption states.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from dataset_loading.cached import CachedDataset
from dataset_loading.collators import check_keys, collate_stack
from dataset_loading.files import Record, read_manifest
from model.text.phonemes import SpeechTokenizer

logger = logging.getLogger(__name__)

# Tensors of an item whose first axis is padded: name -> name of their lengths in the batch, or "" where another tensor
# of the same length has it.
RAGGED = {
    "mean": "n_latent_frames",
    "std": "",
    "tokens": "n_tokens",
    "durations": "",
    "caption_tokens": "n_caption",
    "caption_states": "n_caption",
}
# Names of a batch that are other ones than an item's.
RENAMED = {"mean": "latents", "std": "latents_std", "speaker": "speakers", "language": "languages"}
# Types of the settings that make a `SpeechTokenizer`.
TOKENIZER_TYPES = {"symbols": list, "units": str, "language": str, "gaps": bool}  # "languages" where there are several
BUCKETS_PER_OCTAVE = 4  # Lengths within a factor of 2 ** (1 / 4) = 1.19 count as alike.


class AudioLatentDataset(CachedDataset):
    """Preprocessed audio latents: items with

    mean, std: of the posterior, (L, Z) float32, standardised with the VAE's latent statistics.
    n_mel_frames: () int64.
    speaker: place in `speakers`, () int64; 0 where there are none.
    language: place in `languages`, () int64; only where there are several.
    index: the index in `entries`.
    tokens: of the transcript, (T, 3) int64: symbol, stress, word edge; see `model.text.phonemes`.
    durations: mel frames of each token, (T,) int64; their sum is n_mel_frames.
    caption_tokens: of a caption, (S,) int64, see `model.text.tokenizer`; or caption_states, (S, E) bfloat16.

    Attributes:
        conditioning: `"speech"` (tokens and durations) or `"caption"`.
        lengths: latent frames of every item.
        speakers: sorted names of the speakers in both splits; empty where they are not known.
        languages: sorted names of the languages of the transcripts; empty where there is only one.
        tokenizer: makes tokens of further texts; None for captions.

    Entries hold `caption` (the text), `speaker`, `language` where there are several, `length` (latent frames),
    `mel_frames`, `tokens` (their number), `seconds`, `log_likelihood` and `likelihood_ratio`.
    """

    stage = "audio_diffusion"
    entry_types = {
        **CachedDataset.entry_types,
        "speaker": str,
        "length": int,
        "mel_frames": int,
        "tokens": int,
        "seconds": (int, float),
    }

    def __init__(self, folder: str | Path, split: str):
        super().__init__(folder, split)
        self.lengths: list[int] = self.numbers("length")
        self.speakers = [name for name in self.distinct("speaker") if name]
        self.languages = list(self.tokenizer.languages) if self.tokenizer else []
        unknown = set(self.distinct("language")) - {"", *self.languages} if self.languages else set()
        entries = (entry for entries in self.manifest["entries"].values() for entry in entries)
        for entry in entries if unknown else ():
            if self.language_of(entry) not in self.languages:
                raise self.manifest.damaged(f"entry {entry['key']}: language={entry['language']!r} is not listed")

    def language_of(self, entry: dict[str, Any]) -> str:
        """The language of a clip; "" where the folder has only one."""
        return entry.get("language") or self.tokenizer.language if self.languages and self.tokenizer else ""

    def check_kind(self):
        self.tokenizer = tokenizer_of(self.manifest)
        self.conditioning: str = self.manifest["settings"]["conditioning"]

    def tensor_kinds(self, entry):
        settings, T = self.manifest["settings"], entry["tokens"]
        latents = (torch.float16, (settings["latent_channels"], entry["length"]))
        kinds = {"mean": latents, "std": latents, "n_mel_frames": (torch.int64, ())}
        if self.tokenizer:
            return {**kinds, "tokens": (torch.int16, (T, 3)), "durations": (torch.int16, (T,))}
        if settings["text_embedding_width"]:
            return {**kinds, "caption_states": (torch.bfloat16, (T, settings["text_embedding_width"]))}
        return {**kinds, "caption_tokens": (torch.int16, (T,))}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        # Stored channels first and as float16; scores of the alignment are in the entries, too.
        latents = {name: sample[name].float().T for name in ("mean", "std")}
        numbers = {name: sample[name].long() for name in ("tokens", "durations", "caption_tokens") if name in sample}
        unchanged = {name: sample[name] for name in ("n_mel_frames", "index", "caption_states") if name in sample}
        speaker = self.value(index, "speaker")
        place = self.speakers.index(speaker) if speaker else 0
        places = {"speaker": place}
        if self.languages:
            places["language"] = self.languages.index(self.language_of(self.entries[index]))
        return {**latents, **numbers, **unchanged, **{name: torch.tensor(place) for name, place in places.items()}}

    def expect(self, *, vae_checkpoint: str = "", **settings: Any) -> Self:
        """As `CachedDataset.expect`; `vae_checkpoint` is not compared, but named in the command that is shown."""
        self.vae_checkpoint = vae_checkpoint
        return super().expect(**settings)

    def remedy(self, name: str, value: Any) -> dict[str, Any]:
        flags = super().remedy(name, value)
        if name in ("vae_fingerprint", "latent_channels", "mel_frames_per_latent", "mel"):
            vae = self.vae_checkpoint or f"<a VAE with {name}={value}>"
            return {"vae_checkpoint": vae, "output_dir": f"{str(self.folder).rstrip('/')}_other_vae"}
        if name in ("symbols_fingerprint", "aligner_fingerprint"):
            aligner = f"<audio latents with {name}={value}>"
            return {"aligner_from": aligner, "output_dir": flags["output_dir"]}
        if name in ("text_encoder_fingerprint", "text_embedding_width"):
            return {"text_encoder": f"<an encoder with {name}={value}>", "output_dir": flags["output_dir"]}
        return flags


def tokenizer_of(manifest: Record) -> SpeechTokenizer | None:
    """The tokenizer in the manifest of audio latents; None for captions.

    Raises: ValueError: there is none for speech, or its settings are damaged; names the manifest and what to do.
    """
    settings = manifest["settings"]
    if settings["conditioning"] == "caption":
        return None
    if settings["conditioning"] != "speech":
        raise manifest.damaged(f"settings.conditioning={settings['conditioning']!r} must be 'speech' or 'caption'")
    settings.expect_types({"tokenizer": Record}, "settings")
    several = {"languages": list} if "languages" in settings["tokenizer"] else {}
    settings["tokenizer"].expect_types({**TOKENIZER_TYPES, **several}, "settings.tokenizer")
    try:
        return SpeechTokenizer.from_dict(settings["tokenizer"])
    except (TypeError, ValueError) as error:
        raise manifest.damaged(f"settings.tokenizer: {error}") from error


def latent_settings(folder: Path) -> Record:
    """The settings of a folder of audio latents, checked.

    Raises: FileNotFoundError, ValueError: no complete folder, or its manifest is damaged.
    """
    manifest = read_manifest(folder, AudioLatentDataset.stage)
    tokenizer_of(manifest)
    return manifest["settings"]


def collate_audio_latents(samples: Sequence[dict[str, Tensor]], frames_multiple: int = 1) -> dict[str, Tensor]:
    """A batch of clips of different lengths, which are padded with zeros at the end.

    Args:
        samples: items of `AudioLatentDataset`.
        frames_multiple: the number of latent frames is padded to a multiple of this.
    Returns:
        latents, latents_std: (B, L, Z) float32, mean and std of the posteriors (see `draw_latents`).
        latent_mask: (B, L) bool, True in valid latent frames; n_latent_frames, n_mel_frames: (B,) int64.
        speakers, index, and languages where there are several: (B,) int64.
        tokens (B, T, 3), durations (B, T) in mel frames and n_tokens (B,), int64; or caption_tokens (B, S) int64 or
        caption_states (B, S, E) bfloat16, with n_caption (B,).
    Raises: ValueError: keys differ between samples.
    """
    check_keys(samples)
    batch = collate_stack([{name: sample[name] for name in sample if name not in RAGGED} for sample in samples])
    for name, length in RAGGED.items():
        if name in samples[0]:
            batch[name] = pad_sequence([sample[name] for sample in samples], batch_first=True)
        if name in samples[0] and length:
            batch[length] = torch.tensor([len(sample[name]) for sample in samples])
    for name in ("mean", "std"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 0, 0, -batch[name].shape[1] % frames_multiple))
    batch["latent_mask"] = torch.arange(batch["mean"].shape[1]) < batch["n_latent_frames"][:, None]
    return {RENAMED.get(name, name): value for name, value in batch.items()}


def draw_latents(batch: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Latents drawn from the posteriors of a batch, with standard normal noise (B, L, Z): (B, L, Z), 0 in padding."""
    return batch["latents"] + batch["latents_std"] * noise


class FrameBudgetSampler(Sampler[list[int]]):
    """Batches of clips of like length, as many in each as fit a budget of padded latent frames.

    An optimizer step has its clips by (seed, epoch) alone. It is dealt out to `n_parts` micro-batches, which come one
    after the other: those of one process that accumulates, or of several processes, to which accelerate gives batches
    in turn. Every epoch has every clip once, in the same number of steps. Clips that are longer than the budget of a
    micro-batch are left out with a warning.

    Args:
        lengths: latent frames of every clip.
        frames_per_step: budget of an optimizer step: its number of clips times its longest length does not exceed it.
        seed: of the permutations.
        n_parts: micro-batches of a step (accumulation x processes); their numbers of clips differ by at most one.
        unit: what lengths count, for messages.
    Attributes: left_out: clips that are too long.
    Raises: ValueError: a step has fewer clips than parts, or there is none.
    """

    def __init__(
        self, lengths: Sequence[int], frames_per_step: int, seed: int, *, n_parts: int = 1, unit: str = "latent frames"
    ):
        self.lengths, self.seed, self.n_parts, self.epoch = lengths, seed, n_parts, 0
        # Clips that fit, by length.
        groups: dict[int, list[int]] = {}
        for clip, length in enumerate(lengths):
            if length * n_parts <= frames_per_step:
                groups.setdefault(int(BUCKETS_PER_OCTAVE * math.log2(max(length, 1))), []).append(clip)
        self.left_out = sorted(set(range(len(lengths))).difference(*groups.values()))
        if self.left_out:
            logger.warning(
                "%d of %d samples are longer than the %d %s of a micro-batch and are left out, the longest has %d; "
                "raise the budget to train on them",
                *(len(self.left_out), len(lengths), frames_per_step // n_parts, unit, max(lengths)),
            )
        # Longest first.
        self.buckets = [groups[number] for number in sorted(groups, reverse=True)]
        # Clips of every step: the longest that its first place may have decides. They are those of every epoch.
        bounds = [max(lengths[clip] for clip in bucket) for bucket in self.buckets for _ in bucket]
        self.sizes: list[int] = []
        while (place := sum(self.sizes)) < len(bounds):
            self.sizes.append(min(frames_per_step // max(bounds[place], 1), len(bounds) - place))
        # A small last step shares with the one before it.
        if len(self.sizes) > 1 and 2 * self.sizes[-1] < self.sizes[-2]:
            both = sum(self.sizes[-2:])
            self.sizes[-2:] = [both - both // 2, both // 2]
        if min(self.sizes, default=0) < n_parts:
            raise ValueError(
                f"{len(bounds)} training samples cannot be dealt out to {n_parts} micro-batches per optimizer step of "
                f"{frames_per_step} {unit}: one step has {min(self.sizes, default=0)}; raise the budget, add "
                "data, or lower --gradient_accumulation_steps"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_parts * len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        # As for `EpochSampler`: no two (seed, epoch) share a generator.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        clips = [bucket[i] for bucket in self.buckets for i in permutation(len(bucket), generator)]
        ends = list(itertools.accumulate(self.sizes))
        for number in permutation(len(ends), generator):
            step = clips[ends[number] - self.sizes[number] : ends[number]]
            # Dealt out by length in turn, so that all parts are alike.
            step.sort(key=lambda clip: (self.lengths[clip], clip))
            yield from (step[part :: self.n_parts] for part in range(self.n_parts))


def permutation(n: int, generator: torch.Generator) -> list[int]:
    """The numbers below n in random order."""
    return torch.randperm(n, generator=generator).tolist()
