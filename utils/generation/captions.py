"""Captions-to-sound pipeline: caption, length, sampler, VAE decoder, vocoder.

B batch, S caption tokens, E width of caption states, L latent frames, Z latent channels.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.samplers import OnEstimate
from model.text.feature_extractors import FrozenTextEncoder
from model.text.tokenizer import encode_caption
from utils.generation.audio_diffusion import AudioPipeline
from utils.generation.files import check_unicode
from utils.generation.text_encoder import caption_states, load_text_encoder

STRETCH = 1.25  # how far lengths may lie outside those of the training clips, a factor


class CaptionPipeline(AudioPipeline):
    """Makes the sounds that captions describe, of a given length.

    Args:
        clip_seconds: `shortest`, `median` and `longest` of the training clips, see `seconds_of_clips`.
        text_encoder: the frozen encoder of the captions, if the model was trained on one.
        model, vae, vocoder, bf16: see `AudioPipeline`.
    """

    conditioning = "caption"
    task = "captions to sound"
    text_flags = ("text_encoder",)

    def __init__(
        self,
        model: AudioDiffusion,
        vae: AudioVAE,
        vocoder: Vocoder | None = None,
        *,
        clip_seconds: dict[str, float],
        text_encoder: FrozenTextEncoder | None = None,
        bf16: bool = False,
    ):
        super().__init__(model, vae, vocoder, bf16=bf16)
        self.clip_seconds, self.text_encoder = clip_seconds, text_encoder

    @classmethod
    def text_parts(cls, record, folder, device, text_encoder: str = ""):
        encoder = load_text_encoder(record["latents"], text_encoder, near=folder)
        if encoder is not None:
            encoder.model.to(device)
        return {"clip_seconds": record["clip_seconds"], "text_encoder": encoder}

    def check_captions(self, captions: Sequence[str]) -> None:
        """Raises: ValueError: a caption that is empty, not Unicode, or longer than the model reads; names it."""
        limit = self.model.config.max_tokens
        if self.text_encoder is not None:
            limit = min(limit, self.text_encoder.tokenizer.model_max_length)
        for caption in captions:
            check_unicode(caption)
            if not caption.strip():
                raise ValueError(f"the prompt {caption!r} is empty; describe the sound, such as 'a dog barks'")
            n_tokens = len(self.token_ids(caption))
            if n_tokens > limit:
                raise ValueError(
                    f"the prompt {caption[:60]!r}... has {n_tokens} tokens, but the model reads at most {limit}; "
                    "shorten it"
                )

    def token_ids(self, caption: str) -> list[int]:
        """All tokens of a caption, also those beyond what the model reads."""
        if self.text_encoder is not None:
            return self.text_encoder.tokenizer(caption, verbose=False)["input_ids"]
        # A character in Unicode normal form C may have three times the bytes.
        return encode_caption(caption, 1 + 3 * len(caption.encode()))

    def text_inputs(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The model's inputs for captions: caption_states, bytes (B, S) or frozen states (B, S, E), and n_caption.

        Raises: ValueError: see `check_captions`.
        """
        self.check_captions(captions)
        if self.text_encoder is not None:
            rows = caption_states(self.text_encoder, list(captions), self.model.config.max_tokens)
        else:
            rows = [torch.tensor(self.token_ids(caption)) for caption in captions]
        n_caption = torch.tensor([len(row) for row in rows], device=self.device)
        return {"caption_states": pad_sequence(rows, batch_first=True).to(self.device), "n_caption": n_caption}

    def frames_of(self, seconds: float) -> int:
        """Mel frames of a sound of so many seconds; 0 seconds: as many as the median training clip has.

        Raises: ValueError: far shorter or longer than the training clips.
        """
        low, high = self.clip_seconds["shortest"] / STRETCH, self.clip_seconds["longest"] * STRETCH
        if seconds and not low <= seconds <= high:
            raise ValueError(
                f"--seconds={seconds:g} is out of the range of the training clips: give {low:.2f} to {high:.2f}, or 0 "
                f"for their median, {self.clip_seconds['median']:.2f}"
            )
        mel = self.vae.config.mel
        return max(1, round((seconds or self.clip_seconds["median"]) * mel.sample_rate / mel.hop_length))

    @torch.no_grad()
    def latents(
        self,
        inputs: dict[str, Tensor],
        n_frames: Tensor,
        seeds: Sequence[int],
        settings: Any,
        on_estimate: OnEstimate | None = None,
    ) -> Tensor:
        """Sample latents, one clip per caption and seed; the noise of a clip depends on its seed alone.

        Args:
            inputs: as from `text_inputs`.
            n_frames: mel frames of each clip, (B,).
            settings: sampling flags, see `AudioSamplingArguments`.
            on_estimate: see `AudioPipeline.sample`.
        Returns: (B, L, Z) standardised, fp32.
        """
        with self.autocast():
            condition = self.model.caption_condition(self.model.latent_frames(n_frames), **inputs)
            return self.sample(condition, seeds, settings, on_estimate)

    def sounds(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        settings: Any,
        *,
        seconds: float = 0.0,
        batch_size: int = 1,
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Caption, seed and waveform of every caption with its seed, in order, as soon as its batch is ready.

        Raises: ValueError: see `check_captions` and `frames_of`; before anything is sampled.
        """
        self.check_captions(captions)
        n_frames = self.frames_of(seconds)
        for start in range(0, len(captions), batch_size):
            batch, batch_seeds = captions[start : start + batch_size], seeds[start : start + batch_size]
            frames = torch.full((len(batch),), n_frames, device=self.device)
            latents = self.latents(self.text_inputs(batch), frames, batch_seeds, settings)
            for caption, seed, mel in zip(batch, batch_seeds, self.decode(latents, frames)):
                yield caption, seed, self.vocode(mel)


def seconds_of_clips(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shortest, median and longest of the `seconds` of clips, for `CaptionPipeline`."""
    seconds = [entry["seconds"] for entry in entries]
    return {"shortest": min(seconds), "median": statistics.median(seconds), "longest": max(seconds)}
