"""What models generate for an evaluation: texts, and spans as latents that can be seen and heard.

Z latent channels, y x latent rows and columns, S side of an image, M mel bins, F mel frames, L latent frames.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.multimodal.generation import Sampling
from model.multimodal.layout import Part, audio_latents, image_latents
from utils.console.progress import reported
from utils.flags.choices import Modality
from utils.generation.multimodal import MultimodalPipeline
from utils.metrics.timing import Stopwatch
from utils.seeds import seed_of


@dataclass
class Outputs:
    """Images or clips.

    Args:
        latents: of each, (Z, y, x) or (L, Z), standardised as the evaluated model's.
        decode: numbers of some of them -> images (3, S, S) in [-1, 1] or log-mels (M, F).
    """

    latents: list[Tensor]
    decode: Callable[[Sequence[int]], list[Tensor]]

    def __len__(self) -> int:
        return len(self.latents)

    def media(self) -> list[Tensor]:
        """All of them, decoded."""
        return self.decode(range(len(self)))


class AnswerGenerator:
    """Answers of a multimodal model in batches. Random numbers depend on the seed, the item and the copy alone.

    Args:
        pipeline: of the model.
        batch_size: prompts at once.
        sampling: options of `Sampling` for images and audio, modality -> value.
        max_new_tokens: maximum number of text tokens of an answer; fewer where a prompt leaves less room.
        n_thinking_steps: steps of the core; default: the model's.
        n_carried_steps: see `Sampling`.
    """

    def __init__(
        self,
        pipeline: MultimodalPipeline,
        *,
        batch_size: int,
        sampling: dict[str, dict[str, Any]],
        max_new_tokens: int,
        seed: int,
        bf16: bool = False,
        n_thinking_steps: int | None = None,
        n_carried_steps: int | None = None,
    ):
        self.pipeline, self.batch_size, self.sampling = pipeline, batch_size, sampling
        self.max_new_tokens, self.seed, self.bf16 = max_new_tokens, seed, bf16
        self.thinking = {"n_thinking_steps": n_thinking_steps, "n_carried_steps": n_carried_steps}
        self.stopwatch = Stopwatch(pipeline.model.device)  # of the answers

    def autocast(self) -> Any:
        """The context of forward passes."""
        device = self.pipeline.model.device
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def answers(self, prompts: Sequence[Part | None], keys: Sequence[str], target: Modality) -> list[Part | None]:
        """The first part of each answer that is of a modality; a prompt of None is empty."""
        n_new = self.pipeline.room([[prompt] if prompt else [] for prompt in prompts], self.max_new_tokens)
        options = {**self.sampling, "max_new_tokens": n_new, **self.thinking}
        sampling = Sampling(None if target == "text" else target, [target], **options)
        parts: list[Part | None] = []
        starts = range(0, len(prompts), self.batch_size)
        for start in reported(starts, f"generated {target}", len(starts), "batches"):
            batch = [[prompt] if prompt else [] for prompt in prompts[start : start + self.batch_size]]
            seeds = [seed_of(self.seed, key) for key in keys[start : start + self.batch_size]]
            with self.autocast():
                answers = self.stopwatch.time(partial(self.pipeline.answer, seeds=seeds, sampling=sampling), batch)
            parts += [next((part for part in answer if part.modality == target), None) for answer in answers]
        return parts

    def texts(self, prompts: Sequence[Part], keys: Sequence[str]) -> list[str]:
        """The most probable text for each image or clip; "" where there is none."""
        parts = self.answers(prompts, keys, "text")
        return [self.pipeline.text_of(part) if part else "" for part in parts]

    def spans(self, prompts: Sequence[Part], keys: Sequence[str], target: Modality) -> Outputs:
        """An image or a clip for each prompt."""
        config = self.pipeline.model.config
        to_latents = image_latents if target == "image" else audio_latents
        patch = getattr(config, f"{target}_encoder_patch_size")
        parts = self.answers(prompts, keys, target)
        latents = [to_latents(part.latents.float(), patch) for part in parts]  # type: ignore[union-attr]
        return self.outputs(latents, target)

    def outputs(self, latents: Sequence[Tensor], target: Modality) -> Outputs:
        """Latents with the VAE that decodes them."""
        decode = self.images if target == "image" else self.mels
        rows = [row.cpu() for row in latents]
        return Outputs(rows, lambda numbers: decode([rows[number] for number in numbers]))

    def images(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Decoded images (3, S, S) in [-1, 1], on the CPU."""
        vae: Any = self.pipeline.vaes["image"]
        images: list[Tensor] = []
        for start in range(0, len(latents), self.batch_size):
            batch = torch.stack(list(latents[start : start + self.batch_size])).to(self.pipeline.model.device)
            with self.autocast():
                images += vae.decode(vae.denormalize_latents(batch)).float().clamp(-1, 1).cpu().unbind()
        return images

    def mels(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Decoded log-mels (M, F), on the CPU."""
        audio = self.pipeline.audio
        assert audio is not None
        device, mels = self.pipeline.model.device, []
        for clip in latents:
            n_frames = torch.tensor([len(clip) * audio.vae.config.compression], device=device)
            mels += audio.decode(clip[None].to(device), n_frames)
        return mels
