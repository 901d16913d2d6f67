"""Shared by the preprocessing of audio latents: the audio cache as a source, tokens of transcripts, their alignment.

T tokens, M mel bins, F mel frames.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_loading.audio.cached import AudioVAEDataset
from dataset_loading.audio.latents import latent_settings
from dataset_loading.cached import evenly_spaced, read_sample
from dataset_loading.files import fingerprint, fingerprint_of_bytes, replace_file
from dataset_loading.packs import splits_of
from dataset_loading.sources import Source
from dataset_loading.tables import captions_of
from model.audio.alignment import PhoneHMM, latents_at_frames
from model.audio.speaker_aligners import SpeakerAligners
from model.audio.spectral import MelSettings
from model.text.phonemes import SpeechTokenizer
from model.text.tokenizer import encode_caption
from utils.options import declared_fields
from utils.preprocessing.arguments import command_words
from utils.preprocessing.audio import AudioPreprocess, log_mel, with_mel
from utils.preprocessing.audio_arguments import AudioLatentsArguments, AudioPreprocessArguments
from utils.preprocessing.audio_cache import (
    as_source,
    check_split,
    describe_lengths,
    describe_speakers,
    earlier_settings,
    fit_tokenizer,
)
from utils.preprocessing.batched import BatchedPreprocess
from utils.preprocessing.samples import Example, Outcome, Raw, SkipSampleError, Task, describe_problems
from utils.preprocessing.shards import arguments_of

logger = logging.getLogger(__name__)

ALIGNER = "aligner.safetensors"
N_FITTED = 2000  # training clips that the aligner is fitted to
SPEAKER_SECONDS = 180  # of the fitted clips that a speaker must have more of, for an aligner of their own
N_WORST = 10  # clips that are named after the run
# Fields of the manifest's settings that say how an aligner came about: another one in the folder is not reused.
ALIGNER_SETTINGS = ("mel", "units", "language", "gaps", "aligner")
TEXT_FLAGS = ("conditioning", "units", "language", "gaps", "max_tokens")


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
        compression: mel frames of a latent frame.
        vae_name: its name in messages.
    Attributes:
        vae_speakers: names of the speakers that the VAE must be told; [] where it is told none.
        made_from: folder and fingerprint of the audio cache.
        tokenizer, aligners: those of the transcripts; None for captions, and until the sources are open.
    """

    arguments_class = AudioLatentsArguments
    media = "audio"
    suffixes = (".pt",)
    encodes_captions = True
    chunk = 1

    def __init__(self, args: AudioLatentsArguments, mel: MelSettings, *, compression: int, vae_name: str):
        super().__init__(args)
        self.mel, self.compression, self.vae_name, self.given_args = mel, compression, vae_name, args
        self.vae_speakers: list[str] = []
        self.made_from: dict[str, str] = {}
        self.tokenizer: SpeechTokenizer | None = None
        self.aligners: SpeakerAligners | None = None
        if args.units == "characters" and args.conditioning == "speech":
            logger.warning("characters tell no pronunciation: speech will be far less intelligible than with phonemes")

    # ---- The source.

    def open_sources(self) -> dict[str, Source]:
        if self.args.shard and not self.args.audio_cache:
            raise ValueError(
                f"a shard ({self.args.shard}) needs --audio_cache, whose clips all shards fit the same aligner to: "
                "make the log-mels first, with preprocess_audio_vae_dataset.py, and join its shards"
            )
        cache = self.args.audio_cache or self.make_cache()
        # Augmented copies are samples of the cache already.
        self.args = dataclasses.replace(self.args, audio_cache=cache, num_augmented_copies=0)
        splits = splits_of(Path(cache))
        datasets = {split: AudioVAEDataset(cache, split).expect_mel(self.mel, self.vae_name) for split in splits}
        if self.given_args.audio_cache and "validation" in datasets:
            check_split(self.given_args, datasets["validation"])
        self.made_from = {"folder": str(Path(cache).absolute()), "fingerprint": datasets["train"].fingerprint}
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
            language = {"language": row["language"]} if row["language"] else {}
            for place, (text, notes) in enumerate(self.captions(row["text"])):
                yield row["name"], Raw(row["audio"], text, {"speaker": row["speaker"], **language, **notes}, place)

    def decode(self, media: dict[str, Any] | None) -> Tensor:
        assert media is not None, "as_source gives every row a file"
        return read_sample(**{name: value for name, value in media.items() if name != "digest"})["mel"]

    # ---- Tokens and the aligner.

    def header(self, sources: dict[str, Source]) -> dict[str, Any]:
        if self.args.conditioning == "speech":
            self.learn(sources["train"])
        header, args = super().header(sources), self.given_args
        header["arguments"] = arguments_of(args)
        return {**header, "command": command_words(f"preprocess_{self.name}_dataset.py", args)}

    def learn(self, source: Source) -> None:
        """Set tokenizer and aligners: those of another folder, of an earlier run, or from the training clips."""
        folder, settings = Path(self.args.aligner_from or self.folder), self.settings()
        earlier = latent_settings(folder) if self.args.aligner_from else earlier_settings(folder)
        if self.args.aligner_from and earlier["conditioning"] != "speech":
            raise ValueError(
                f"--aligner_from {folder} holds captions, which have no aligner; give audio latents of speech"
            )
        # Settings of earlier versions do not say what was aligned; latents are those of one VAE.
        names = [*ALIGNER_SETTINGS, *(["vae_fingerprint"] if self.args.aligner == "joint" else [])]
        values = [(name, (earlier or {}).get(name, "hmm"), settings.get(name, "hmm")) for name in names]
        differences = [f"{name}={there!r} there, {now!r} now" for name, there, now in values if there != now]
        if earlier and not differences and (self.args.aligner_from or (folder / ALIGNER).is_file()):
            self.tokenizer = SpeechTokenizer.from_dict(earlier["tokenizer"])
            self.aligners = SpeakerAligners.load(folder / ALIGNER)
            digest, expected = fingerprint_of_bytes([self.aligners.dump()]), earlier.get("aligner_fingerprint")
            if expected and digest != expected:
                raise ValueError(
                    f"{folder / ALIGNER} is damaged (its fingerprint is {digest}, {expected} was written); copy it "
                    "again from where it is whole, or fit another one in another --output_dir"
                )
            former = earlier.get("made_from", self.made_from)["fingerprint"]
            if not self.args.aligner_from and former != self.made_from["fingerprint"]:
                logger.warning(
                    "%s goes on with the aligner that was fitted to a former content of %s (fingerprint %s, now %s); "
                    "choose another --output_dir to fit one to the present clips",
                    *(folder, self.made_from["folder"], former, self.made_from["fingerprint"]),
                )
            return
        if self.args.aligner_from:
            raise ValueError(f"--aligner_from {folder} was made with other settings: {'; '.join(differences)}")
        rows = source.rows[: self.count(source)]
        self.fit(source, [{**row, "text": text} for row in rows for text in captions_of(row["text"])])

    def fit(self, source: Source, rows: Sequence[dict[str, Any]]) -> None:
        """Make the tokenizer of all training texts, and fit the aligners to clips spread over them, neither augmented
        nor too short."""
        self.tokenizer = tokenizer = fit_tokenizer(self.args, rows)
        n_states = 1 if self.args.units == "characters" else 2
        inputs = "latents" if self.args.aligner == "joint" else "mel"
        aligner = PhoneHMM(len(tokenizer.symbols), tokenizer.pauses, n_states, inputs=inputs)
        plain = [row for row in rows if not row["copy"] and tokenizer.split(row["text"], row["language"])]
        chosen = [plain[index] for index in evenly_spaced(len(plain), N_FITTED)]
        clips = []
        for row in chosen:
            mel, symbols = self.decode(row["audio"]), tokenizer.encode(row["text"], row["language"])[:, 0]
            if mel.shape[1] >= aligner.needed_frames(symbols):
                with contextlib.suppress(SkipSampleError):
                    clips.append((self.aligned_input(mel, row["speaker"]), symbols, row["speaker"]))
        if not clips:
            raise ValueError(
                f"{source.identity}: none of {len(rows)} training clips has a transcript that fits its length; "
                "--caption_column names the column of the transcripts, --conditioning caption needs none that fit"
            )
        self.aligners = SpeakerAligners(aligner)
        min_frames = round(SPEAKER_SECONDS * self.mel.sample_rate / self.mel.hop_length)
        history = self.aligners.fit(*map(list, zip(*clips)), min_frames=min_frames)
        logger.info(
            "aligner: %d clips, log-likelihood per frame %s; speakers with an aligner of their own: %s",
            *(len(clips), " ".join(f"{x:.2f}" for x in history), ", ".join(self.aligners.speakers) or "none"),
        )

    def check_speaker(self, speaker: str) -> None:
        """Raises: SkipSampleError: the VAE needs to know the speaker, and does not."""
        if self.vae_speakers and speaker not in self.vae_speakers:
            raise SkipSampleError(f"the VAE knows no speaker {speaker!r} (speakers: {', '.join(self.vae_speakers)})")

    def encode_mel(self, mel: Tensor, speaker: str) -> dict[str, Tensor]:
        """`mean` and `std` (Z, L) of the log-mel (M, F) of one clip, and `n_mel_frames`. A subclass defines it.

        Raises: SkipSampleError: the VAE does not know the speaker.
        """
        raise NotImplementedError

    def aligned_input(self, mel: Tensor, speaker: str, latents: Tensor | None = None) -> Tensor:
        """What the aligner reads of a clip: its log-mel, or its latents at mel frames, (F, Z).

        Args: latents: mean latents (Z, L), if they are known already.
        """
        if self.args.aligner == "hmm":
            return mel
        latents = self.encode_mel(mel, speaker)["mean"] if latents is None else latents
        return latents_at_frames(latents.T, mel.shape[1], self.compression)

    def text_settings(self) -> dict[str, Any]:
        """Settings that shape tokens and durations, or captions."""
        joint = {"aligner": "joint"} if self.args.aligner == "joint" else {}  # As earlier versions wrote them.
        return {"mel": self.mel.as_dict(), **{name: getattr(self.args, name) for name in TEXT_FLAGS}, **joint}

    def settings(self) -> dict[str, Any]:
        if self.tokenizer is None or self.aligners is None:
            return {**self.text_settings(), "symbols_fingerprint": "", "aligner_fingerprint": ""}
        symbols, aligner = fingerprint(self.tokenizer.as_dict()), fingerprint_of_bytes([self.aligners.dump()])
        return {**self.text_settings(), "symbols_fingerprint": symbols, "aligner_fingerprint": aligner}

    def information(self) -> dict[str, Any]:
        tokenizer = {"tokenizer": self.tokenizer.as_dict()} if self.tokenizer else {}
        return {**tokenizer, "made_from": self.made_from}

    def encode(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        # The log-mel (M, F), and tokens (T, 3) of a transcript or (T,) of a caption.
        mel = example.data
        self.check_speaker(example.notes["speaker"])
        if not example.caption.strip():
            raise SkipSampleError("empty text")
        if self.tokenizer is None or self.aligners is None:
            tokens = torch.tensor(encode_caption(example.caption, self.args.max_tokens), dtype=torch.int16)
            return {"mel": mel, "caption_tokens": tokens}
        language = example.notes.get("language", "")
        try:
            if unknown := self.tokenizer.unknown(example.caption, language):
                raise SkipSampleError(f"{self.unknown_symbols}: {' '.join(unknown)} in {example.caption!r}")
            tokens = self.tokenizer.encode(example.caption, language)
        except ValueError as error:
            raise SkipSampleError(str(error)) from error
        needed = self.aligners.shared.needed_frames(tokens[:, 0])
        if mel.shape[1] < needed:
            raise SkipSampleError(
                f"{mel.shape[1]} mel frames are too few for {len(tokens)} tokens, {needed} are needed"
            )
        return {"mel": mel, "tokens": tokens}

    @property
    def unknown_symbols(self) -> str:
        """The reason why a clip is left out whose transcript has symbols without a number."""
        units = "phones" if self.args.units == "phonemes" else self.args.units
        return f"{units} that no training text has"

    def align(self, examples: list[Example], latents: list[Tensor]) -> list[dict[str, Tensor]]:
        """Tokens of each example, durations in mel frames, log-likelihood and likelihood ratio per frame.

        Args: latents: mean latents (Z, L) of each example.
        """
        assert self.aligners is not None, "captions have no durations"
        tokens = [example.data["tokens"] for example in examples]
        speakers = [example.notes["speaker"] for example in examples]
        mels = [example.data["mel"] for example in examples]
        clips = [self.aligned_input(*row) for row in zip(mels, speakers, latents, strict=True)]
        alignment = self.aligners.align(clips, [row[:, 0] for row in tokens], speakers)
        columns = {
            "tokens": tokens,
            "durations": alignment.durations,
            "log_likelihood": map(torch.tensor, alignment.log_likelihood),
            "likelihood_ratio": map(torch.tensor, alignment.likelihood_ratio),
        }
        return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

    def work(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        if self.aligners is not None:
            replace_file(self.folder / ALIGNER, self.aligners.dump(), sync=True)
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
        if n_unknown := sum(outcome.skipped.startswith(self.unknown_symbols) for outcome in skipped):
            folder = self.args.aligner_from
            logger.warning(
                "%d of them have %s; to keep them, %s, in another --output_dir, since this folder keeps its symbols",
                *(n_unknown, self.unknown_symbols),
                f"leave out --aligner_from {folder}" if folder else "add training clips that have the same",
            )
        entries = list(itertools.chain.from_iterable(manifest["entries"].values()))
        if self.aligners is not None:
            if lengths := describe_lengths(entries):
                logger.warning("%s", lengths)
            for line in describe_speakers(entries, self.aligners.speakers):
                logger.info(line)
            worst = sorted(entries, key=lambda entry: entry["likelihood_ratio"])[:N_WORST]
            logger.info("clips that fit their transcript worst (log-likelihood ratio per frame):")
            for entry in worst:
                logger.info("  %7.2f  %s  %r", entry["likelihood_ratio"], entry["source"], entry["caption"])
        return manifest


TEXTS = ("tokens", "caption_states", "caption_tokens")  # what a sample's number of tokens is taken from
FITS = ("log_likelihood", "likelihood_ratio")
