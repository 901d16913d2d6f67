"""Tab Voice: a recording beside its log-mel made audible again by a vocoder, an audio VAE with the vocoder, and
Griffin-Lim, as by `inference/vocode.py` and `inference/reconstruct_audio.py`.

M mel bins, F mel frames, S samples.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import analyse
from model.audio.vae import AudioVAEConfig
from utils.app.audio import GRIFFIN_LIM, for_player, mel_of, mel_sheet, names_of_mel
from utils.app.commands import Command, command
from utils.app.context import IMAGE_BUTTONS, Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.app.models import version_of
from utils.app.uploads import read_audio
from utils.checkpoints import load_config
from utils.generation.arguments.audio import ReconstructionArguments, VocodeArguments
from utils.generation.audio import AudioReconstructor, Synthesizer
from utils.metrics.audio import missing_packages, pesq_wb, stoi

KIND, VAE_KIND = "vocoder", "audio_vae"
SOURCES = ["upload", "microphone"]
NO_VAE = "none"  # The choice of no audio VAE.
RECORDING, VOCODER, WITH_VAE = "recording", "vocoder", "VAE and vocoder"
VERSIONS = (RECORDING, VOCODER, WITH_VAE, GRIFFIN_LIM)
# Of a waveform (S,) and the recording at one rate, where their packages are installed.
METRICS = {"pesq": ("PESQ", pesq_wb), "stoi": ("STOI", stoi)}


def vocode_settings(vocoder: Path, file: str | None) -> Command[VocodeArguments]:
    """The call of the script that vocodes.

    Args: file: the uploaded one, of which the call has the name alone.
    Raises: ValueError: no file.
    """
    if not file:
        raise ValueError("no file is given; drop a recording into the field")
    return command("inference/vocode.py", VocodeArguments, checkpoint=str(vocoder), input=[Path(file).name])


def reconstruction_settings(vocoder: Path, vae: Path, file: str, *, speaker: str) -> Command[ReconstructionArguments]:
    """The call of the script that reconstructs with the VAE and the vocoder."""
    return command(
        "inference/reconstruct_audio.py",
        ReconstructionArguments,
        vae_checkpoint=str(vae),
        vocoder_checkpoint=str(vocoder),
        input=[Path(file).name],
        speaker=speaker,
    )


def voice(
    context: Context, report: Report, name: str, vae_name: str, speaker: str | None, file: str | None
) -> tuple[Any, ...]:
    """Make a recording's log-mel audible again.

    Args:
        report: called with outputs on the way, see `utils.app.jobs.Jobs.attach`.
        name: of the vocoder's checkpoint.
        vae_name: of the audio VAE's, or `NO_VAE`.
        speaker: for a VAE that knows speakers.
        file: the uploaded recording.
    Returns: waveforms of `VERSIONS`, their log-mels, their distances from the recording, a line about them, and the
        command lines.
    Raises: ValueError, OSError: no such checkpoint, an upload that is refused, or models of two log-mels.
    """
    clock, folder = Clock(), context.runs.choose(name, KIND).folder
    call, second = vocode_settings(folder, file), None
    if vae_name != NO_VAE:
        vae = context.runs.choose(vae_name, VAE_KIND).folder
        second = reconstruction_settings(folder, vae, str(file), speaker=speaker or "")
    lines = "\n".join(str(each) for each in (call, second) if each)
    players: list[Any] = [UNCHANGED] * len(VERSIONS)
    report(*players, UNCHANGED, UNCHANGED, f"loading {name}", lines)
    synthesizer = context.models.get(KIND, folder, lambda: Synthesizer.load(str(folder), call.arguments))
    rate, mel_settings = synthesizer.rate, synthesizer.log_mel.settings
    recording = read_audio(file, context.args, rate).waveform
    mel = analyse(recording, synthesizer.log_mel)
    ways = ways_of(context, synthesizer, folder, second.arguments if second else None)
    # Waveforms are cut to the recording, as files are; log-mels are those of the whole, as those of the scripts.
    waveforms, mels, players = {}, {RECORDING: mel}, [for_player(recording, rate), None, None, None]
    for version, generate in ways.items():
        report(*players, mel_sheet(mels, mel_settings), UNCHANGED, f"{version}, {clock.seconds()}", UNCHANGED)
        waveform = generate(mel)
        mels[version] = analyse(waveform, synthesizer.log_mel)[:, : mel.shape[1]]
        waveforms[version] = waveform[: len(recording)]
        players[VERSIONS.index(version)] = for_player(waveforms[version], rate)
    rows = []
    for version, waveform in waveforms.items():
        status = f"distances of {version}, {clock.seconds()}"
        report(*players, mel_sheet(mels, mel_settings), rows, status, UNCHANGED)
        values = {"log-mel L1": (mels[version] - mel).abs().mean().item(), **scores(waveform, recording, rate)}
        rows.append([version, *("" if value is None else f"{value:.3f}" for value in values.values())])
    summary = f"{len(recording) / rate:.2f} s at {rate} Hz in {clock.seconds()}; {synthesizer.record['device']}"
    return *players, mel_sheet(mels, mel_settings), rows, summary, lines


def ways_of(
    context: Context, synthesizer: Synthesizer, vocoder: Path, args: ReconstructionArguments | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from a log-mel (M, F) to a waveform (F * hop_length,), by `VERSIONS`.

    Args:
        vocoder: the checkpoint of `synthesizer`.
        args: with the audio VAE, if there is one.
    Raises: ValueError, OSError: as `AudioReconstructor.load`.
    """
    device, mel_settings = synthesizer.vocoder.device, synthesizer.log_mel.settings
    ways: dict[str, Callable[[Tensor], Tensor]] = {VOCODER: synthesizer.waveform}
    if args is not None:
        # It is checked against the log-mel of the vocoder when it is loaded.
        load = functools.partial(AudioReconstructor.load, args.vae_checkpoint, args, synthesizer, speaker=args.speaker)
        version = (version_of(vocoder), args.speaker)
        reconstructor = context.models.get(VAE_KIND, Path(args.vae_checkpoint), load, version)
        ways[WITH_VAE] = lambda mel: synthesizer.waveform(reconstructor.reconstruction(mel))
    ways[GRIFFIN_LIM] = lambda mel: griffin_lim(mel[None].to(device), mel_settings)[0].cpu()
    return ways


def installed_metrics() -> dict[str, Callable[[Tensor, Tensor, int], float | None]]:
    """Those of `METRICS` whose packages are installed, by their names."""
    return {name: metric for key, (name, metric) in METRICS.items() if not missing_packages(key)}


def scores(generated: Tensor, recording: Tensor, rate: int) -> Mapping[str, float | None]:
    """The installed metrics of a waveform (S,) against the recording (S,); None where one is not defined."""
    return {name: metric(generated, recording, rate) for name, metric in installed_metrics().items()}


def fitting_vaes(context: Context, name: str | None) -> dict[str, dict[str, Any]]:
    """The audio VAEs of a vocoder's log-mel, as arguments of a dropdown."""
    names: list[str] = []
    for checkpoint in context.runs.checkpoints(KIND):
        if checkpoint.name == name:
            # The job says what is wrong with a checkpoint.
            with contextlib.suppress(OSError, ValueError):
                names = names_of_mel(context.runs, VAE_KIND, mel_of(checkpoint))
    return {"vae": {"choices": [*names, NO_VAE], "value": next(iter(names), NO_VAE)}}


def fitting_speakers(context: Context, name: str | None) -> dict[str, dict[str, Any]]:
    """The speakers of an audio VAE, as arguments of a dropdown."""
    speakers: list[str] = []
    for checkpoint in context.runs.checkpoints(VAE_KIND):
        if checkpoint.name == name:
            with contextlib.suppress(OSError, ValueError):
                speakers = load_config(AudioVAEConfig, checkpoint.folder).speakers
    return {"speaker": {"choices": speakers, "value": next(iter(speakers), None), "visible": bool(speakers)}}


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr = context.gr
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            vocoder = context.choose_checkpoint(KIND, label="vocoder")
            offers = fitting_vaes(context, vocoder.value)["vae"]
            vae = gr.Dropdown(label="audio VAE of the same log-mel", allow_custom_value=True, **offers)
            offers = fitting_speakers(context, vae.value)["speaker"]
            speaker = gr.Dropdown(label="speaker", allow_custom_value=True, **offers)
            file = gr.Audio(label="recording", type="filepath", sources=SOURCES, buttons=[])
            button, stop = context.buttons("Vocode")
        with gr.Column(scale=2, min_width=320):
            players = [
                gr.Audio(label=version, format="wav", interactive=False, buttons=["download"]) for version in VERSIONS
            ]
            mels = gr.Image(label="log-mels", format="png", interactive=False, buttons=IMAGE_BUTTONS)
            headers = ["", "log-mel L1", *installed_metrics()]
            table = gr.Dataframe(headers=headers, label="distance from the recording", interactive=False)
            status, line = context.status(), context.command()
    inputs, outputs = [vocoder, vae, speaker, file], [*players, mels, table, status, line]
    work = functools.partial(voice, context)
    context.jobs.attach(button, stop, work, inputs=inputs, outputs=outputs, status=status, api_name="voice")
    context.follow(vocoder, functools.partial(fitting_vaes, context), [vae])
    context.follow(vae, functools.partial(fitting_speakers, context), [speaker])
