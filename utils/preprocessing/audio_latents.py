"""Shared by the preprocessing of audio latents: the audio cache as a source, tokens of transcripts, their alignment.

T tokens, M mel bins, F mel frames.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dataset_loading.audio.cached import AudioDataset, AudioVAEDataset
from dataset_loading.audio.latents import latent_settings
from dataset_loading.cache_writer import read_journal
from dataset_loading.cached import evenly_spaced, read_sample
from dataset_loading.files import JOURNAL, fingerprint, fingerprint_of_bytes, read_manifest, replace_file
from dataset_loading.sources import Source
from model.audio.alignment import PhoneHMM
from model.audio.spectral import MelSettings
from model.text.phonemes import SpeechTokenizer, Units
from model.text.tokenizer import encode_caption
from utils.options import declared_fields, option
from utils.preprocessing.audio import AudioPreprocess, AudioPreprocessArguments, log_mel, with_mel
from utils.preprocessing.batched import BatchedPreprocess, BatchedPreprocessArguments
from utils.preprocessing.driver import command_words
from utils.preprocessing.samples import Example, Outcome, Raw, SkipSampleError, Task, describe_problems

logger = logging.getLogger(__name__)

Conditioning = Literal["speech", "caption"]
ALIGNER = "aligner.safetensors"
N_FITTED = 2000  # training clips that the aligner is fitted to
N_WORST = 10  # clips that are named after the run
# Fields of the manifest's settings that say how an aligner came about: another one in the folder is not reused.
ALIGNER_SETTINGS = ("mel", "units", "language", "gaps")
TEXT_FLAGS = ("conditioning", "units", "language", "gaps", "max_tokens")


@dataclasses.dataclass
class AudioLatentsArguments(AudioPreprocessArguments, BatchedPreprocessArguments):
    """Flags of preprocessing audio latents, without those of the models that encode."""

    dataset_name: str = option("", "raw data set: hub name, folder, or index file (.csv, .jsonl)")
    audio_cache: str = option("", "folder of preprocessed audio instead of a raw data set: nothing is decoded again")
    conditioning: Conditioning = option(
        "speech", "speech: transcripts as tokens with durations; caption: texts that describe a clip"
    )
    units: Units = option(
        "phonemes",
        "what transcripts are split into; characters need no eSpeak NG and give far less intelligible speech",
        only_with=("conditioning", "speech"),
    )
    language: str = option(
        "en-us", "language of the transcripts for eSpeak NG, such as fr-fr", only_with=("units", "phonemes")
    )
    gaps: bool = option(True, "a token between words, which may last 0 frames", only_with=("conditioning", "speech"))
    aligner: str = option(
        "",
        "folder of audio latents whose aligner and symbols are used; default: fitted to the training clips",
        only_with=("conditioning", "speech"),
    )
    max_tokens: int = option(
        256,
        "maximum tokens of a caption (bytes or the text encoder's); the rest is cut",
        gt=0,
        only_with=("conditioning", "caption"),
    )

    def validate_source(self):
        if bool(self.dataset_name) == bool(self.audio_cache):
            given = "both are given" if self.dataset_name else "none is given"
            raise ValueError(f"--dataset_name or --audio_cache: {given}; give a raw data set or preprocessed audio")
        if self.limit == 0:
            raise ValueError("--limit=0 reads nothing; give a positive number, or -1 for all")

    def validate_cache(self):
        used = {"dataset_name", "limit", "validation_fraction", "output_dir", "num_workers", "max_broken_fraction"}
        unused = {field.name for field in declared_fields(AudioPreprocessArguments)} - used
        given = sorted(unused & set(getattr(self, "given", ())))
        if self.audio_cache and given:
            raise ValueError(f"--{given[0]} has no effect with --audio_cache, whose audio is decoded already")


class MelPreprocess(AudioPreprocess):
    """Raw audio to log-mels, the cache that latents are made from."""

    name = "audio_vae"

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        # (S,) -> (M, F).
        return {"mel": log_mel(example.data, self.mel)}


class AudioLatentsPreprocess(BatchedPreprocess):
    """Log-mels and texts of an audio cache to tokens with durations, or to captions. A subclass encodes the log-mels.

    A raw data set becomes an audio cache first, `<output_dir>_mels`, with the log-mel of the VAE.

    Args:
        mel: the log-mel that the VAE reads.
        vae_name: its name in messages.
    Attributes:
        tokenizer, aligner: those of the transcripts; None for captions, and until the sources are open.
    """

    arguments_class = AudioLatentsArguments
    media = "audio"
    suffixes = (".pt",)
    encodes_captions = True

    def __init__(self, args: AudioLatentsArguments, mel: MelSettings, vae_name: str):
        super().__init__(args)
        self.mel, self.vae_name, self.given_args = mel, vae_name, args
        self.tokenizer: SpeechTokenizer | None = None
        self.aligner: PhoneHMM | None = None
        if args.units == "characters" and args.conditioning == "speech":
            logger.warning("characters tell no pronunciation: speech will be far less intelligible than with phonemes")

    # ---- The source.

    def open_sources(self) -> dict[str, Source]:
        cache = self.args.audio_cache or self.make_cache()
        # Augmented copies are samples of the cache already.
        self.args = dataclasses.replace(self.args, audio_cache=cache, num_augmented_copies=0)
        splits = [split for split, entries in read_manifest(Path(cache), None)["entries"].items() if entries]
        datasets = {split: AudioVAEDataset(cache, split).expect_mel(self.mel, self.vae_name) for split in splits}
        return {split: as_source(dataset) for split, dataset in datasets.items()}

    def make_cache(self) -> str:
        """Preprocess the raw data set; returns the folder of its log-mels."""
        args = with_mel(self.args, self.mel, self.vae_name)
        folder = f"{str(self.folder).rstrip('/')}_mels"
        values = {field.name: getattr(args, field.name) for field in declared_fields(AudioPreprocessArguments)}
        MelPreprocess(AudioPreprocessArguments(**{**values, "output_dir": folder})).run()
        return folder

    def examples(self, source: Source) -> Iterator[tuple[str, Raw]]:
        for row in source.rows:
            yield row["name"], Raw(row["audio"], row["text"], {"speaker": row["speaker"]})

    def decode(self, media: dict[str, Any] | None) -> Tensor:
        assert media is not None, "as_source gives every row a file"
        return read_sample(**media)["mel"]

    # ---- Tokens and the aligner.

    def header(self, sources: dict[str, Source]) -> dict[str, Any]:
        if self.args.conditioning == "speech":
            self.learn(sources["train"])
        header, args = super().header(sources), self.given_args
        header["arguments"] = {field.name: getattr(args, field.name) for field in declared_fields(args)}
        return {**header, "command": command_words(f"preprocess_{self.name}_dataset.py", args)}

    def learn(self, source: Source) -> None:
        """Set tokenizer and aligner: those of another folder, of an earlier run, or from the training clips."""
        folder, settings = Path(self.args.aligner or self.folder), self.text_settings()
        earlier = latent_settings(folder) if self.args.aligner else earlier_settings(folder)
        if (
            earlier
            and (folder / ALIGNER).is_file()
            and all(earlier[name] == settings[name] for name in ALIGNER_SETTINGS)
        ):
            self.tokenizer = SpeechTokenizer.from_dict(earlier["tokenizer"])
            self.aligner = PhoneHMM.load(folder / ALIGNER)
            return
        if self.args.aligner:
            pairs = [f"{name}={earlier.get(name)!r} there, {settings[name]!r} now" for name in ALIGNER_SETTINGS]
            raise ValueError(f"--aligner {folder} was made with other settings: {'; '.join(pairs)}")
        # All training texts give symbols; clips spread over them, neither augmented nor too short, fit the aligner.
        rows = source.rows[: self.count(source)]
        fields = {name: getattr(self.args, name) for name in ("units", "language", "gaps")}
        self.tokenizer = tokenizer = SpeechTokenizer.fit((row["text"] for row in rows), **fields)
        n_states = 1 if self.args.units == "characters" else 2
        self.aligner = aligner = PhoneHMM(len(tokenizer.symbols), tokenizer.pauses, n_states)
        plain = [row for row in rows if not row["copy"] and tokenizer.split(row["text"])]
        chosen = [plain[index] for index in evenly_spaced(len(plain), N_FITTED)]
        clips = [(self.decode(row["audio"]), tokenizer.encode(row["text"])[:, 0]) for row in chosen]
        clips = [(mel, symbols) for mel, symbols in clips if mel.shape[1] >= aligner.needed_frames(symbols)]
        if not clips:
            raise ValueError(
                f"{source.identity}: none of {len(rows)} training clips has a transcript that fits its length; "
                "--caption_column names the column of the transcripts, --conditioning caption needs none that fit"
            )
        history = aligner.fit(*map(list, zip(*clips)))
        logger.info(
            "aligner: %d clips, log-likelihood per frame %s", len(clips), " ".join(f"{x:.2f}" for x in history)
        )

    def text_settings(self) -> dict[str, Any]:
        """Settings that shape tokens and durations, or captions."""
        return {"mel": self.mel.as_dict(), **{name: getattr(self.args, name) for name in TEXT_FLAGS}}

    def settings(self) -> dict[str, Any]:
        if self.tokenizer is None or self.aligner is None:
            return {**self.text_settings(), "symbols_fingerprint": "", "aligner_fingerprint": ""}
        symbols, aligner = fingerprint(self.tokenizer.as_dict()), fingerprint_of_bytes([self.aligner.dump()])
        return {**self.text_settings(), "symbols_fingerprint": symbols, "aligner_fingerprint": aligner}

    def information(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.as_dict()} if self.tokenizer else {}

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        # The log-mel (M, F), and tokens (T, 3) of a transcript or (T,) of a caption.
        mel = example.data
        if not example.caption.strip():
            raise SkipSampleError("empty text")
        if self.tokenizer is None or self.aligner is None:
            tokens = torch.tensor(encode_caption(example.caption, self.args.max_tokens), dtype=torch.int16)
            return {"mel": mel, "caption_tokens": tokens}
        if unknown := self.tokenizer.unknown(example.caption):
            raise SkipSampleError(f"unknown symbols {' '.join(unknown)} in {example.caption!r}")
        try:
            tokens = self.tokenizer.encode(example.caption)
        except ValueError as error:
            raise SkipSampleError(str(error)) from error
        needed = self.aligner.needed_frames(tokens[:, 0])
        if mel.shape[1] < needed:
            raise SkipSampleError(
                f"{mel.shape[1]} mel frames are too few for {len(tokens)} tokens, {needed} are needed"
            )
        return {"mel": mel, "tokens": tokens}

    def align(self, examples: list[Example]) -> list[dict[str, Tensor]]:
        """Tokens of each example, durations in mel frames, log-likelihood and likelihood ratio per frame."""
        assert self.aligner is not None, "captions have no durations"
        tokens = [example.data["tokens"] for example in examples]
        alignment = self.aligner.align([example.data["mel"] for example in examples], [row[:, 0] for row in tokens])
        columns = {
            "tokens": tokens,
            "durations": alignment.durations,
            "log_likelihood": map(torch.tensor, alignment.log_likelihood),
            "likelihood_ratio": map(torch.tensor, alignment.likelihood_ratio),
        }
        return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

    def work(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        if self.aligner is not None:
            replace_file(self.folder / ALIGNER, self.aligner.dump(), sync=True)
        return super().work(tasks)

    # ---- The manifest and the report.

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, int | float]:
        # `length` is in latent frames.
        n_frames, text = int(tensors["n_mel_frames"]), next(name for name in TEXTS if name in tensors)
        seconds = round(n_frames * self.mel.hop_length / self.mel.sample_rate, 4)
        sizes = {"length": tensors["mean"].shape[-1], "mel_frames": n_frames, "tokens": len(tensors[text])}
        fits = {name: round(tensors[name].item(), 3) for name in FITS if name in tensors}
        return {**sizes, "seconds": seconds, **fits}

    def run(self) -> dict[str, Any]:
        manifest = super().run()
        skipped = [Outcome(0, "", row["source"], [], skipped=row["reason"]) for row in manifest["skipped"]]
        if skipped:
            logger.warning("%d clips left out: %s", len(skipped), describe_problems(skipped))
        entries = list(itertools.chain.from_iterable(manifest["entries"].values()))
        if self.aligner is not None:
            worst = sorted(entries, key=lambda entry: entry["likelihood_ratio"])[:N_WORST]
            logger.info("clips that fit their transcript worst (log-likelihood ratio per frame):")
            for entry in worst:
                logger.info("  %7.2f  %s  %r", entry["likelihood_ratio"], entry["source"], entry["caption"])
        return manifest


TEXTS = ("tokens", "caption_states", "caption_tokens")  # what a sample's number of tokens is taken from
FITS = ("log_likelihood", "likelihood_ratio")


def as_source(dataset: AudioDataset) -> Source:
    """A split of an audio cache, with rows of `name`, `audio` (arguments of `read_sample`), `text`, `speaker` and
    `copy`."""
    repair = dataset.repair()
    rows = [
        {
            "name": entry["source"],
            "audio": {
                "path": dataset.path_of(entry),
                "entry": entry,
                "kinds": dataset.tensor_kinds(entry),
                "repair": repair,
            },
            "text": entry["caption"],
            "speaker": entry["speaker"],
            "copy": entry["copy"],
        }
        for entry in dataset.entries
    ]
    # Not its path: a cache that was moved is the same.
    identity = f"audio cache {dataset.fingerprint}:{dataset.split}"
    return Source(identity, dataset.manifest.get("licence", ""), "audio", ["name", "audio", "text", "speaker"], rows)


def earlier_settings(folder: Path) -> dict[str, Any]:
    """The settings with which earlier runs made a folder, finished or not; {} where there were none."""
    if (folder / JOURNAL).is_file():
        headers = (line for line in read_journal(folder / JOURNAL) if isinstance(line, dict))
        return next(headers, {}).get("settings", {})
    return read_manifest(folder, None)["settings"] if (folder / "manifest.json").is_file() else {}
