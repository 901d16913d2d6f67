"""Text-to-speech pipeline: tokens, durations, sampler, VAE decoder, vocoder.

B batch, T tokens, L latent frames, Z latent channels, M mel bins, F mel frames, S samples.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.audio.configuration import AudioDiffusionConfig
from model.audio.diffusion import AudioDiffusion
from model.audio.griffin_lim import griffin_lim
from model.audio.lengths import sequence_to_latents
from model.audio.spectral import MelSettings, check_same_mel
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.text.phonemes import SpeechTokenizer, split_clauses
from utils.checkpoints import WeightsKind, data_of, load_model, read_stage, resolve_checkpoint
from utils.generation.audio import load_vocoder
from utils.generation.latents import find_vae, load_vae
from utils.options import option, other_than_one, suggest
from utils.seeds import generators

logger = logging.getLogger(__name__)

SENTENCE_END = (".", "!", "?", "…", "。", "！", "？", ":", ";", "\n")  # noqa: RUF001
CLOSING = "\"'”’»)]"  # noqa: RUF001
MAX_CHARACTERS = 240  # of a piece that is spoken at once; longer sentences are cut between clauses
# Samplers whose noise is that of the start alone: a clip is the same in every batch.
AudioSampler = Literal["euler", "heun", "dpmpp_2m", "ddim"]


@dataclasses.dataclass
class AudioSamplingArguments:
    """Flags of everything that samples latents of audio."""

    sampler: AudioSampler = option("euler", "sampler; euler and ddim take the same steps")
    n_steps: int = option(4, "sampling steps; 0 for speech: the prior's mean, flat but clear", ge=0)
    guidance_scale: float = option(1.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: list[float] = option(
        [0.0, 1.0],
        "interval of times in which guidance is applied; 0: data, 1: noise",
        only_with=("guidance_scale", other_than_one),
    )

    def validate_interval(self):
        bounds = self.guidance_interval
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
            raise ValueError(f"--guidance_interval={bounds} must be two times with 0 <= first < second <= 1")


@dataclasses.dataclass
class VoiceArguments(AudioSamplingArguments):
    """Flags of everything that speaks texts."""

    speaker: str = option("", "name of the speaker, for a model of several")
    language: str = option("", "name of the language, for a model of several")
    speed: float = option(1.0, "tempo: 1 is that of the training data, 2 twice as fast", gt=0)
    seed: int = option(0, "seed of the noise", ge=0)
    batch_size: int = option(1, "sentences that are spoken at once", gt=0)
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")

    def voice(self) -> dict[str, Any]:
        """Keywords of `SpeechPipeline.speak`."""
        return {name: getattr(self, name) for name in ("seed", "speed", "speaker", "language", "batch_size")}


def split_sentences(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Sentences of a text; longer ones than `max_characters` are cut between clauses, and clauses between words."""
    sentences, current = [], ""
    for clause in split_clauses(text):
        # A new sentence begins after the mark of an end, or where the piece would become too long.
        if current and len(current) + len(clause) > max_characters:
            sentences.append(current)
            current = ""
        current = f"{current} {clause}" if current else clause
        if clause.rstrip(CLOSING).endswith(SENTENCE_END):
            sentences.append(current)
            current = ""
    sentences += [current] if current else []
    return [piece for sentence in sentences for piece in cut_between_words(sentence, max_characters)]


def cut_between_words(text: str, max_characters: int) -> list[str]:
    """Pieces of at most `max_characters`; a longer word stays whole."""
    pieces, current = [], ""
    for word in text.split():
        if current and len(current) + 1 + len(word) > max_characters:
            pieces.append(current)
            current = word
        else:
            current = f"{current} {word}" if current else word
    return [*pieces, *([current] if current else [])]


class SpeechPipeline:
    """Speaks texts with a diffusion model, the VAE of its latents, and a vocoder.

    Args:
        model, vae: on the same device, in eval mode.
        tokenizer: that of the training data.
        vocoder: of the VAE's log-mel; None for Griffin-Lim.
        bf16: bfloat16 autocast.
    """

    def __init__(
        self,
        model: AudioDiffusion,
        vae: AudioVAE,
        tokenizer: SpeechTokenizer,
        vocoder: Vocoder | None = None,
        *,
        bf16: bool = False,
    ):
        self.model, self.vae, self.tokenizer, self.vocoder, self.bf16 = model, vae, tokenizer, vocoder, bf16

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        vae_checkpoint: str = "",
        vocoder_checkpoint: str = "",
        weights: WeightsKind = "ema",
        device: torch.device | str = "cpu",
        bf16: bool = False,
    ) -> Self:
        """From a run or checkpoint folder of the diffusion stage.

        Args:
            vae_checkpoint: path of the VAE; empty: its copy in the run or the cache, or the recorded path.
            vocoder_checkpoint: path of a vocoder; empty: Griffin-Lim.
        Raises:
            FileNotFoundError: a checkpoint is missing.
            ValueError: the checkpoint is of another stage or speaks no text, its latents come from another VAE, or the
                vocoder reads another log-mel.
        """
        folder, record = resolve_checkpoint(checkpoint), read_stage(checkpoint)
        if record["stage"] != "audio_diffusion":
            raise ValueError(f"{checkpoint} is of stage {record['stage']!r}; text to speech needs audio_diffusion")
        latents = record["latents"]
        model = load_model(AudioDiffusion, checkpoint, weights).requires_grad_(False).to(device)
        if model.config.conditioning != "speech":
            raise ValueError(
                f"{checkpoint} was trained on captions of sounds, conditioning='caption'; it cannot speak"
            )
        # Latents of another VAE would decode to noise, so the VAE is identified by its fingerprint.
        name = f"the latents that {checkpoint} was trained on"
        folders = (folder.absolute().parent, data_of(folder))
        path = find_vae(latents, name, given=vae_checkpoint, folders=folders, media="audio")
        vae = load_vae(path, media="audio").requires_grad_(False).to(device)
        vocoder = load_matching_vocoder(vocoder_checkpoint, vae.config.mel, f"the VAE {path}")
        if vocoder is not None:
            vocoder.to(device)
        return cls(model, vae, SpeechTokenizer.from_dict(latents["tokenizer"]), vocoder, bf16=bf16)

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.model.device

    def place_of(self, kind: str, name: str) -> int | None:
        """The place of a speaker's or language's name among those the model knows; None where it knows none.

        Raises: ValueError: an unknown name, none where the model knows several, or one where it knows none.
        """
        known = getattr(self.model.config, kind)
        flag = f"--{kind.removesuffix('s')}"
        if not known:
            if name:
                raise ValueError(f"{flag} {name} has no effect: the model was trained without {kind}")
            return None
        if not name and len(known) > 1:
            raise ValueError(f"{flag} is needed; the model knows {', '.join(known)}")
        if name and name not in known:
            raise ValueError(f"{flag} {name!r} is unknown{suggest(name, known)} (known: {', '.join(known)})")
        return known.index(name) if name else 0

    def text_inputs(self, texts: Sequence[str], *, speaker: str = "", language: str = "") -> dict[str, Tensor]:
        """The model's inputs for texts: tokens (B, T, 3), n_tokens (B,), and speakers and languages if it knows any.

        Raises: ValueError: a text with nothing to say, or see `place_of`.
        """
        tokens = [self.tokenizer.encode(text, nearest=True) for text in texts]
        inputs = {
            "tokens": pad_sequence(tokens, batch_first=True).to(self.device),
            "n_tokens": torch.tensor([len(row) for row in tokens], device=self.device),
        }
        for kind, name in (("speakers", speaker), ("languages", language)):
            place = self.place_of(kind, name)
            if place is not None:
                inputs[kind] = torch.full((len(texts),), place, device=self.device)
        return inputs

    @torch.no_grad()
    def latents(
        self,
        inputs: dict[str, Tensor],
        seeds: Sequence[int],
        settings: Any,
        *,
        speed: float = 1.0,
        durations: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample latents, one clip per text and seed.

        The noise of a clip depends on its seed alone, not on the batch or the device.

        Args:
            inputs: as from `text_inputs`.
            settings: sampling flags, see `AudioSamplingArguments`.
            durations: mel frames of each token, (B, T); None: predicted ones.
        Returns: latents (B, L, Z) standardised, fp32; durations (B, T) int64.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            text = self.model.encode_speech(**inputs)
            durations = self.model.predicted_durations(text, speed) if durations is None else durations
            condition, prior = self.model.speech_condition(text, durations)
            if settings.n_steps == 0:
                return prior, durations
            low, high = settings.guidance_interval
            noise = [generator for seed in seeds for generator in generators(seed, 0, torch.zeros(1), stream="speech")]
            latents = self.model.sample(
                condition,
                noise,
                sampler=settings.sampler,
                n_steps=settings.n_steps,
                guidance_scale=settings.guidance_scale,
                guidance_interval=(low, high),
            )
        return latents, durations

    @torch.no_grad()
    def decode(self, latents: Tensor, n_frames: Tensor, speakers: Sequence[str]) -> list[Tensor]:
        """Log-mels of latents.

        Args:
            latents: (B, L, Z) standardised.
            n_frames: mel frames of each clip, (B,).
            speakers: their names, for a VAE that is conditioned on speakers.
        Returns: (M, F) fp32 on the CPU for each clip.
        Raises: ValueError: a log-mel that is not finite, or a speaker that the VAE does not know.
        """
        known, places = self.vae.config.speakers, None
        if known:
            unknown = [name for name in speakers if name not in known]
            if unknown:
                raise ValueError(f"the VAE knows no speaker {unknown[0]!r}{suggest(unknown[0], known)}")
            places = torch.tensor([known.index(name) for name in speakers], device=self.device)
        latents = sequence_to_latents(latents.float(), self.vae.config.latent_channels)
        latents = self.vae.denormalize_latents(latents)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            mels = self.vae.decode(latents, n_frames, places).float().cpu().clamp_min(self.vae.config.mel.log_floor)
        if not mels.isfinite().all():
            raise ValueError("a generated log-mel is not finite: the weights are broken")
        return [mel[:, :n] for mel, n in zip(mels, n_frames.tolist())]

    def vocode(self, mel: Tensor) -> Tensor:
        """The waveform (F * hop_length,) of a log-mel (M, F), by the vocoder or Griffin-Lim, fp32 on the CPU."""
        settings = self.vae.config.mel
        # Frames up to the shortest waveform that has a log-mel.
        n_frames, shortest = mel.shape[1], -(-settings.min_samples // settings.hop_length)
        mel = F.pad(mel, (0, max(0, shortest - n_frames)), value=settings.log_floor)[None].to(self.device)
        with torch.no_grad():
            if self.vocoder is None:
                waveform = griffin_lim(mel, settings)
            else:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    waveform = self.vocoder(mel)
        return waveform[0, : n_frames * settings.hop_length].float().cpu()

    def speak(
        self,
        texts: Sequence[str],
        settings: Any,
        *,
        seed: int = 0,
        speed: float = 1.0,
        speaker: str = "",
        language: str = "",
        batch_size: int = 1,
    ) -> Iterator[tuple[str, Tensor]]:
        """Text and waveform (S,) of every text, in order, as soon as its batch is ready."""
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            inputs = self.text_inputs(batch, speaker=speaker, language=language)
            latents, durations = self.latents(inputs, [seed] * len(batch), settings, speed=speed)
            for text, mel in zip(batch, self.decode(latents, durations.sum(1), [speaker] * len(batch))):
                yield text, self.vocode(mel)

    def speakable(self, text: str) -> list[str]:
        """The sentences of a text that have something to say; the others are named in a warning."""
        sentences = split_sentences(text)
        silent = [sentence for sentence in sentences if not self.tokenizer.split(sentence)]
        if silent:
            logger.warning("nothing to say in %s: left out", ", ".join(map(repr, silent)))
        unknown = [symbol for sentence in sentences for symbol in self.tokenizer.unknown(sentence)]
        if unknown:
            logger.warning(
                "%s not in the training data: the nearest known ones stand in", " ".join(sorted(set(unknown)))
            )
        return [sentence for sentence in sentences if sentence not in silent]


def load_matching_vocoder(path: str, mel: MelSettings, owner: str) -> Vocoder | None:
    """The vocoder of a run or checkpoint folder, None for "".

    Args:
        mel: the log-mel that it must read.
        owner: whose log-mel this is, in the message.
    Raises: FileNotFoundError, ValueError: no checkpoint of a vocoder, or one of another log-mel.
    """
    if not path:
        return None
    vocoder = load_vocoder(path)
    remedy = "use a vocoder that was trained on the same log-mel"
    check_same_mel(mel, vocoder.config.mel, first_name=owner, second_name=f"the vocoder {path}", remedy=remedy)
    return vocoder


def read_texts(path: str) -> list[str]:
    """Texts of a UTF-8 file, one a line, blank lines left out; "-" is standard input, "" no file.

    Raises: FileNotFoundError: no such file. ValueError: not UTF-8, or no text; the message names the file.
    """
    if not path:
        return []
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--input {path} is not UTF-8 ({error}); save it as UTF-8") from error
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"--input {path} has no line with text")
    return texts


def fit_to_audio_latents(
    config: AudioDiffusionConfig,
    latents: dict[str, Any],
    *,
    speakers: Sequence[str],
    vae_speakers: Sequence[str],
    overrides: Sequence[str],
    folder: Path,
) -> AudioDiffusionConfig:
    """The configuration with the fields that cached latents determine.

    Args:
        latents: settings of the cache's manifest.
        speakers: that the model tells apart; fewer than two are none.
        vae_speakers: those of the latents' VAE.
        overrides: the `key=value` that the user gave.
        folder: of the cache.
    Raises: ValueError: an override contradicts the latents, or the VAE needs speakers that the model is not told.
    """
    fields: dict[str, Any] = {"latent_channels": latents["latent_channels"], "conditioning": latents["conditioning"]}
    fields["compression"] = latents["mel_frames_per_latent"]
    if latents["conditioning"] == "speech":
        tokenizer = SpeechTokenizer.from_dict(latents["tokenizer"])
        fields |= {"symbols": list(tokenizer.symbols), "n_symbols": len(tokenizer.symbols)}
        fields |= {"pause_symbols": tokenizer.pauses, "speakers": list(speakers) if len(speakers) > 1 else []}
    elif latents["text_embedding_width"]:
        fields |= {"caption_encoder": "frozen", "caption_width": latents["text_embedding_width"]}
    else:
        fields |= {"caption_encoder": "bytes", "max_tokens": latents["max_tokens"]}
    # Overrides may repeat these fields, but not contradict them.
    for pair in overrides:
        name = pair.partition("=")[0]
        if name in fields and getattr(config, name) != fields[name]:
            raise ValueError(
                f"--override {pair} does not fit the latents in {folder}: they need {name}={fields[name]}"
            )
    missing = [name for name in vae_speakers if name not in fields.get("speakers", [])]
    if missing:
        raise ValueError(
            f"the latents in {folder} come from a VAE with speakers, among them {missing[0]!r}, whom the model must "
            "know to decode them; leave out --no_use_speakers, or use a VAE without speakers"
        )
    return config.replace(**fields)
