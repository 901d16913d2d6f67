"""Texts, images and audio to answers in any of them, by a multimodal model and the VAEs of its latents.

M mel bins, F mel frames, Y X rows and columns, Z latent channels, L latent frames.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dataset_loading.audio.signal import is_silent
from dataset_loading.image.pixels import decode_image, fit_image, to_float, to_tensor
from dataset_loading.text.tokenizers import document_encoder, load_tokenizer
from model.audio.spectral import LogMel, analyse
from model.audio.vocoders import Vocoder
from model.multimodal import MegaTransformerMultimodal
from model.multimodal.layout import (
    Part,
    audio_latents,
    audio_tokens,
    build_stream,
    check_span,
    image_latents,
    image_tokens,
)
from model.multimodal.stream_state import Sampling
from model.vae import VAE
from utils.checkpoints import load_model, read_stage, resolve_checkpoint
from utils.flags.choices import WeightsKind
from utils.generation.audio import read_waveform
from utils.generation.audio_diffusion import AudioPipeline, load_matching_vocoder
from utils.generation.exported import home_of, vocoder_of
from utils.generation.latents import Media, find_vae, load_vae, standardized_posterior

logger = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"(<(?:image|audio):[^>]*>)")  # A file within a prompt.
# What looks like one, such as without its end, and is no address.
OTHER_PLACEHOLDER = re.compile(r"<\s*(?:image|audio)\s*:[^<>]*>?|<\w+:(?!//)[^<>]*>", re.IGNORECASE)


class MultimodalPipeline:
    """Answers prompts of texts, images and audio.

    Args:
        model: in eval mode.
        tokenizer: of its texts.
        vaes: of its latents, by modality, on the same device.
        vocoder: of the audio VAE's log-mel; None for Griffin-Lim.
        bf16: bfloat16 autocast.
    """

    def __init__(
        self,
        model: MegaTransformerMultimodal,
        tokenizer: PreTrainedTokenizerFast,
        vaes: Mapping[str, VAE],
        vocoder: Vocoder | None = None,
        *,
        bf16: bool = False,
    ):
        self.model, self.tokenizer, self.vaes, self.bf16 = model, tokenizer, vaes, bf16
        self.encoder = document_encoder(tokenizer)
        self.record: dict[str, str] = {}  # Checkpoints, weights and device, for the settings of a run.
        audio_vae: Any = vaes.get("audio")
        # Decoding is that of the other models of audio.
        network: Any = model
        self.audio = None if audio_vae is None else AudioPipeline(network, audio_vae, vocoder, bf16=bf16)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        vae_checkpoints: Mapping[str, str] | None = None,
        vocoder_checkpoint: str = "",
        weights: WeightsKind = "ema",
        device: torch.device | str = "cpu",
        bf16: bool = False,
    ) -> Self:
        """From a run or checkpoint folder.

        Args:
            vae_checkpoints: modality -> path of its VAE; default: the copies in the run, or as recorded.
            vocoder_checkpoint: path of a vocoder; empty: that of an exported folder, or Griffin-Lim.
        Raises:
            FileNotFoundError: a checkpoint is missing.
            ValueError: the checkpoint is of another stage or of text alone, a VAE is not that of its latents, or the
                vocoder reads another log-mel.
        """
        folder, record = resolve_checkpoint(checkpoint), read_stage(checkpoint, "multimodal")
        if not record.get("latents"):
            raise ValueError(f"{checkpoint} is a model of text alone; give a run with --include_modes image or audio")
        model = load_model(MegaTransformerMultimodal, checkpoint, weights).requires_grad_(False).to(device).eval()
        vaes: dict[str, VAE] = {}
        sources = {"checkpoint": str(folder), "weights": weights, "device": str(device)}
        media: tuple[Media, ...] = ("image", "audio")
        for name in media:
            if name not in record["latents"]:
                continue
            # Latents of another VAE would decode to noise, so it is identified by its fingerprint.
            owner = f"the {name} latents that {checkpoint} was trained on"
            given, near = (vae_checkpoints or {}).get(name, ""), (home_of(folder) / name,)
            path = find_vae(record["latents"][name], owner, given=given, folders=near, media=name)
            vaes[name] = load_vae(path, media=name).requires_grad_(False).to(device)
            sources[f"{name}_vae_checkpoint"] = str(path)
        vocoder, vocoder_checkpoint = None, vocoder_of(folder, vocoder_checkpoint)
        if vocoder_checkpoint:
            if "audio" not in vaes:
                raise ValueError(f"vocoder_checkpoint={vocoder_checkpoint!r} has no effect: {checkpoint} has no audio")
            mel: Any = vaes["audio"].config
            vocoder = load_matching_vocoder(vocoder_checkpoint, mel.mel, "the audio VAE")
            assert vocoder is not None
            vocoder.to(device)
        pipeline = cls(model, load_tokenizer(str(folder)), vaes, vocoder, bf16=bf16)
        pipeline.record = {**sources, "vocoder_checkpoint": vocoder_checkpoint}
        return pipeline

    def autocast(self) -> torch.autocast:
        """The autocast of all networks."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    # ---- Into parts.

    def text_part(self, text: str) -> Part:
        """A text."""
        return Part("text", ids=self.encoder.encode(text, add_special_tokens=False).ids)

    def read_text(self, text: str) -> Part:
        """A text that is drawn or spoken.

        Raises: ValueError: it is empty.
        """
        if not text.strip():
            raise ValueError(f"a text to draw or speak is empty: {text!r}; give words")
        return self.text_part(text)

    @torch.no_grad()
    def image_part(self, image: Tensor) -> Part:
        """An image (3, Y, X) in [-1, 1], of the size that the model knows."""
        with self.autocast():
            mean, _ = standardized_posterior(self.vaes["image"], image[None].to(self.model.device))
        return Part("image", latents=image_tokens(mean[0].float(), self.model.config.image_encoder_patch_size))

    @torch.no_grad()
    def audio_part(self, mel: Tensor) -> Part:
        """A log-mel (M, F)."""
        with self.autocast():
            mean, _ = standardized_posterior(self.vaes["audio"], mel[None].to(self.model.device))
        latents = mean[0].float().flatten(0, -2).T  # (Z, [m,] L) -> (L, Z m)
        return Part("audio", latents=audio_tokens(latents, self.model.config.audio_encoder_patch_size))

    def read_image(self, file: str | Path) -> Part:
        """An image file, cropped to the size that the model knows.

        Raises: OSError, ValueError: it is missing, damaged, or no image; names it.
        """
        self.check_modality("image", file)
        try:
            image = decode_image({"path": str(file), "bytes": None}, "white")
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError for broken PNG files.
            raise ValueError(f"image {str(file)!r} cannot be read: {error}") from error
        return self.fitted_image_part(image)

    def fitted_image_part(self, image: Image.Image) -> Part:
        """An sRGB image, cropped to the size that the model knows."""
        image = fit_image(image, self.model.config.image_size, "crop", background_color="white")
        return self.image_part(to_float(to_tensor(image)))

    def read_audio(self, file: str | Path) -> Part:
        """An audio file.

        Raises: OSError, ValueError: it is missing, damaged, no audio, or longer than the model takes; names it.
        """
        self.check_modality("audio", file)
        assert self.audio is not None
        settings = self.audio.vae.config.mel
        try:
            waveform = read_waveform(Path(file), settings.sample_rate)
        except (OSError, ValueError) as error:
            raise ValueError(f"audio {str(file)!r} cannot be read: {error}") from error
        return self.waveform_part(waveform, file)

    def waveform_part(self, waveform: Tensor, file: str | Path) -> Part:
        """A waveform (S,) at the audio VAE's sampling rate.

        Args: file: names it in messages.
        Raises: ValueError: it is too short, or longer than the model takes.
        """
        assert self.audio is not None
        settings = self.audio.vae.config.mel
        if len(waveform) < settings.min_samples:
            seconds, least = (n / settings.sample_rate for n in (len(waveform), settings.min_samples))
            raise ValueError(f"audio {str(file)!r} lasts {seconds:.4f} s; give at least {least:.3f} s")
        if is_silent(waveform, settings.sample_rate):
            logger.warning("audio %r is silent; the answer says nothing of it", str(file))
        part = self.audio_part(analyse(waveform, LogMel(settings)))
        try:
            check_span(self.model.config, part)
        except ValueError as error:
            raise ValueError(f"audio {str(file)!r}: {error}; give a shorter clip") from error
        return part

    def check_modality(self, modality: str, file: str | Path) -> None:
        """Raises: ValueError: the model lacks a modality; names the file that has it."""
        if modality not in self.vaes:
            raise ValueError(f"{modality} {str(file)!r}: this model has modalities={self.model.config.modalities}")

    def read_prompt(self, text: str) -> list[Part]:
        """The parts of a prompt with placeholders `<image:path>` and `<audio:path>`.

        Raises: OSError, ValueError: see `read_image` and `read_audio`; a placeholder of another kind.
        """
        parts = []
        for piece in filter(None, map(str.strip, PLACEHOLDER.split(text))):
            match = PLACEHOLDER.fullmatch(piece)
            kind, _, path = piece[1:-1].partition(":") if match else ("text", "", "")
            if not match and (other := OTHER_PLACEHOLDER.search(piece)):
                raise ValueError(f"placeholder {other[0]!r} of a prompt: write <image:path> or <audio:path>")
            readers = {"image": self.read_image, "audio": self.read_audio}
            parts.append(readers[kind](path) if match else self.text_part(piece))
        return parts

    # ---- From parts.

    def text_of(self, part: Part) -> str:
        """The text of a part."""
        return self.tokenizer.decode(list(part.ids)).strip()

    @torch.no_grad()
    def image_of(self, part: Part) -> Tensor:
        """The image (3, Y, X) in [-1, 1] of a part, on the CPU."""
        assert part.latents is not None
        vae: Any = self.vaes["image"]
        latents = image_latents(part.latents[None], self.model.config.image_encoder_patch_size)
        with self.autocast():
            image = vae.decode(vae.denormalize_latents(latents))
        return image[0].float().clamp(-1, 1).cpu()

    def mel_of(self, part: Part) -> Tensor:
        """The log-mel (M, F) of a part, on the CPU.

        Raises: ValueError: it is not finite.
        """
        assert part.latents is not None and self.audio is not None
        latents = audio_latents(part.latents, self.model.config.audio_encoder_patch_size)[None]
        n_frames = torch.tensor([latents.shape[1] * self.audio.vae.config.compression])
        return self.audio.decode(latents, n_frames)[0]

    def sound_of(self, part: Part) -> tuple[Tensor, int]:
        """The waveform (S,) of a part, on the CPU, and its sampling rate in Hz."""
        assert self.audio is not None
        return self.audio.vocode(self.mel_of(part)), self.audio.vae.config.sample_rate

    # ---- Answers.

    def room(self, prompts: Sequence[Sequence[Part]], n_tokens: int) -> int:
        """A number of new text tokens, or as many as fit behind the longest prompt, at least 1."""
        config = self.model.config
        longest = max((len(build_stream(config, parts, is_open=True)) for parts in prompts), default=0)
        return max(1, min(n_tokens, config.max_position_embeddings - longest))

    def answer(
        self,
        prompts: Sequence[Sequence[Part]],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        **keywords: Any,
    ) -> list[list[Part]]:
        """Answers to prompts, whose random numbers depend on their seeds alone; see the model's `generate`."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with self.autocast():
            return self.model.generate(prompts, sampling, generators=generators, **keywords)

    def draw(self, texts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Tensor]:
        """An image (3, Y, X) of each text; options: of `Sampling`."""
        prompts = [[self.text_part(text)] for text in texts]
        answers = self.answer(prompts, seeds, Sampling("image", ["image"], **options))
        return [self.image_of(parts[0]) for parts in answers]

    def speak(self, texts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Tensor]:
        """The log-mel (M, F) of each text, spoken; options: of `Sampling`."""
        prompts = [[self.text_part(text)] for text in texts]
        answers = self.answer(prompts, seeds, Sampling("audio", ["audio"], **options))
        return [self.mel_of(parts[0]) for parts in answers]

    def say(self, parts: Sequence[Part], **options: Any) -> list[str]:
        """The text of each image or clip, its most probable tokens; options: of `Sampling`."""
        answers = self.answer([[part] for part in parts], range(len(parts)), Sampling(None, ["text"], **options))
        return [self.text_of(answer[0]) if answer else "" for answer in answers]
