"""Tab Chat: text, an image and a recording in, text, images and audio out; the answer of `inference/chat.py` with the
same flags."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from model.multimodal.layout import Part
from model.multimodal.stream_state import Sampling
from model.samplers import n_evaluations
from utils.app.arguments import AppArguments
from utils.app.audio import GRIFFIN_LIM, for_player, mel_of, names_of_mel
from utils.app.commands import MAX_SEED, Command, command, real_number, whole_number
from utils.app.context import Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.app.models import version_of
from utils.app.uploads import read_audio, read_image
from utils.checkpoints import chosen_weights
from utils.devices import compute_device
from utils.drawing.images import to_image
from utils.flags.choices import SPANS, Modality, SamplerKind
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
MOST = {"max_new_tokens": 1000, "seed": MAX_SEED, "thinking_steps": 64, "carried_steps": 64}
FIELDS = ("max_new_tokens", "temperature", "seed", "thinking_steps", "carried_steps")
OWN = "the model's own"
MAX_STEPS = {"image": 250, "audio": 100}
# Fields of each of `SPANS`, with the values that leave them to the model.
SPAN_FIELDS = {"sampler": OWN, "n_steps": 0, "guidance_scale": -1}
MAX_SPANS = Sampling.max_spans  # images and clips of an answer
N_PREVIEWS = 4  # Estimates of an image that are decoded on the way.


def settings(
    checkpoint: Path,
    choice: str,
    text: str,
    image: str | None,
    recording: str | None,
    *,
    vocoder: Path | None = None,
    spans: Sequence[Any] = (),
    **values: float | None,
) -> Command[ChatArguments]:
    """The call of the script for a tab's settings.

    Args:
        choice: of `CHOICES`.
        image, recording: uploaded files, of which the call has the names alone.
        vocoder: its checkpoint; None: Griffin-Lim.
        spans: values of `SPAN_FIELDS` of images, then of audio; those of what the answer cannot have do not count.
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
    _, modalities = ANSWERED.get(task, (None, list(SPANS)))
    flags |= span_flags(modalities, spans)
    if vocoder and "audio" in modalities:
        flags["vocoder_checkpoint"] = str(vocoder)
    flags[task] = [prompt[task]]
    return command("inference/chat.py", ChatArguments, checkpoint=str(checkpoint), **flags)


def span_flags(modalities: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Flags of how images and audio are sampled.

    Args:
        modalities: that an answer may have.
        values: of `SPAN_FIELDS` of images, then of audio.
    Raises: ValueError: a field without a number, or more steps than the page allows.
    """
    flags: dict[str, Any] = {}
    pairs = [(modality, name) for modality in SPANS for name in SPAN_FIELDS]
    for (modality, name), value in zip(pairs, values):
        if modality not in modalities or value == SPAN_FIELDS[name]:
            continue
        flag = f"{modality}_{name}"
        if name == "n_steps":
            value = whole_number(flag, value, MAX_STEPS[modality])
        elif name == "guidance_scale":
            value = real_number(flag, value)
        flags[flag] = value
    return flags


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
        inputs: text, image and recording, values of `FIELDS`, the name of the vocoder's checkpoint or `GRIFFIN_LIM`,
            and `spans` of `settings`.
    Returns: as `Shown.outputs`.
    Raises: ValueError, OSError: no such checkpoint, uploads that are refused, or settings that the script or the model
        refuses.
    """
    (text, image, recording), values, (vocoder, *spans) = (
        inputs[:3],
        inputs[3 : 3 + len(FIELDS)],
        inputs[3 + len(FIELDS) :],
    )
    checkpoint = context.runs.choose(name, KIND)
    folder = None if vocoder == GRIFFIN_LIM else context.runs.choose(vocoder, "vocoder").folder
    options = {**dict(zip(FIELDS, values, strict=True)), "vocoder": folder, "spans": spans}
    call = settings(checkpoint.folder, choice, text, image, recording, **options)
    args, task, shown = call.arguments, CHOICES[choice], Shown(context.gr, report, str(call))
    shown.show(f"loading {checkpoint.name}", text=True, images=[], clips=True)
    weights, device = chosen_weights(checkpoint.folder, args), compute_device()
    # It is loaded with the vocoder whatever is answered, so that the next answer need not load it again.
    load = functools.partial(
        MultimodalPipeline.load,
        checkpoint.folder,
        vocoder_checkpoint=str(folder or ""),
        weights=weights,
        device=device,
    )
    pipeline = context.models.get(KIND, checkpoint.folder, load, version_of(folder))
    shown.show("reading the prompt")
    parts = read_parts(pipeline, context.args, text.strip() if task == FREE else text, image, recording)
    sampling = sampling_of(args, *ANSWERED.get(task, (None, pipeline.model.config.modalities)))
    stream, clock = TextStream(pipeline), Clock()

    def show_token(number: int, token: int) -> None:
        shown.growing += stream.add(token)
        shown.show(f"text, {clock.progress(len(stream.ids), args.max_new_tokens, 'token')}", text=True)

    def show_estimate(modality: Modality, number: int, spans: list[Part]) -> None:
        total = n_steps_of(pipeline, args, modality)
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


def n_steps_of(pipeline: MultimodalPipeline, args: ChatArguments, modality: Modality) -> int:
    """Evaluations of the denoiser for a span."""
    config = pipeline.model.config
    sampler = getattr(args, f"{modality}_sampler") or getattr(config, f"{modality}_sampler")
    return n_evaluations(
        sampler, getattr(args, f"{modality}_n_steps") or getattr(config, f"{modality}_n_sampling_steps")
    )


def fitting_vocoders(context: Context, name: str | None) -> dict[str, dict[str, Any]]:
    """The vocoders of the log-mel that a model makes, as arguments of a dropdown."""
    names: list[str] = []
    for checkpoint in context.runs.checkpoints(KIND):
        if checkpoint.name == name:
            # The job says what is wrong with a checkpoint; one without audio has no log-mel.
            with contextlib.suppress(OSError, ValueError, KeyError):
                names = names_of_mel(context.runs, "vocoder", mel_of(checkpoint))
    return {"vocoder": {"choices": [*names, GRIFFIN_LIM], "value": next(iter(names), GRIFFIN_LIM)}}


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


def span_fields(context: Context, modality: str) -> list[Any]:
    """Components of `SPAN_FIELDS` of images or of audio, which leave them to the model at first."""
    gr, own = context.gr, SPAN_FIELDS
    sampler = gr.Dropdown([OWN, *get_args(SamplerKind)], value=own["sampler"], label=f"sampler of {modality}")
    with gr.Row():
        label = f"steps of {modality}; {own['n_steps']}: {OWN}"
        n_steps = gr.Number(value=own["n_steps"], label=label, precision=0, min_width=140)
        label = f"guidance scale; {own['guidance_scale']}: {OWN}"
        return [sampler, n_steps, gr.Number(value=own["guidance_scale"], label=label, min_width=140)]


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr, defaults = context.gr, ChatArguments()
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
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
            offers = fitting_vocoders(context, checkpoint.value)["vocoder"]
            vocoder = gr.Dropdown(label="vocoder of the same log-mel", allow_custom_value=True, **offers)
            with gr.Accordion("samplers of images and audio", open=False):
                spans = [component for modality in SPANS for component in span_fields(context, modality)]
            with gr.Accordion("recurrent models", open=False):
                label = "thinking steps per token; 0: the model's own"
                n_steps = gr.Slider(0, MOST["thinking_steps"], value=defaults.thinking_steps, step=1, label=label)
                label = "thinking steps in a sampler's steps after the first; 0: each begins anew"
                carried = gr.Slider(0, MOST["carried_steps"], value=defaults.carried_steps, step=1, label=label)
            button, stop = context.buttons("Answer")
        with gr.Column(scale=2, min_width=320):
            answer = gr.Textbox(label="text", lines=4, max_lines=16, interactive=False, buttons=["copy"])
            gallery = gr.Gallery(label="images", columns=2, format="png", object_fit="contain", height="auto")
            players = [
                gr.Audio(label=f"clip {number}", format="wav", interactive=False, visible=False)
                for number in range(1, MAX_SPANS + 1)
            ]
            status, line = context.status(), context.command()
    inputs = [checkpoint, choice, text, *files, n_new, temperature, seed, n_steps, carried, vocoder, *spans]
    outputs = [answer, gallery, *players, status, line]
    work = functools.partial(chat, context)
    context.jobs.attach(button, stop, work, inputs=inputs, outputs=outputs, status=status, api_name="chat")
    context.follow(checkpoint, functools.partial(fitting_vocoders, context), [vocoder])
