"""Tab Speak: a text as speech, as by `inference/text_to_speech.py`; with a model of sounds, what a caption describes,
as by `inference/text_to_audio.py`."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.audio.configuration import AudioDiffusionConfig
from model.samplers import n_evaluations
from utils.app.audio import GRIFFIN_LIM, for_player, mel_of, mel_sheet, names_of_mel
from utils.app.commands import MAX_SEED, Command, command, real_number, whole_number
from utils.app.context import IMAGE_BUTTONS, Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.app.models import version_of
from utils.app.runs import Checkpoint
from utils.checkpoints import load_config, read_stage
from utils.drawing.alignment import MARKS, aligned_mel
from utils.drawing.audio import strip_sheet
from utils.drawing.images import Group
from utils.generation.arguments.audio_diffusion import TextToAudioArguments, TextToSpeechArguments
from utils.generation.captions import CaptionPipeline
from utils.generation.speech import SpeechPipeline, join_sentences

SPEECH, SOUNDS = "audio_diffusion", "captioned_sounds"  # kinds of models
MAX_STEPS = 100
MAX_CHARACTERS = 2000  # of a text
MAX_SCALE = 15
TEXT = "Please hold the line."
TABLE = ("token", "start in ms", "ms")


def check_length(text: str) -> None:
    """Raises: ValueError: more than the page allows."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"the text has {len(text)} characters, more than {MAX_CHARACTERS}; the command line takes more"
        )


def speech_settings(
    checkpoint: Path,
    vocoder: Path | None,
    text: str,
    *,
    seed: float | None,
    n_steps: float | None,
    temperature: float | None,
    speaker: str,
    language: str,
    speed: float | None,
) -> Command[TextToSpeechArguments]:
    """The call of the script that speaks; without steps there is no noise, and the temperature does not count.

    Raises: ValueError: as `utils.app.commands.command`, a field without a number, or more than the page allows.
    """
    check_length(text)
    steps = whole_number("n_steps", n_steps, MAX_STEPS)
    return command(
        "inference/text_to_speech.py",
        TextToSpeechArguments,
        checkpoint=str(checkpoint),
        vocoder_checkpoint=str(vocoder or ""),
        text=[text],
        seed=whole_number("seed", seed, MAX_SEED),
        n_steps=steps,
        temperature=real_number("temperature", temperature) if steps else None,
        speaker=speaker,
        language=language,
        speed=real_number("speed", speed),
    )


def sound_settings(
    checkpoint: Path,
    vocoder: Path | None,
    prompt: str,
    *,
    seed: float | None,
    n_steps: float | None,
    temperature: float | None,
    seconds: float | None,
    guidance_scale: float | None,
) -> Command[TextToAudioArguments]:
    """The call of the script that makes sounds. Raises: as `speech_settings`."""
    check_length(prompt)
    return command(
        "inference/text_to_audio.py",
        TextToAudioArguments,
        checkpoint=str(checkpoint),
        vocoder_checkpoint=str(vocoder or ""),
        prompts=[prompt],
        seed=whole_number("seed", seed, MAX_SEED),
        n_steps=whole_number("n_steps", n_steps, MAX_STEPS),
        temperature=real_number("temperature", temperature),
        seconds=real_number("seconds", seconds),
        guidance_scale=real_number("guidance_scale", guidance_scale),
    )


def speak(
    context: Context, report: Report, name: str, vocoder: str, text: str, *values: Any
) -> tuple[Any, Any, Any, str, str]:
    """Speak a text, or make the sound that it describes.

    Args:
        report: called with outputs on the way, see `utils.app.jobs.Jobs.attach`.
        name: of the checkpoint.
        vocoder: name of its checkpoint, or `GRIFFIN_LIM`.
        values: seed, n_steps and temperature; speaker, language and speed of speech; seconds and guidance_scale of
            sounds.
    Returns: the waveform, log-mels, durations of tokens, a line about them, and the command line.
    Raises: ValueError, OSError: no such checkpoint, or settings that the script refuses.
    """
    seed, n_steps, temperature, speaker, language, speed, seconds, guidance_scale = values
    checkpoint = context.runs.choose(name, SPEECH, SOUNDS)
    folder = None if vocoder == GRIFFIN_LIM else context.runs.choose(vocoder, "vocoder").folder
    paths, shared = (checkpoint.folder, folder), {"seed": seed, "n_steps": n_steps, "temperature": temperature}
    if checkpoint.kind == SPEECH:
        voice = {"speaker": speaker or "", "language": language or "", "speed": speed}
        call = speech_settings(*paths, text, **shared, **voice)
        pipeline_class, work = SpeechPipeline, say
    else:
        call = sound_settings(*paths, text, **shared, seconds=seconds, guidance_scale=guidance_scale)
        pipeline_class, work = CaptionPipeline, sound
    args = call.arguments
    report(UNCHANGED, UNCHANGED, UNCHANGED, f"loading {checkpoint.name}", str(call))
    pipeline = context.models.get(SPEECH, checkpoint.folder, lambda: pipeline_class.of_flags(args), version_of(folder))
    waveform, image, durations, summary = work(pipeline, report, args)
    rate, record = pipeline.vae.config.sample_rate, pipeline.record
    summary = f"{len(waveform) / rate:.2f} s of audio {summary}; weights {record['weights']}, {record['device']}"
    return for_player(waveform, rate), image, durations, summary, str(call)


def say(pipeline: SpeechPipeline, report: Report, args: TextToSpeechArguments) -> tuple[Tensor, Any, Any, str]:
    """Speak `args.text` sentence by sentence.

    Returns: the waveform (S,), log-mels, durations of tokens, and how long it took.
    """
    clock, clips, rows = Clock(), [], []
    sentences = pipeline.speakable(args.text[0], args.language, args.speaker)
    if not sentences:
        raise ValueError("nothing to say in the text: give letters or numbers")
    mel_settings, total, start = pipeline.vae.config.mel, n_evaluations(args.sampler, args.n_steps), 0.0
    hop = 1000 * mel_settings.hop_length / mel_settings.sample_rate  # ms of a mel frame
    for number, sentence in enumerate(sentences, start=1):
        place = f"sentence {number} of {len(sentences)}"
        show = functools.partial(show_step, report, clock, total, f"{place}, ")
        inputs = pipeline.text_inputs([sentence], speaker=args.speaker, language=args.language)
        latents, durations = pipeline.latents(inputs, [args.seed], args, speed=args.speed, on_estimate=show)
        (mel,) = pipeline.decode(latents, durations.sum(1), [args.speaker])
        report(UNCHANGED, UNCHANGED, UNCHANGED, f"{place}, vocoder, {clock.seconds()}", UNCHANGED)
        waveform, frames = pipeline.vocode(mel), durations[0].cpu()
        clips.append((sentence, mel, frames, waveform))
        rows += token_rows(pipeline.tokenizer.symbols, inputs["tokens"][0, :, 0], frames, start=start, hop=hop)
        start += len(waveform) / mel_settings.sample_rate * 1000 + args.pause * 1000
    longest = max(mel.shape[1] for _, mel, *_ in clips)
    groups = [
        Group([aligned_mel(mel, frames, mel_settings, max_frames=longest)], sentence)
        for sentence, mel, frames, _ in clips
    ]
    whole = join_sentences([waveform for *_, waveform in clips], args.pause, mel_settings.sample_rate)
    return whole, strip_sheet(groups, title=MARKS), rows, f"in {clock.seconds()}"


def sound(pipeline: CaptionPipeline, report: Report, args: TextToAudioArguments) -> tuple[Tensor, Any, Any, str]:
    """Make the sound of `args.prompts`; returns as `say`, without durations."""
    clock, total = Clock(), n_evaluations(args.sampler, args.n_steps)
    n_frames = torch.tensor([pipeline.frames_of(args.seconds)], device=pipeline.device)
    show = functools.partial(show_step, report, clock, total, "")
    latents = pipeline.latents(pipeline.text_inputs(args.prompts), n_frames, [args.seed], args, on_estimate=show)
    (mel,) = pipeline.decode(latents, n_frames)
    report(UNCHANGED, UNCHANGED, UNCHANGED, f"vocoder, {clock.seconds()}", UNCHANGED)
    waveform = pipeline.vocode(mel)
    return waveform, mel_sheet({args.prompts[0]: mel}, pipeline.vae.config.mel), [], f"in {clock.seconds()}"


def show_step(report: Report, clock: Clock, total: int, prefix: str, number: int, _: Tensor) -> None:
    """Report an evaluation of the sampler, which ends the job where it was cancelled."""
    report(UNCHANGED, UNCHANGED, UNCHANGED, prefix + clock.progress(number, total), UNCHANGED)


def token_rows(
    symbols: Sequence[str], tokens: Tensor, durations: Tensor, *, start: float, hop: float
) -> list[tuple[str, int, int]]:
    """Rows of `TABLE`: tokens that have a duration, with their start in the whole audio.

    Args:
        symbols: of the tokenizer.
        tokens: places in `symbols`, (T,).
        durations: mel frames, (T,).
        start: of the first token in ms.
        hop: ms of a mel frame.
    """
    rows, ends = [], durations.cumsum(0).tolist()
    for token, end, n_frames in zip(tokens.tolist(), ends, durations.tolist(), strict=True):
        if n_frames:
            rows.append((symbols[token], round(start + (end - n_frames) * hop), round(n_frames * hop)))
    return rows


def languages_of(checkpoint: Checkpoint) -> tuple[list[str], str | None]:
    """The languages that a model of speech knows, and its usual one; none where it knows only one."""
    tokenizer = read_stage(checkpoint.folder)["latents"].get("tokenizer") or {}
    languages = list(tokenizer.get("languages", []))
    return languages, tokenizer.get("language") if languages else None


def fitting(context: Context, name: str | None) -> dict[str, dict[str, Any]]:
    """What components offer for a checkpoint, by their names: arguments of theirs."""
    checkpoint = next((other for other in context.runs.checkpoints(SPEECH, SOUNDS) if other.name == name), None)
    is_speech = checkpoint is None or checkpoint.kind == SPEECH
    vocoders, speakers, languages, language = [], [], [], None
    # The job says what is wrong with a checkpoint.
    with contextlib.suppress(OSError, ValueError):
        if checkpoint is not None:
            vocoders = names_of_mel(context.runs, "vocoder", mel_of(checkpoint))
            speakers = load_config(AudioDiffusionConfig, checkpoint.folder).speakers
            languages, language = languages_of(checkpoint)
    defaults = TextToSpeechArguments() if is_speech else TextToAudioArguments()
    pipeline_class = SpeechPipeline if is_speech else CaptionPipeline
    return {
        "vocoder": {"choices": [*vocoders, GRIFFIN_LIM], "value": next(iter(vocoders), GRIFFIN_LIM)},
        "text": {"label": "text" if is_speech else "prompt of a model of sounds"},
        "n_steps": {"value": defaults.n_steps},
        "temperature": {"value": pipeline_class.default_temperature},
        "speaker": {"choices": speakers, "value": next(iter(speakers), None), "visible": len(speakers) > 1},
        "language": {"choices": languages, "value": language, "visible": len(languages) > 1},
        "speed": {"visible": is_speech},
        "seconds": {"visible": not is_speech},
        "guidance_scale": {"visible": not is_speech},
        "durations": {"visible": is_speech},
    }


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr = context.gr
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            checkpoint = context.choose_checkpoint(SPEECH, SOUNDS)
            offers = fitting(context, checkpoint.value)
            vocoder = gr.Dropdown(label="vocoder of the same log-mel", allow_custom_value=True, **offers["vocoder"])
            text = gr.Textbox(lines=3, max_lines=8, value=TEXT, **offers["text"])
            speaker = gr.Dropdown(label="speaker", allow_custom_value=True, **offers["speaker"])
            language = gr.Dropdown(label="language of the text", allow_custom_value=True, **offers["language"])
            speed = gr.Slider(0.25, 4, value=1, step=0.05, label="speed", **offers["speed"])
            label = "seconds; 0: the median of the training clips"
            seconds = gr.Number(label=label, value=0, **offers["seconds"])
            scale, label = TextToAudioArguments().guidance_scale, "guidance scale; 1: none"
            guidance = gr.Slider(0, MAX_SCALE, value=scale, step=0.1, label=label, **offers["guidance_scale"])
            seed = gr.Number(label="seed", value=0, precision=0)
            n_steps = gr.Slider(0, MAX_STEPS, step=1, label="steps; 0 for speech: the prior", **offers["n_steps"])
            temperature = gr.Slider(0.05, 2, step=0.05, label="temperature of the noise", **offers["temperature"])
            button, stop = context.buttons("Speak")
        with gr.Column(scale=2, min_width=320):
            player = gr.Audio(label="audio", format="wav", interactive=False, buttons=["download"])
            mel = gr.Image(label="log-mel", format="png", interactive=False, buttons=IMAGE_BUTTONS)
            label = "durations of tokens"
            durations = gr.Dataframe(headers=list(TABLE), label=label, interactive=False, **offers["durations"])
            status, line = context.status(), context.command()
    inputs = [checkpoint, vocoder, text, seed, n_steps, temperature, speaker, language, speed, seconds, guidance]
    work = functools.partial(speak, context)
    outputs = [player, mel, durations, status, line]
    context.jobs.attach(button, stop, work, inputs=inputs, outputs=outputs, status=status, api_name="speak")
    offered = [vocoder, text, n_steps, temperature, speaker, language, speed, seconds, guidance, durations]
    context.follow(checkpoint, functools.partial(fitting, context), offered)
