"""Tab Chat: text, an image and a recording in, text, images and audio out; the answer of `inference/chat.py` with the
same flags."""

import functools
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from model.multimodal.layout import Part
from model.multimodal.stream_state import Sampling
from model.samplers import n_evaluations
from utils.app.arguments import AppArguments
from utils.app.audio import for_player
from utils.app.commands import MAX_SEED, Command, command, real_number, whole_number
from utils.app.context import Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.app.uploads import read_audio, read_image
from utils.checkpoints import chosen_weights
from utils.devices import compute_device
from utils.drawing.images import to_image
from utils.flags.choices import Modality
from utils.generation.arguments.multimodal import ChatArguments, Task
from utils.generation.chat import ANSWERED, Question, TextStream, answer_questions, sampling_of
from utils.generation.files import check_unicode
from utils.generation.multimodal import OTHER_PLACEHOLDER, PLACEHOLDER, MultimodalPipeline

KIND = "multimodal"
FREE: Task = "prompts"
# The choices of what is answered with, and the fields that each of them takes.
CHOICES: dict[str, Task] = {"the model chooses": FREE, **{task: task for task in get_args(Task) if task != FREE}}
TAKES = {"draw": "text", "speak": "text", "describe": "image", "transcribe": "recording"}
MAX_CHARACTERS = 2000  # of a text
MOST = {"max_new_tokens": 1000, "seed": MAX_SEED, "thinking_steps": 64}
FIELDS = ("max_new_tokens", "temperature", "seed", "thinking_steps")
MAX_SPANS = Sampling.max_spans  # images and clips of an answer
N_PREVIEWS = 4  # Estimates of an image that are decoded on the way.


def settings(
    checkpoint: Path, choice: str, text: str, image: str | None, recording: str | None, **values: float | None
) -> Command[ChatArguments]:
    """The call of the script for a tab's settings.

    Args:
        choice: of `CHOICES`.
        image, recording: uploaded files, of which the call has the names alone.
        values: of `FIELDS`.
    Raises: ValueError: as `utils.app.commands.command`, a field without a number, more than the page allows, or
        inputs that do not fit the choice.
    """
    if choice not in CHOICES:
        raise ValueError(f"{choice!r} is none of {', '.join(CHOICES)}")
    task = CHOICES[choice]
    check_inputs(task, text, image, recording)
    prompt = {"draw": text, "speak": text, "describe": name_of(image), "transcribe": name_of(recording)}
    prompt[FREE] = placeholders(text, image, recording)
    flags: dict[str, Any] = {
        name: whole_number(name, value, MOST[name]) if name in MOST else real_number(name, value)
        for name, value in values.items()
    }
    flags[task] = [prompt[task]]
    return command("inference/chat.py", ChatArguments, checkpoint=str(checkpoint), **flags)


def check_inputs(task: Task, text: str, image: str | None, recording: str | None) -> None:
    """Raises: ValueError: a field that the answer needs is empty, or one that it cannot use is not; a text that is too
    long, no UTF-8, or would read a file of this machine."""
    given = {"text": bool(text.strip()), "image": bool(image), "recording": bool(recording)}
    if task == FREE:
        if not any(given.values()):
            raise ValueError(f"the prompt is empty; give {', '.join(given)}, or several of them")
    else:
        if not given[TAKES[task]]:
            raise ValueError(f"{task} needs {TAKES[task]}, and the field is empty")
        if others := [name for name, is_given in given.items() if is_given and name != TAKES[task]]:
            raise ValueError(
                f"{task} takes {TAKES[task]} alone; empty the field of {' and of '.join(others)}, or let the model "
                "choose"
            )
    whole_number("characters of the text", len(text), MAX_CHARACTERS)
    check_unicode(text)
    found = PLACEHOLDER.search(text) or OTHER_PLACEHOLDER.search(text)
    if task == FREE and found:
        raise ValueError(f"{found[0]!r} in the text: drop the file into its field")


def name_of(file: str | None) -> str:
    """The name of an uploaded file."""
    return Path(file).name if file else ""


def placeholders(text: str, image: str | None, recording: str | None) -> str:
    """The prompt of a free answer as the script takes it."""
    files = {"image": image, "audio": recording}
    return " ".join([*(f"<{kind}:{name_of(file)}>" for kind, file in files.items() if file), text]).strip()


@torch.inference_mode()
def chat(context: Context, report: Report, name: str, choice: str, *inputs: Any) -> list[Any]:
    """Answer a prompt.

    Args:
        report: called with outputs on the way, see `utils.app.jobs.Jobs.attach`.
        name: of the checkpoint.
        choice: of `CHOICES`.
        inputs: text, image and recording, and values of `FIELDS`.
    Returns: as `Shown.outputs`.
    Raises: ValueError, OSError: no such checkpoint, uploads that are refused, or settings that the script or the model
        refuses.
    """
    (text, image, recording), values = inputs[:3], inputs[3:]
    checkpoint = context.runs.choose(name, KIND)
    call = settings(checkpoint.folder, choice, text, image, recording, **dict(zip(FIELDS, values, strict=True)))
    args, task, shown = call.arguments, CHOICES[choice], Shown(context.gr, report, str(call))
    shown.show(f"loading {checkpoint.name}", text=True, images=[], clips=True)
    weights, device = chosen_weights(checkpoint.folder, args), compute_device()
    load = functools.partial(MultimodalPipeline.load, checkpoint.folder, weights=weights, device=device)
    pipeline = context.models.get(KIND, checkpoint.folder, load)
    shown.show("reading the prompt")
    parts = read_parts(pipeline, context.args, text.strip() if task == FREE else text, image, recording)
    sampling = sampling_of(args, *ANSWERED.get(task, (None, pipeline.model.config.modalities)))
    stream, clock = TextStream(pipeline), Clock()

    def show_token(number: int, token: int) -> None:
        shown.growing += stream.add(token)
        shown.show(f"text, {clock.progress(len(stream.ids), args.max_new_tokens, 'token')}", text=True)

    def show_estimate(modality: Modality, number: int, spans: list[Part]) -> None:
        total = n_steps_of(pipeline, modality)
        is_drawn = modality == "image" and number < total and (number - 1) % -(-total // N_PREVIEWS) == 0
        images = [*shown.images, to_image(pipeline.image_of(spans[0]))] if is_drawn else None
        shown.show(f"{modality}, {clock.progress(number, total, 'evaluation')}", images=images)

    def show_part(number: int, place: int, part: Part) -> None:
        if part.modality == "image":
            shown.images.append(to_image(pipeline.image_of(part)))
        elif part.modality == "audio":
            shown.clips.append(for_player(*pipeline.sound_of(part)))
        else:
            shown.texts.append(pipeline.text_of(part))
            stream.ids, stream.shown, shown.growing = [], "", ""
        kinds = {"text": part.modality == "text", "clips": part.modality == "audio"}
        shown.show(clock.seconds(), **kinds, images=shown.images if part.modality == "image" else None)

    question = Question("", parts, sampling)
    answer_questions(pipeline, [question], args, on_part=show_part, on_token=show_token, on_estimate=show_estimate)
    summary = f"{shown.summary()} in {clock.seconds()}; weights {weights}, {device}"
    return shown.outputs(summary, text=True, images=shown.images, clips=True)


def read_parts(
    pipeline: MultimodalPipeline, limits: AppArguments, text: str, image: str | None, recording: str | None
) -> list[Part]:
    """A prompt as the model takes it: the image, the recording, then the text.

    Raises: ValueError, OSError: an upload is refused, or the model lacks a modality.
    """
    parts = []
    if image:
        pipeline.check_modality("image", name_of(image))
        parts.append(pipeline.fitted_image_part(read_image(image, limits)))
    if recording:
        pipeline.check_modality("audio", name_of(recording))
        assert pipeline.audio is not None
        waveform = read_audio(recording, limits, pipeline.audio.vae.config.sample_rate).waveform
        parts.append(pipeline.waveform_part(waveform, name_of(recording)))
    return [*parts, pipeline.text_part(text)] if text.strip() else parts


def n_steps_of(pipeline: MultimodalPipeline, modality: Modality) -> int:
    """Evaluations of the denoiser for a span, with the model's own sampler."""
    config = pipeline.model.config
    return n_evaluations(getattr(config, f"{modality}_sampler"), getattr(config, f"{modality}_n_sampling_steps"))


class Shown:
    """An answer as far as it has come, and the outputs that show it.

    Args: line: the command line.
    Attributes:
        texts, images, clips: parts of the answer that are complete.
        growing: the text at work.
    """

    def __init__(self, gr: Any, report: Report, line: str):
        self.gr, self.report, self.line = gr, report, line
        self.texts: list[str] = []
        self.images: list[Image.Image] = []
        self.clips: list[Any] = []
        self.growing = ""

    def show(self, status: str, **changed: Any) -> None:
        """Report `outputs`."""
        self.report(*self.outputs(status, **changed))

    def outputs(self, status: str, *, text: bool = False, images: list[Any] | None = None, clips: bool = False) -> Any:
        """Text, images, a player per clip, a line that says how far it is, and the command line.

        Args: text, images, clips: those that have changed; the others stay as they are shown.
        """
        words = "\n\n".join([*self.texts, *([self.growing] if self.growing else [])])
        players = [UNCHANGED] * MAX_SPANS
        if clips:
            values = [*self.clips, *[None] * (MAX_SPANS - len(self.clips))]
            players = [self.gr.update(value=clip, visible=clip is not None) for clip in values]
        gallery = UNCHANGED if images is None else list(images)
        return [words if text else UNCHANGED, gallery, *players, status, self.line]

    def summary(self) -> str:
        """Such as "2 texts, 1 image"."""
        counts = {"text": len(self.texts), "image": len(self.images), "clip": len(self.clips)}
        words = [f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n]
        return ", ".join(words) or "an empty answer"


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr, defaults = context.gr, ChatArguments()
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            checkpoint = context.choose_checkpoint(KIND)
            choice = gr.Radio(list(CHOICES), value=next(iter(CHOICES)), label="answer with")
            text = gr.Textbox(label="text", lines=2, max_lines=8)
            with gr.Row():
                files = [gr.File(label=name, type="filepath") for name in ("image", "recording")]
            n_new = gr.Slider(
                1, MOST["max_new_tokens"], value=defaults.max_new_tokens, step=1, label="new text tokens"
            )
            label = "temperature of text and of the length of audio; 0: the most probable"
            temperature = gr.Slider(0, 2, value=defaults.temperature, step=0.05, label=label)
            seed = gr.Number(label="seed", value=defaults.seed, precision=0)
            label = "recurrent models: thinking steps per token; 0: the model's own"
            n_steps = gr.Slider(0, MOST["thinking_steps"], value=defaults.thinking_steps, step=1, label=label)
            button, stop = context.buttons("Answer")
        with gr.Column(scale=2, min_width=320):
            answer = gr.Textbox(label="text", lines=4, max_lines=16, interactive=False, buttons=["copy"])
            gallery = gr.Gallery(label="images", columns=2, format="png", object_fit="contain", height="auto")
            players = [
                gr.Audio(label=f"clip {number}", format="wav", interactive=False, visible=False)
                for number in range(1, MAX_SPANS + 1)
            ]
            status, line = context.status(), context.command()
    inputs = [checkpoint, choice, text, *files, n_new, temperature, seed, n_steps]
    outputs = [answer, gallery, *players, status, line]
    work = functools.partial(chat, context)
    context.jobs.attach(button, stop, work, inputs=inputs, outputs=outputs, status=status, api_name="chat")
