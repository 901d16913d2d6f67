"""Models of a single task that stand beside a multimodal one: text to image, text to speech, captions to sound, or a
multimodal run of fewer streams."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dataset_loading.multimodal import Item
from model.audio.spectral import check_same_mel
from utils.checkpoints import chosen_weights, read_stage, resolve_checkpoint
from utils.console.progress import reported
from utils.evaluation.multimodal.items import MARGIN, Direction, HeldOutItems, directions_of
from utils.evaluation.multimodal.outputs import AnswerGenerator, Outputs
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments
from utils.generation.arguments.image import SamplingArguments
from utils.generation.audio_diffusion import AudioPipeline
from utils.generation.captions import CaptionPipeline
from utils.generation.exported import home_of
from utils.generation.latents import standardized_posterior
from utils.generation.multimodal import MultimodalPipeline
from utils.generation.speech import SpeechPipeline
from utils.generation.text_to_image import TextToImagePipeline
from utils.seeds import seed_of

SPEECH = AudioSamplingArguments()
CAPTIONS = AudioSamplingArguments(n_steps=20, guidance_scale=3.0)  # As in the evaluation of captions to sound.
STAGES = ("image_diffusion", "audio_diffusion", "multimodal")


class Beside:
    """A model beside the evaluated one.

    Args:
        path: run or checkpoint folder.
        generator: of the evaluated model, whose latents, seed and batch size it shares.
        record: of the evaluated model.
    Attributes: name, of the row. directions.
    Raises: ValueError: a checkpoint of another stage, or a multimodal one of the latents of other VAEs.
    """

    def __init__(self, path: str, generator: AnswerGenerator, record: Mapping[str, Any]):
        self.checkpoint, self.generator = resolve_checkpoint(path), generator
        self.record = read_stage(self.checkpoint)
        self.stage, self.name = self.record["stage"], f"{self.record['stage']} {home_of(self.checkpoint).name}"
        if self.stage not in STAGES or (self.stage == "multimodal" and not self.record.get("latents")):
            kind = f"stage {self.stage!r}" if self.stage not in STAGES else "text alone"
            raise ValueError(f"--beside {path}: a run of {kind}; give one of {', '.join(STAGES)}")
        self.directions = [Direction("text", "image" if self.stage == "image_diffusion" else "audio")]
        if self.stage == "multimodal":
            self.directions = directions_of(self.record)
            for name, settings in self.record["latents"].items():
                expected = record["latents"].get(name, settings)["vae_fingerprint"]
                if (other := settings["vae_fingerprint"]) != expected:
                    raise ValueError(
                        f"--beside {path}: its {name} latents are of the VAE {other}, those of this run of {expected}"
                    )

    def load(self) -> Any:
        """The pipeline of the model, on the device."""
        device = self.generator.pipeline.model.device
        weights = chosen_weights(self.checkpoint, SimpleNamespace(weights="ema", given=()))
        options: dict[str, Any] = {"weights": weights, "device": device}
        if self.stage == "image_diffusion":
            return TextToImagePipeline.load(self.checkpoint, **options)
        if self.stage == "multimodal":
            return MultimodalPipeline.load(self.checkpoint, **options)
        is_caption = self.record["latents"]["conditioning"] == "caption"
        pipeline = (CaptionPipeline if is_caption else SpeechPipeline).load(self.checkpoint, **options)
        audio = self.generator.pipeline.audio
        if audio is not None:
            names = {"first_name": "this run's VAE", "second_name": f"--beside {self.checkpoint}"}
            remedy = "give a run of the same log-mel"
            check_same_mel(audio.vae.config.mel, pipeline.vae.config.mel, **names, remedy=remedy)
        return pipeline

    def outputs(
        self, direction: Direction, items: HeldOutItems, chosen: Sequence[Item], *, pipeline: Any, keys: Sequence[str]
    ) -> Outputs | list[str]:
        """What the model makes of items: texts, or images or clips.

        Args: pipeline: from `load`. keys: of the items, with the number of the copy.
        """
        source, target = direction
        if self.stage == "multimodal":
            # Its own modalities, and texts in tokens of its own.
            names = pipeline.model.config.modalities
            longest = max(len(pipeline.text_part(item.text).ids) for item in items.items)
            generator = AnswerGenerator(
                pipeline,
                batch_size=self.generator.batch_size,
                sampling={
                    option: {name: value for name, value in values.items() if name in names}
                    for option, values in self.generator.sampling.items()
                },
                max_new_tokens=longest + MARGIN,
                seed=self.generator.seed,
                bf16=self.generator.bf16,
            )
            assert source is not None
            prompts = [items.part(item, source, pipeline) for item in chosen]
            return generator.texts(prompts, keys) if target == "text" else generator.spans(prompts, keys, target)
        make = self.draw if self.stage == "image_diffusion" else self.sound
        media: list[Tensor] = []
        starts = range(0, len(chosen), self.generator.batch_size)
        for start in reported(starts, f"{home_of(self.checkpoint)}: generated {target}", len(starts), "batches"):
            batch = slice(start, start + self.generator.batch_size)
            seeds = [seed_of(self.generator.seed, key) for key in keys[batch]]
            media += make(pipeline, chosen[batch], seeds, items)
        latents = [self.encode(target, medium) for medium in media]
        return Outputs(latents, lambda numbers: [media[number] for number in numbers])

    def draw(self, pipeline: TextToImagePipeline, chosen: Sequence[Item], seeds: Sequence[int], _) -> list[Tensor]:
        """Images (3, S, S), sampled as in the evaluation of text to image by default."""
        return list(pipeline.images([item.text for item in chosen], seeds, SamplingArguments()).float().cpu())

    def sound(self, pipeline: AudioPipeline, chosen: Sequence[Item], seeds: Sequence[int], items: Any) -> list[Tensor]:
        """Log-mels (M, F), of speech with predicted durations, of captions as long as the real clips."""
        texts = [item.text for item in chosen]
        if isinstance(pipeline, CaptionPipeline):
            frames = [items.entry(item, "audio")["mel_frames"] for item in chosen]
            n_frames = torch.tensor(frames, device=pipeline.device)
            latents = pipeline.latents(pipeline.text_inputs(texts), n_frames, seeds, CAPTIONS)
            return pipeline.decode(latents, n_frames)
        assert isinstance(pipeline, SpeechPipeline)
        speaker = next(iter(pipeline.model.config.speakers), "")
        inputs = pipeline.text_inputs(texts, speaker=speaker)
        latents, durations = pipeline.latents(inputs, seeds, SPEECH)
        return pipeline.decode(latents, durations.sum(1), [speaker] * len(texts))

    @torch.no_grad()
    def encode(self, target: str, medium: Tensor) -> Tensor:
        """Latents of an image or a log-mel by the evaluated model's VAE, which its readers know."""
        pipeline = self.generator.pipeline
        vae: Any = pipeline.vaes[target]
        mean, _ = standardized_posterior(vae, medium[None].to(pipeline.model.device))
        return mean[0].float().cpu() if target == "image" else mean[0].float().flatten(0, -2).T.cpu()
