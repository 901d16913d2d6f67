"""Prompts of text, images and audio from the command line, and their answers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from model.multimodal.layout import Part
from model.multimodal.stream_state import Sampling
from utils.flags.choices import SPANS, Modality
from utils.generation.arguments.multimodal import PromptArguments, StreamSamplingArguments, Task
from utils.generation.files import Failures
from utils.generation.multimodal import MultimodalPipeline
from utils.generation.speech import read_texts

ANSWERED: dict[Task, tuple[Modality | None, list[Modality]]] = {  # What an answer begins with, and what it may have.
    "draw": ("image", ["image"]),
    "speak": ("audio", ["audio"]),
    "describe": (None, ["text"]),
    "transcribe": (None, ["text"]),
}


def sampling_of(args: StreamSamplingArguments, begin: Modality | None, modalities: Sequence[Modality]) -> Sampling:
    """The flags as a model's `generate` takes them; those of modalities that an answer lacks are left out."""
    options: dict[str, dict[str, Any]] = {"sampler": {}, "n_steps": {}, "guidance_scale": {}}
    for name, values in options.items():
        given = {modality: getattr(args, f"{modality}_{name}") for modality in SPANS if modality in modalities}
        values |= {modality: value for modality, value in given.items() if value is not None}
    return Sampling(
        begin,
        modalities,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        length_temperature=args.temperature,
        n_thinking_steps=args.thinking_steps or None,
        n_carried_steps=args.carried_steps or None,
        **options,
    )


class Question(NamedTuple):
    """What is asked: the text or file that names it, its parts, and how it is answered."""

    name: str
    parts: list[Part]
    sampling: Sampling


def read_questions(pipeline: MultimodalPipeline, args: PromptArguments) -> tuple[list[Question], Failures]:
    """The prompts of all flags, and those that cannot be answered: their file cannot be read, their text is empty, or
    the model lacks a modality.

    Raises: OSError, ValueError: `--input` cannot be read, or no prompt can be answered.
    """
    readers: dict[Task, Any] = {"draw": pipeline.read_text, "speak": pipeline.read_text}
    readers |= {"describe": pipeline.read_image, "transcribe": pipeline.read_audio, "prompts": pipeline.read_prompt}
    lines, questions, failures = read_texts(args.input), [], Failures()
    for task, read in readers.items():
        sampling = sampling_of(args, *ANSWERED.get(task, (None, pipeline.model.config.modalities)))
        for name in [*getattr(args, task), *(lines if task == args.input_task else [])]:
            with failures.around(name):
                parts = read(name)
                questions.append(Question(name, parts if isinstance(parts, list) else [parts], sampling))
    if not questions:
        failures.check(len(failures.reasons))
    return questions, failures


def answer_questions(
    pipeline: MultimodalPipeline,
    questions: Sequence[Question],
    args: PromptArguments,
    *,
    on_part: Callable[[int, int, Part], None],
    on_token: Callable[[int, int], None] | None = None,
    on_estimate: Callable[[Modality, int, list[Part]], None] | None = None,
) -> None:
    """Answer questions, in batches of those that are answered in the same way.

    Args:
        on_part: called with the number of the question, that of the part within its answer, and the part.
        on_token: called with the number of the question and each token of its text.
        on_estimate: of the spans of a batch, see the model's `generate`.
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
                on_estimate=on_estimate,
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
