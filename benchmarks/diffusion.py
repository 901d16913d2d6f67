"""Image diffusion compared with diffusers' UNet2DConditionModel: CPU seconds, interleaved in one process.

    python benchmarks/diffusion.py                  # training step, memory, cached latents, 20 steps of sampling

Both sides have 18 million parameters, latents of 4x16x16, and captions of 32 embeddings of width 256. Memory is the
peak of a separate process that runs two training steps.
"""

import dataclasses
import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import interleave, report
from model.diffusion_process import DiffusionProcess
from model.image.diffusion import ImageDiffusion
from model.image.vae import ImageVAE
from model.samplers import guided_denoiser, initial_noise, sample
from utils.command_line import explained_errors, parse_arguments
from utils.options import option

LATENT_SHAPE = (4, 16, 16)  # of an image of 128 px with a VAE of compression 8
N_TOKENS, TEXT_WIDTH = 32, 256  # of captions
OURS, THEIRS = "ours", "diffusers"


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    repeats: int = option(5, "interleaved repeats of each side", gt=0)
    batch_size: int = option(16, "latents per training step", gt=0)
    n_steps: int = option(20, "sampling steps; 0: no sampling", ge=0)
    memory_of: Literal["", "ours", "diffusers"] = option(
        "", "measure only the peak memory of two training steps of one side"
    )
    threads: int = option(1, "CPU threads", gt=0)


def build(name: str) -> nn.Module:
    """One side; 18.2 M parameters ours, 18.15 M theirs."""
    if name == OURS:
        return ImageDiffusion.from_preset("small", text_encoder="frozen", text_embedding_width=TEXT_WIDTH)
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def predict(model: nn.Module, latents: Tensor, time: Tensor, *, states: Tensor, mask: Tensor) -> Tensor:
    """The prediction of either side.

    Args:
        latents: (B, 4, 16, 16).
        time: (B,) in [0, 1].
        states, mask: embeddings of the captions (B, T, E), and which of them are tokens (B, T).
    """
    if isinstance(model, ImageDiffusion):
        return model(latents, time, text_states=states, mask=mask).prediction
    # diffusers counts times from 0 to 1000.
    return model(latents, 1000 * time, states, encoder_attention_mask=mask).sample


def training_step(
    model: nn.Module, batch_size: int, bf16: bool = False, *, device: torch.device | str = "cpu"
) -> Callable[[], None]:
    """Forward and backward of a velocity loss on fixed random numbers."""
    # Latents, times and captions of different lengths.
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(batch_size, *LATENT_SHAPE, generator=generator) for _ in range(2))
    time, states = torch.rand(batch_size, generator=generator), torch.randn(batch_size, N_TOKENS, TEXT_WIDTH)
    mask = torch.arange(N_TOKENS) < torch.randint(8, N_TOKENS + 1, (batch_size, 1), generator=generator)
    # The default process: rectified flow, whose target is the velocity.
    process = DiffusionProcess()
    latents, target = process.add_noise(x0, noise, time), process.target(x0, noise, time)
    latents, target, time, states, mask = (tensor.to(device) for tensor in (latents, target, time, states, mask))

    def run() -> None:
        model.zero_grad()
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=bf16):
            prediction = predict(model, latents, time, states=states, mask=mask)
        (prediction.float() - target).square().mean().backward()

    return run


def speed(args: BenchmarkArguments) -> None:
    """Compare training steps in fp32 and under bf16 autocast."""
    models = {name: build(name) for name in (OURS, THEIRS)}
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    for bf16 in (False, True):
        sides = {name: training_step(model, args.batch_size, bf16) for name, model in models.items()}
        report(f"{'bf16' if bf16 else 'fp32'} forward+backward", interleave(sides, args.repeats))


def memory(args: BenchmarkArguments) -> None:
    """Peak resident memory of two training steps, each side in its own process: in total, and above the imports.

    With a fixed threshold, glibc returns larger blocks to the system when they are freed. Its default threshold is
    dynamic, and fragmentation then makes the peak vary by tens of MB between runs.
    """
    peaks, environment = {}, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    for name in (OURS, THEIRS):
        command = [sys.executable, __file__, "--memory_of", name, "--batch_size", str(args.batch_size)]
        process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        imported, peak = (float(word) for word in process.stdout.split()[-2:])
        peaks[name] = peak, peak - imported
        print(f"{'memory':28} {name:10} peak {peak:.0f} MB, {peak - imported:.0f} MB above the imports")
    total, above = (ours / theirs for ours, theirs in zip(*peaks.values()))
    print(f"{'memory':28} {OURS} / {THEIRS} = {total:.3f}, above the imports {above:.3f}", flush=True)


def peak_memory() -> float:
    """Peak memory of this process in MB (getrusage would start at the peak of the parent process)."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


def memory_of(name: str, batch_size: int) -> None:
    """Print the peak memory of this process in MB after the imports, and after two training steps of one side."""
    if name == THEIRS:
        # Imports are part of both measurements, otherwise they would count as memory of the steps.
        importlib.import_module("diffusers.models.unets.unet_2d_condition")
    imported = peak_memory()
    run = training_step(build(name), batch_size)
    run()
    run()
    print(imported, peak_memory())


def sampling(args: BenchmarkArguments) -> None:
    """Time Euler steps with a batch of 4, with guidance 3 and without."""
    model, process = build(OURS).eval(), DiffusionProcess()
    # The same noise and captions for both.
    condition = model.encode_text(text_states=torch.randn(4, N_TOKENS, TEXT_WIDTH))
    times = process.sampling_times(args.n_steps)
    noise = initial_noise(LATENT_SHAPE, [torch.Generator().manual_seed(seed) for seed in range(4)], process)

    def side(scale: float) -> Callable[[], None]:
        null = model.null_condition(4)
        denoiser = guided_denoiser(process, model.network, condition, null_condition=null, scale=scale)

        def run() -> None:
            sample("euler", denoiser, noise, process=process, times=times)

        return run

    with torch.no_grad():
        times_by_side = interleave({"guided": side(3.0), "unguided": side(1.0)}, args.repeats)
    report(f"{args.n_steps} steps of 4", times_by_side)


def cached_latents(args: BenchmarkArguments) -> None:
    """Time a training step of `tiny` on cached latents of 64 px images, and the same step with the VAE's encoder."""
    for preset, channels in (("tiny", 16), ("small", 16), ("medium", 16), ("ldm", 4)):
        vae = ImageVAE.from_preset(preset, image_size=64).eval()
        model = ImageDiffusion.from_preset("tiny", latent_channels=channels)
        image, time = torch.rand(args.batch_size, 3, 64, 64) * 2 - 1, torch.rand(args.batch_size)
        tokens = torch.randint(2, 258, (args.batch_size, N_TOKENS))
        with torch.no_grad():
            cached = vae.encode(image)[0]

        # A training step as in the stage: noise, prediction with dropped captions, loss.
        def step(latents: Tensor, *, model=model, time=time, tokens=tokens) -> None:
            model.zero_grad()
            noise = torch.randn_like(latents)
            noisy = model.process.add_noise(latents, noise, time)
            prediction = model(noisy, time, tokens=tokens, drop=time < 0.1).prediction
            (prediction - model.process.target(latents, noise, time)).square().mean().backward()

        # Without a cache the encoder runs in every step, without gradient.
        def encode_and_step(vae=vae, image=image, step=step) -> None:
            with torch.no_grad():
                latents = vae.encode(image)[0]
            step(latents)

        sides = {"encoding": encode_and_step, "cached": lambda step=step, cached=cached: step(cached)}
        report(f"VAE {preset}, UNet tiny", interleave(sides, args.repeats))


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    with explained_errors(logging.getLogger("benchmark")):
        if arguments.memory_of:
            memory_of(arguments.memory_of, arguments.batch_size)
        else:
            print(
                f"torch {torch.__version__}, {arguments.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}"
            )
            speed(arguments)
            memory(arguments)
            cached_latents(arguments)
            if arguments.n_steps:
                sampling(arguments)
