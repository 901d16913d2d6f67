"""Text-to-speech pipeline: tokens, durations, sampler, VAE decoder, vocoder.

B batch, T tokens, L latent frames, Z latent channels, S samples.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.samplers import OnEstimate
from model.text.phonemes import SpeechTokenizer, split_clauses
from utils.generation.audio_diffusion import AudioPipeline
from utils.generation.files import check_unicode, read_lines
from utils.options import suggest

logger = logging.getLogger(__name__)

SENTENCE_END = (".", "!", "?", "…", "。", "！", "？", ":", ";", "\n")  # noqa: RUF001
CLOSING = "\"'”’»)]"  # noqa: RUF001
MAX_CHARACTERS = 240  # of a piece that is spoken at once; longer sentences are cut between clauses


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
    """Pieces of at most `max_characters`, cut between words, and within longer ones."""
    pieces, current = [], ""
    words = [word[i : i + max_characters] for word in text.split() for i in range(0, len(word), max_characters)]
    for word in words:
        if current and len(current) + 1 + len(word) > max_characters:
            pieces.append(current)
            current = word
        else:
            current = f"{current} {word}" if current else word
    return [*pieces, *([current] if current else [])]


class SpeechPipeline(AudioPipeline):
    """Speaks texts with a diffusion model, the VAE of its latents, and a vocoder.

    Args:
        tokenizer: that of the training data.
        model, vae, vocoder, bf16: see `AudioPipeline`.
    """

    conditioning = "speech"
    default_temperature = 0.4  # Word errors are fewer than at 1 and than of the prior: docs/experiments.md.

    def __init__(
        self,
        model: AudioDiffusion,
        vae: AudioVAE,
        tokenizer: SpeechTokenizer,
        vocoder: Vocoder | None = None,
        *,
        bf16: bool = False,
    ):
        super().__init__(model, vae, vocoder, bf16=bf16)
        self.tokenizer = tokenizer

    @classmethod
    def text_parts(cls, record, folder, device):
        return {"tokenizer": SpeechTokenizer.from_dict(record["latents"]["tokenizer"])}

    def speaker_place(self, name: str) -> int | None:
        """The place of a speaker among those the model knows; None where it knows none.

        Raises: ValueError: an unknown name, none where the model knows several, or one where it knows none.
        """
        known = self.model.config.speakers
        if not known:
            if name:
                raise ValueError(f"--speaker {name} has no effect: the model was trained without speakers")
            return None
        if not name and len(known) > 1:
            raise ValueError(f"--speaker is needed; the model knows {', '.join(known)}")
        if name and name not in known:
            raise ValueError(f"--speaker {name!r} is unknown{suggest(name, known)}")
        return known.index(name) if name else 0

    def language_of(self, name: str) -> str:
        """The language of a name, "" for the usual one. Raises: ValueError: the model was not trained on it."""
        if name and self.tokenizer.units == "characters":
            raise ValueError(f"--language {name} has no effect: the model reads characters")
        try:
            return self.tokenizer.language_of(name)
        except ValueError as error:
            raise ValueError(f"--language: {error}") from error

    def text_inputs(self, texts: Sequence[str], *, speaker: str = "", language: str = "") -> dict[str, Tensor]:
        """The model's inputs for texts: tokens (B, T, 3), n_tokens (B,), and speakers and languages if it knows any.

        Raises: ValueError: a text with nothing to say, or see `speaker_place` and `language_of`.
        """
        language = self.language_of(language)
        tokens = [self.tokenizer.encode(text, language, nearest=True) for text in texts]
        inputs = self.token_inputs(tokens)
        languages = self.model.config.languages
        places = {
            "speakers": self.speaker_place(speaker),
            "languages": languages.index(language) if languages else None,
        }
        for kind, place in places.items():
            if place is not None:
                inputs[kind] = torch.full((len(texts),), place, device=self.device)
        return inputs

    def token_inputs(self, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tokens of several texts, (T, 3) each, as inputs: tokens (B, T, 3) and n_tokens (B,)."""
        n_tokens = torch.tensor([len(row) for row in tokens], device=self.device)
        return {"tokens": pad_sequence(tokens, batch_first=True).to(self.device), "n_tokens": n_tokens}

    @torch.no_grad()
    def latents(
        self,
        inputs: dict[str, Tensor],
        seeds: Sequence[int],
        settings: Any,
        *,
        speed: float = 1.0,
        durations: Tensor | None = None,
        on_estimate: OnEstimate | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample latents, one clip per text and seed.

        The noise of a clip depends on its seed alone, not on the batch or the device.

        Args:
            inputs: as from `text_inputs`.
            settings: sampling flags, see `AudioSamplingArguments`.
            durations: mel frames of each token, (B, T); None: predicted ones.
            on_estimate: see `AudioPipeline.sample`.
        Returns: latents (B, L, Z) standardised, fp32; durations (B, T) int64.
        """
        with self.autocast():
            text = self.model.encode_speech(**inputs)
            durations = self.model.predicted_durations(text, speed) if durations is None else durations
            condition, prior = self.model.speech_condition(text, durations)
            if settings.n_steps == 0:
                return prior, durations
            latents = self.sample(condition, seeds, settings, on_estimate)
        return latents, durations

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

    def speakable(self, text: str, language: str = "", speaker: str | None = None) -> list[str]:
        """The sentences of a text that have something to say; the others are named in a warning.

        Raises: ValueError: see `language_of`, `check_unicode`, and where a speaker is given `speaker_place`.
        """
        check_unicode(text)
        if speaker is not None:
            self.speaker_place(speaker)
        sentences, language = split_sentences(text), self.language_of(language)
        if not sentences:
            logger.warning("nothing to say in the text %r: left out", text)
        silent = [sentence for sentence in sentences if not self.tokenizer.split(sentence, language)]
        if silent:
            logger.warning("nothing to say in %s: left out", ", ".join(map(repr, silent)))
        unknown = [symbol for sentence in sentences for symbol in self.tokenizer.unknown(sentence, language)]
        if unknown:
            logger.warning(
                "%s not in the training data: the nearest known ones stand in", " ".join(sorted(set(unknown)))
            )
        return [sentence for sentence in sentences if sentence not in silent]


def join_sentences(waveforms: Sequence[Tensor], pause: float, sample_rate: int) -> Tensor:
    """Waveforms (S,) of sentences one after the other, with so many seconds of silence between; (S,)."""
    silence = torch.zeros(round(pause * sample_rate))
    return torch.cat([piece for waveform in waveforms for piece in (silence, waveform)][1:])


def read_texts(path: str) -> list[str]:
    """Texts of --input without blanks around them, see `read_lines`; none for ""."""
    return [line.strip() for line in read_lines(path, "input")] if path else []
