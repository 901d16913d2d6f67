"""Flags of scripts that turn texts into sound."""

import dataclasses
from typing import Any, ClassVar, Literal

from utils.flags.choices import WeightsKind
from utils.generation.arguments.sampling import check_interval, interval_option
from utils.options import Section, option

# Samplers whose noise is that of the start alone: a clip is the same in every batch.
AudioSampler = Literal["euler", "heun", "dpmpp_2m", "ddim"]


@dataclasses.dataclass
class AudioSamplingArguments:
    """Flags of everything that samples latents of audio."""

    SECTION_SAMPLING: ClassVar = Section("Sampling")
    sampler: AudioSampler = option("euler", "sampler; euler and ddim take the same steps")
    n_steps: int = option(4, "sampling steps; 0 for speech: the prior's mean, flat but clear", ge=0)
    guidance_scale: float = option(1.0, "scale of classifier-free guidance; 1: none", ge=0)
    guidance_interval: list[float] = interval_option()

    temperature: float | None = option(
        None,
        "std of the noise that sampling starts from; below 1 sounds are nearer to their mean: clearer, less lively; "
        "default: 0.4 for speech, 1 for captions",
        gt=0,
        only_with=("n_steps", bool),
    )

    def validate_interval(self):
        check_interval(self.guidance_interval)


@dataclasses.dataclass
class VoiceArguments(AudioSamplingArguments):
    """Flags of everything that speaks texts."""

    SECTION_VOICE: ClassVar = Section("Voice")
    speaker: str = option("", "name of the speaker, for a model of several")
    language: str = option("", "language of the texts, for a model of several; default: that of its --language")
    speed: float = option(1.0, "tempo: 1 is that of the training data, 2 twice as fast", ge=0.25, le=4)
    SECTION_SAMPLING: ClassVar = Section("Sampling")
    seed: int = option(0, "seed of the noise", ge=0, lt=2**63)
    batch_size: int = option(1, "sentences that are spoken at once", gt=0)
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")

    def voice(self) -> dict[str, Any]:
        """Keywords of `SpeechPipeline.speak`."""
        return {name: getattr(self, name) for name in ("seed", "speed", "speaker", "language", "batch_size")}


@dataclasses.dataclass
class TextToSpeechArguments(VoiceArguments):
    """Flags of `inference/text_to_speech.py`."""

    SECTION_MODELS: ClassVar = Section("Models and data")
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run or the cache")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    SECTION_TEXTS: ClassVar = Section("Texts")
    text: list[str] = option([], "texts")
    input: str = option("", "file of further texts, one a line; -: standard input")
    SECTION_OUTPUT: ClassVar = Section("Output")
    pause: float = option(0.2, "seconds of silence between sentences", ge=0, le=60)
    stream: bool = option(False, "also write each sentence to a file of its own as soon as it is spoken")
    output_dir: str = option("inference/generated/speech", "folder of the results")

    def validate_texts(self):
        if not self.checkpoint or not (self.text or self.input):
            raise ValueError("--checkpoint and --text or --input are needed: a run folder, and what to say")


@dataclasses.dataclass
class TextToAudioArguments(AudioSamplingArguments):
    """Flags of `inference/text_to_audio.py`."""

    SECTION_MODELS: ClassVar = Section("Models and data")
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    vae_checkpoint: str = option("", "folder of the latents' VAE; default: its copy in the run or the cache")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    text_encoder: str = option("", "folder or hub name of the captions' text encoder; default: as recorded")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    SECTION_PROMPTS: ClassVar = Section("Prompts")
    prompts: list[str] = option([], "captions of the sounds")
    input: str = option("", "file of further captions, one a line; -: standard input")
    seconds: float = option(0.0, "length of the sounds; 0: the median of the training clips", ge=0)
    n_steps: int = option(20, "sampling steps", gt=0)
    guidance_scale: float = option(3.0, "scale of classifier-free guidance; 1: none", ge=0)
    SECTION_SAMPLING: ClassVar = Section("Sampling")
    seed: int = option(0, "seed of the noise", ge=0, lt=2**63)
    n_sounds: int = option(1, "sounds per prompt, with seeds seed, seed + 1, ...", gt=0)
    batch_size: int = option(4, "sounds that are made at once", gt=0)
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")
    SECTION_OUTPUT: ClassVar = Section("Output")
    output_dir: str = option("inference/generated/sounds", "folder of the results")

    def validate_prompts(self):
        if not self.checkpoint or not (self.prompts or self.input):
            raise ValueError("--checkpoint and --prompts or --input are needed: a run folder, and captions")
