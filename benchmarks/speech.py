"""Text to speech: a training step compared with Matcha-TTS's decoder, and text to waveform part by part.

    python benchmarks/speech.py
    python benchmarks/speech.py --checkpoint runs/audio_diffusion/demo --vocoder_checkpoint runs/vocoder/demo

A training step is forward and backward without an optimizer. Both sides get the same seconds of speech: ours as
latents of 20 channels at half the frame rate, Matcha-TTS's decoder as 80 log-mels. At equal parameters, "network" is
the flow's network alone; "whole" adds encoder, durations, expansion and prior, which Matcha-TTS has besides its
decoder, too.

Text to waveform speaks new sentences one at a time, with random weights unless checkpoints are given; phones then last
six mel frames.
"""

import dataclasses
import logging
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.speech import MatchaDecoder
from benchmarks.timing import cpu_seconds, interleave, report
from dataset_loading.embedded.sentences import SENTENCES
from model.audio.diffusion import AudioDiffusion
from model.audio.text_conditioning import duration_errors
from model.audio.unet1d import AudioCondition
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.text.phonemes import SpeechTokenizer
from utils.command_line import explained_errors, parse_arguments
from utils.generation.arguments.audio_diffusion import AudioSamplingArguments
from utils.generation.speech import SpeechPipeline
from utils.options import option

PHONE_FRAMES = 6  # mel frames of a phone where no trained model predicts them
# Widths of our levels (of `tiny`: 192 and 256), and Matcha-TTS's width, which as published is 256.
SIZES = {"tiny": ([208, 256], 136), "published": ([392, 512], 256)}


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    repeats: int = option(7, "interleaved repeats of each side, and of every sentence", gt=0)
    batch_size: int = option(8, "clips per training step", gt=0)
    frames: int = option(200, "mel frames of the longest clip, even", gt=0)
    n_steps: list[int] = option([2, 4, 8], "sampling steps of text to waveform; no value: none", gt=0)
    sentences: int = option(5, "new sentences that are spoken", gt=0, le=len(SENTENCES))
    checkpoint: str = option("", "run or checkpoint folder of text to speech; default: `tiny` with random weights")
    vocoder_checkpoint: str = option("", "that of a vocoder; default: `tiny` with random weights")
    threads: int = option(1, "CPU threads of torch", gt=0)

    def validate_frames(self):
        if self.frames % 2:
            raise ValueError(f"--frames={self.frames} must be even")


def randomised(model: nn.Module) -> nn.Module:
    """The model with noise on its weights: layers that start at zero are as slow as after training."""
    for parameter in model.parameters():
        parameter.data.add_(1e-3 * torch.randn_like(parameter))
    return model


# ---- Training steps.


def step_of(loss: Callable[[], Tensor], model: nn.Module, bf16: bool) -> Callable[[], None]:
    """Forward and backward of a loss."""

    def run() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()

    return run


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over valid frames."""
    return ((prediction.float() - target).square() * mask).sum() / mask.sum()


@dataclasses.dataclass
class Clips:
    """Random clips of speech.

    Args:
        text: tokens (B, T, 3), n_tokens (B,) and durations (B, T), as `AudioDiffusion.forward` takes them.
        n_latents: latent frames of each clip, (B,); `mask` (B, L) is True in them.
        time: (B,) in [0, 1].
        latents, target: (B, L, Z).
        frames: conditioning vectors of the network alone, (B, L, D + Z).
    """

    text: dict[str, Tensor]
    n_latents: Tensor
    mask: Tensor
    time: Tensor
    latents: Tensor
    target: Tensor
    frames: Tensor


def random_clips(args: BenchmarkArguments, model: AudioDiffusion) -> Clips:
    """Clips of like length: all their tokens last as long."""
    Z, D, B = model.config.latent_channels, model.config.frame_width, args.batch_size
    n_tokens = args.frames // PHONE_FRAMES - torch.randint(0, 4, (B,))
    is_token = torch.arange(int(n_tokens.max())) < n_tokens[:, None]
    durations = PHONE_FRAMES * is_token.long()
    tokens = torch.stack([torch.randint(4, 60, is_token.shape)] + [torch.zeros_like(durations)] * 2, dim=-1)
    n_latents = model.latent_frames(durations.sum(1))
    mask = torch.arange(int(n_latents.max())) < n_latents[:, None]
    time, latents, target = torch.rand(B), torch.randn(B, mask.shape[1], Z), torch.randn(B, mask.shape[1], Z)
    text = {"tokens": tokens, "n_tokens": n_tokens, "durations": durations}
    return Clips(text, n_latents, mask, time, latents, target, torch.randn(B, mask.shape[1], D + Z))


def whole_loss(model: AudioDiffusion, clips: Clips) -> Tensor:
    """The loss of the whole model: flow, prior and durations."""
    output = model(clips.latents, clips.time, clips.n_latents, **clips.text)
    mask = clips.mask[..., None]
    flow, prior = (masked_error(value, clips.target, mask) for value in (output.prediction, output.prior))
    durations, n_tokens = clips.text["durations"], clips.text["n_tokens"]
    return flow + prior + duration_errors(output.log_durations, durations, n_tokens).sum()


def training_steps(args: BenchmarkArguments, size: str, bf16: bool) -> dict[str, Callable[[], None]]:
    """Steps of our whole model, of its network, and of the peer."""
    widths, width = SIZES[size]
    ours, theirs = AudioDiffusion.from_preset("tiny", widths=widths), MatchaDecoder(width)
    n_parameters = {
        "ours, network": sum(p.numel() for p in ours.network.parameters()),
        "Matcha-TTS": sum(p.numel() for p in theirs.parameters()),
        "ours, whole": sum(p.numel() for p in ours.parameters()),
    }
    print(size, ", ".join(f"{name} {number:,}" for name, number in n_parameters.items()), "parameters")
    # The same seconds of speech on both sides, for the peer as log-mels (B, 80, F).
    clips = random_clips(args, ours)
    n_frames = clips.text["durations"].sum(1)
    mel_mask = (torch.arange(int(n_frames.max())) < n_frames[:, None])[:, None]
    mels, means, mel_target = (torch.randn(args.batch_size, 80, mel_mask.shape[-1]) for _ in range(3))

    def network() -> Tensor:
        condition = AudioCondition(clips.mask, clips.frames)
        return masked_error(
            ours.network(clips.latents, 1000 * clips.time, condition), clips.target, clips.mask[..., None]
        )

    def peer() -> Tensor:
        return masked_error(theirs(mels, means, mel_mask, clips.time), mel_target, mel_mask)

    losses = {
        "ours, network": (network, ours),
        "ours, whole": (lambda: whole_loss(ours, clips), ours),
        "Matcha-TTS": (peer, theirs),
    }
    return {name: step_of(loss, model.train(), bf16) for name, (loss, model) in losses.items()}


# ---- Text to waveform.


def load_pipeline(args: BenchmarkArguments) -> SpeechPipeline:
    """The pipeline of the checkpoints, or one with random weights."""
    if args.checkpoint:
        pipeline = SpeechPipeline.load(args.checkpoint, vocoder_checkpoint=args.vocoder_checkpoint)
        return pipeline
    tokenizer = SpeechTokenizer.fit(SENTENCES)
    fields = {"symbols": list(tokenizer.symbols), "n_symbols": len(tokenizer.symbols)}
    model = AudioDiffusion.from_preset("tiny", **fields, pause_symbols=tokenizer.pauses)
    models = [randomised(model).eval(), AudioVAE.from_preset("tiny").eval()]
    pipeline = SpeechPipeline(*models, tokenizer)
    pipeline.vocoder = randomised(Vocoder.from_preset("tiny")).eval()
    return pipeline


@torch.inference_mode()
def speak(pipeline: SpeechPipeline, text: str, n_steps: int, use_durations: bool) -> tuple[dict[str, float], float]:
    """CPU seconds of every part, and the seconds of sound."""
    spent, model, settings = {}, pipeline.model, AudioSamplingArguments(n_steps=n_steps)
    results: dict[str, object] = {}

    def part(name: str, function: Callable[[], object]) -> object:
        def run() -> None:
            results[name] = function()

        spent[name] = cpu_seconds(run)
        return results[name]

    def encode() -> tuple[AudioCondition, Tensor]:
        states = model.encode_speech(**inputs)
        durations = model.predicted_durations(states)
        if not use_durations:
            durations = PHONE_FRAMES * (states.mask & ~states.is_pause)
        return model.speech_condition(states, durations)[0], durations

    speaker = model.config.speakers[0] if model.config.speakers else ""
    inputs = part("text", lambda: pipeline.text_inputs([text], speaker=speaker))
    condition, durations = part("encoder", encode)
    n_frames = durations.sum(1)
    latents = part("flow", lambda: pipeline.sample(condition, [0], settings))
    (mel,) = part("VAE", lambda: pipeline.decode(latents, n_frames, [speaker]))
    part("vocoder", lambda: pipeline.vocode(mel))
    mel_settings = pipeline.vae.config.mel
    return spent, int(n_frames) * mel_settings.hop_length / mel_settings.sample_rate


def text_to_waveform(args: BenchmarkArguments) -> None:
    """Print CPU seconds per second of sound by part: the median of the repeats, over all sentences."""
    pipeline = load_pipeline(args)
    texts = SENTENCES[: args.sentences]
    rows: dict[int, list[list[tuple[dict[str, float], float]]]] = {n_steps: [] for n_steps in args.n_steps}
    for repeat in range(args.repeats + 1):
        for n_steps, repeats in rows.items():
            spoken = [speak(pipeline, text, n_steps, bool(args.checkpoint)) for text in texts]
            if repeat:  # The first is a warm-up.
                repeats.append(spoken)
    for n_steps, repeats in rows.items():
        seconds = sum(sound for _, sound in repeats[0])
        factors = {
            name: statistics.median(sum(parts[name] for parts, _ in spoken) / seconds for spoken in repeats)
            for name in repeats[0][0][0]
        }
        listed = ", ".join(f"{name} {factor:.4f}" for name, factor in factors.items())
        total = sum(factors.values())
        print(f"{n_steps} steps: {total:.4f} of real time ({listed}; {seconds:.1f} s of sound)", flush=True)


def main(args: BenchmarkArguments) -> None:
    """Compare training steps, then time text to waveform."""
    torch.manual_seed(0)
    for size in SIZES:
        for bf16 in (False, True):
            times = interleave(training_steps(args, size, bf16), args.repeats)
            report(f"{size}, {'bf16' if bf16 else 'fp32'} step", times, n_ours=2)
    if args.n_steps:
        text_to_waveform(args)


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    with explained_errors(logging.getLogger("benchmark")):
        main(arguments)
