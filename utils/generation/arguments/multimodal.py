"""Flags of scripts that answer with text, images and audio."""

import dataclasses
from typing import ClassVar, Literal, get_args

from utils.flags.choices import SPANS, SamplerKind, WeightsKind
from utils.options import Section, option

Task = Literal["prompts", "draw", "speak", "describe", "transcribe"]


@dataclasses.dataclass
class StreamSamplingArguments:
    """Flags of everything that answers with text, images and audio."""

    SECTION_SAMPLING: ClassVar = Section("Sampling")
    max_new_tokens: int = option(64, "maximum number of text tokens of an answer", gt=0)
    temperature: float = option(0.0, "temperature of text and of the length of audio; 0: the most probable", ge=0)
    image_sampler: SamplerKind | None = option(None, "sampler of images; default: the model's own")
    image_n_steps: int | None = option(None, "sampling steps of an image; default: the model's own", gt=0)
    image_guidance_scale: float | None = option(
        None, "scale of classifier-free guidance of images; 1: none; default: the model's own", ge=0
    )
    audio_sampler: SamplerKind | None = option(None, "sampler of audio; default: the model's own")
    audio_n_steps: int | None = option(None, "sampling steps of a clip; default: the model's own", gt=0)
    audio_guidance_scale: float | None = option(
        None, "scale of classifier-free guidance of audio; 1: none; default: the model's own", ge=0
    )
    thinking_steps: int = option(0, "recurrent models: thinking steps per token; 0: the model's own", ge=0)
    carried_steps: int = option(
        0,
        "recurrent models: thinking steps in a sampler's steps after the first, which go on from the state of the one "
        "before; 0: each begins anew",
        ge=0,
    )


@dataclasses.dataclass
class PromptArguments(StreamSamplingArguments):
    """Flags of prompts."""

    SECTION_PROMPTS: ClassVar = Section("Prompts")
    draw: list[str] = option([], "texts that are drawn")
    speak: list[str] = option([], "texts that are spoken")
    describe: list[str] = option([], "image files that are described")
    transcribe: list[str] = option([], "audio files that are transcribed")
    prompts: list[str] = option(
        [], "prompts with placeholders <image:path> and <audio:path>, answered in any modality"
    )
    input: str = option("", "file of further prompts, one a line; -: standard input")
    input_task: Task = option("prompts", "the flag that the lines of the input belong to", only_with=("input", bool))
    batch_size: int = option(16, "prompts that are answered at once", gt=0, only_with=("stream", False))
    stream: bool = option(False, "show texts token by token, one prompt after the other")
    seed: int = option(0, "seed of the random numbers", ge=0, lt=2**63)

    def asked(self) -> set[str]:
        """The flags that have a prompt."""
        given = {name for name in get_args(Task) if getattr(self, name)}
        return given | ({self.input_task} if self.input else set())

    def validate_spans(self):
        """Raises: ValueError: a flag of a modality that no answer has."""
        for name, task in zip(SPANS, ("draw", "speak")):
            flags = [f"{name}_{kind}" for kind in ("sampler", "n_steps", "guidance_scale")]
            given = [flag for flag in flags if getattr(self, flag) is not None]
            if given and not self.asked() & {task, "prompts"}:
                raise ValueError(f"--{given[0]} has no effect without --{task} or --prompts")


@dataclasses.dataclass
class ChatArguments(PromptArguments):
    """Flags of `inference/chat.py`."""

    SECTION_MODELS: ClassVar = Section("Models and data")
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    image_vae_checkpoint: str = option("", "folder of the image VAE; default: its copy in the run")
    audio_vae_checkpoint: str = option("", "folder of the audio VAE; default: its copy in the run")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder; default: Griffin-Lim")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights")
    SECTION_OUTPUT: ClassVar = Section("Output")
    output_dir: str = option("inference/generated/chat", "folder of the results")

    def validate_prompts(self):
        if not (self.checkpoint and self.asked()):
            flags = ", ".join(f"--{name}" for name in ("draw", "speak", "describe", "transcribe", "prompts", "input"))
            raise ValueError(f"--checkpoint and one of {flags} are needed")
