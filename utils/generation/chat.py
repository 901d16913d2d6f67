"""Prompts of text, images and audio from the command line, and their answers."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from model.multimodal.layout import SPANS, Modality, Part
from model.multimodal.stream_state import Sampling
from model.samplers import SamplerKind
from utils.generation.multimodal import MultimodalPipeline
from utils.generation.speech import read_texts
from utils.options import option

Task = Literal["prompts", "draw", "speak", "describe", "transcribe"]
ANSWERED: dict[Task, tuple[Modality | None, list[Modality]]] = {  # What an answer begins with, and what it may have.
    "draw": ("image", ["image"]),
    "speak": ("audio", ["audio"]),
    "describe": (None, ["text"]),
    "transcribe": (None, ["text"]),
}


@dataclasses.dataclass
class StreamSamplingArguments:
    """Flags of everything that answers with text, images and audio."""

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

    def sampling(self, begin: Modality | None, modalities: Sequence[Modality]) -> Sampling:
        """The flags as a model's `generate` takes them; those of modalities that an answer lacks are left out."""
        options: dict[str, dict[str, Any]] = {"sampler": {}, "n_steps": {}, "guidance_scale": {}}
        for name, values in options.items():
            given = {modality: getattr(self, f"{modality}_{name}") for modality in SPANS if modality in modalities}
            values |= {modality: value for modality, value in given.items() if value is not None}
        return Sampling(
            begin,
            modalities,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            length_temperature=self.temperature,
            n_thinking_steps=self.thinking_steps or None,
            n_carried_steps=self.carried_steps or None,
            **options,
        )


@dataclasses.dataclass
class PromptArguments(StreamSamplingArguments):
    """Flags of prompts."""

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


class Question(NamedTuple):
    """What is asked: the text or file that names it, its parts, and how it is answered."""

    name: str
    parts: list[Part]
    sampling: Sampling


def read_questions(pipeline: MultimodalPipeline, args: PromptArguments) -> list[Question]:
    """The prompts of all flags.

    Raises: OSError, ValueError: a file cannot be read, a text is empty, or the model lacks a modality.
    """
    readers: dict[Task, Any] = {"draw": pipeline.read_text, "speak": pipeline.read_text}
    readers |= {"describe": pipeline.read_image, "transcribe": pipeline.read_audio, "prompts": pipeline.read_prompt}
    lines, questions = read_texts(args.input), []
    for task, read in readers.items():
        sampling = args.sampling(*ANSWERED.get(task, (None, pipeline.model.config.modalities)))
        for name in [*getattr(args, task), *(lines if task == args.input_task else [])]:
            parts = read(name)
            questions.append(Question(name, parts if isinstance(parts, list) else [parts], sampling))
    return questions


def answer_questions(
    pipeline: MultimodalPipeline,
    questions: Sequence[Question],
    args: PromptArguments,
    *,
    on_part: Callable[[int, int, Part], None],
    on_token: Callable[[int, int], None] | None = None,
) -> None:
    """Answer questions, in batches of those that are answered in the same way.

    Args:
        on_part: called with the number of the question, that of the part within its answer, and the part.
        on_token: called with the number of the question and each token of its text.
    """
    size = 1 if args.stream else args.batch_size
    for _, group in itertools.groupby(enumerate(questions), key=lambda entry: entry[1].sampling):
        alike = list(group)
        for start in range(0, len(alike), size):
            numbers, batch = zip(*alike[start : start + size], strict=True)
            places = [itertools.count() for _ in batch]
            pipeline.answer(
                [question.parts for question in batch],
                [args.seed] * len(batch),
                batch[0].sampling,
                on_part=lambda row, part, numbers=numbers, places=places: on_part(
                    numbers[row], next(places[row]), part
                ),
                on_token=on_token and (lambda row, token, numbers=numbers: on_token(numbers[row], token)),
            )


class TextStream:
    """What each further token adds to a text; a character comes once all of its bytes are there."""

    def __init__(self, pipeline: MultimodalPipeline):
        self.pipeline, self.ids, self.shown = pipeline, [], ""

    def add(self, token: int) -> str:
        """What a token adds."""
        self.ids.append(token)
        text = self.pipeline.text_of(Part("text", ids=self.ids))
        return "" if text.endswith("\ufffd") else self.rest(text)

    def rest(self, text: str) -> str:
        """What is new in the text so far."""
        new, self.shown = text.removeprefix(self.shown), text
        return new

    def end(self, text: str) -> str:
        """The rest of a complete text; the next token begins another one."""
        new = self.rest(text)
        self.ids, self.shown = [], ""
        return new
