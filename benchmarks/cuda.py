"""Every model compared with its peer on an NVIDIA GPU: rates, peak memory, share of the GPU's peak.

    python benchmarks/cuda.py --part image_vae --output runs/benchmark/image_vae.json
    python benchmarks/cuda.py --part image_diffusion | vocoder | audio_vae | transformer

Each part takes one to three minutes and writes its rows as JSON. Steps are forward and backward under bf16 autocast
unless a row says otherwise; those of the vocoder are whole adversarial steps of generator and discriminator. Rows
`compiled` use torch.compile on both sides, `deterministic` ones deterministic kernels. Times are medians of
synchronised repeats.
"""

import dataclasses
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import audio_vae, diffusion, image_vae, vocoder
from benchmarks.transformer import LARGE, compile_blocks, training_operations, training_step
from benchmarks.transformer_peers import SIDES
from benchmarks.vocoder_peers import Vocos, VocosRecipe
from model.audio.spectral import mel_preset
from model.audio.vae import AudioVAE
from model.image.vae import ImageVAE
from utils.checkpoints import write_json
from utils.command_line import explained_errors, parse_arguments
from utils.devices import set_fp32_precision
from utils.options import option

DEVICE = torch.device("cuda")


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    part: Literal["image_vae", "image_diffusion", "vocoder", "audio_vae", "transformer"] = option(
        "image_vae", "part that is compared"
    )
    repeats: int = option(10, "timed repeats of each side", gt=0)
    compile: bool = option(False, "also measure with torch.compile")
    peak_tflops: float = option(989.0, "dense bf16 peak of the GPU, for the transformer's share of it", gt=0)
    output: str = option("", "JSON file for the rows")

    def validate_gpu(self):
        if not torch.cuda.is_available():
            raise ValueError("this machine has no NVIDIA GPU")


def measure(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and minimum seconds of a call, and its peak memory in GiB, after three calls as warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Each call is synchronised, so that its time is that of the GPU.
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "peak_gib": peak}


class ResultRows:
    """Measurements of one part, printed as they are made."""

    def __init__(self, args: BenchmarkArguments):
        self.args, self.rows = args, []

    def add(self, what: str, side: str, run: Callable[[], object], *, unit: str, n_units: float) -> None:
        """Measure a side. One call processes `n_units` of `unit`."""
        row = {"what": what, "side": side, **measure(run, self.args.repeats)}
        row[f"{unit}_per_s"] = n_units / row["median_s"]
        self.rows.append(row)
        shown = f"{row['median_s'] * 1e3:9.2f} ms  {row[f'{unit}_per_s']:12,.1f} {unit}/s  {row['peak_gib']:6.2f} GiB"
        print(f"{what:34} {side:16} {shown}", flush=True)

    def add_step(self, what: str, models: dict[str, nn.Module], step: Callable, *, unit: str, n_units: float) -> None:
        """Measure the step of every side, with --compile also compiled.

        Args: step: model -> function of one step.
        """
        for name, model in models.items():
            model.to(DEVICE)  # one model at a time, so that its memory is measured alone
            self.add(what, name, step(model), unit=unit, n_units=n_units)
            if self.args.compile:
                torch._dynamo.reset()  # no graphs of earlier models
                model.compile()
                self.add(f"{what}, compiled", name, step(model), unit=unit, n_units=n_units)
            model.to("cpu")
            torch.cuda.empty_cache()


def compare_image_vae(results: ResultRows) -> None:
    """Training steps on images of 256 px, and diffusers' AutoencoderKL with the size of Stable Diffusion's (84 M)."""
    from diffusers import AutoencoderKL

    def theirs() -> nn.Module:
        # Four levels, compression 8 in both axes.
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = (128, 256, 512, 512)
        return AutoencoderKL(3, 3, **blocks, block_out_channels=widths, layers_per_block=2, latent_channels=4)

    def step(model: nn.Module) -> Callable[[], None]:
        noise = torch.randn(16, model.config.latent_channels, 32, 32, device=DEVICE)

        def run() -> None:
            model.zero_grad()
            image_vae.loss_of(model, image, noise, bf16=True).backward()

        return run

    # Random images (16, 3, 256, 256); latents are (16, Z, 32, 32).
    image = torch.randn(16, 3, 256, 256, device=DEVICE).clamp(-1, 1)
    models = {f"ours {name}": ImageVAE.from_preset(name) for name in ("large", "ldm", "small")}
    results.add_step("image VAE step, 16 x 256 px", {**models, "diffusers": theirs()}, step, unit="images", n_units=16)
    # The cost of deterministic kernels.
    torch.use_deterministic_algorithms(True, warn_only=True)
    results.add_step("the same, deterministic", {"ours large": models["ours large"]}, step, unit="images", n_units=16)
    torch.use_deterministic_algorithms(False)


def compare_image_diffusion(results: ResultRows) -> None:
    """Training steps on latents of 4x16x16, and diffusers' UNet2DConditionModel of the same size."""
    B = 128

    def step(model: nn.Module) -> Callable[[], None]:
        return diffusion.training_step(model, B, bf16=True, device=DEVICE)

    sides = {name: diffusion.build(name) for name in (diffusion.OURS, diffusion.THEIRS)}
    results.add_step(f"UNet step, {B} x 4x16x16", sides, step, unit="latents", n_units=B)


def compare_vocoder(results: ResultRows) -> None:
    """Synthesis of 10 s with batches of 16 and 1, and adversarial steps of 16 x 16,384 samples, in fp32; Vocos."""
    # Synthesis: log-mels (16, M, 625) are 10 s.
    settings = mel_preset("16k")
    mel = torch.randn(16, settings.n_mels, 625, device=DEVICE) - 4
    models = {f"ours {name}": vocoder.build(name, "16k") for name in ("medium", "small")} | {"vocos": Vocos(settings)}
    with torch.inference_mode():
        for name, model in models.items():
            model.to(DEVICE).eval()
            results.add(
                "synthesis of 16 x 10 s, fp32", name, lambda model=model: model(mel), unit="seconds", n_units=160
            )
            single = mel[:1]
            results.add(
                "synthesis of 1 x 10 s, fp32", name, lambda m=model, x=single: m(x), unit="seconds", n_units=10
            )
    # Adversarial steps; the sides are built one after another, since each has discriminators and optimizers.
    waveform = 0.1 * torch.randn(16, 16384, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sides = {
        "ours medium": lambda: vocoder.OurStep(vocoder.build("medium", "16k").to(DEVICE)),
        "ours medium /2": lambda: vocoder.OurStep(vocoder.build("medium", "16k").to(DEVICE), discriminator_every=2),
        "ours medium full": lambda: vocoder.OurStep(vocoder.build("medium", "16k").to(DEVICE), discriminator="full"),
        "vocos": lambda: VocosRecipe(settings).to(DEVICE),
    }
    for name, build in sides.items():
        recipe = build()

        # Two steps, since "/2" updates its discriminator in every second one.
        def two_steps(recipe=recipe) -> None:
            recipe.step(waveform)
            recipe.step(waveform)

        results.add("2 adversarial steps, 16 crops, fp32", name, two_steps, unit="steps", n_units=2)
        del recipe
        torch.cuda.empty_cache()


def compare_audio_vae(results: ResultRows) -> None:
    """Training steps on log-mels of 80 x 512 frames, and diffusers' AutoencoderKL in AudioLDM's layout."""
    settings = AudioVAE.from_preset("medium").config.mel
    # Log-mels (16, M, 512) with the mean and std of speech.
    mel = 2 * torch.randn(16, settings.n_mels, 512, device=DEVICE) - 5

    def step(model: nn.Module) -> Callable[[], None]:
        return audio_vae.training_step(model, mel, bf16=True)

    # AutoencoderKL reads the log-mel as an image with one channel, see `audio_vae.forward`.
    sides = {"ours medium": AudioVAE.from_preset("medium"), "diffusers": audio_vae.build_theirs()}
    results.add_step("audio VAE step, 16 x 512 frames", sides, step, unit="seconds", n_units=16 * 512 * 256 / 16000)


def compare_transformer(results: ResultRows) -> None:
    """Training steps of 300 M parameters on 16 x 1,024 tokens with compiled layers; share of the GPU's peak."""
    B, L = 16, 1024
    tokens = torch.randint(LARGE.vocab_size, (B, L), device=DEVICE)

    # Our loss in chunks of different sizes (0: all logits at once), and Llama.
    for name, chunk in (("ours", 512), ("ours", 4096), ("ours", 0), ("llama", None)):
        side = SIDES[name](LARGE) if chunk is None else SIDES[name](LARGE, loss_chunk_size=chunk)
        side.model.to(DEVICE)
        compile_blocks(side)
        operations = training_operations(side.model, B, L)
        label = name if chunk is None else f"{name}, chunk {chunk}"
        step = training_step(side, tokens, bf16=True)
        results.add("LM step, 16 x 1024, layers compiled", label, step, unit="tokens", n_units=B * L)
        share = operations / results.rows[-1]["median_s"] / results.args.peak_tflops / 1e12
        results.rows[-1]["share_of_peak"] = share
        print(f"{'':34} {label:16} {share:.1%} of {results.args.peak_tflops:g} TFLOPS", flush=True)
        del side
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[ResultRows], None]] = {
    "image_vae": compare_image_vae,
    "image_diffusion": compare_image_diffusion,
    "vocoder": compare_vocoder,
    "audio_vae": compare_audio_vae,
    "transformer": compare_transformer,
}


def main(args: BenchmarkArguments) -> None:
    """Measure one part, and write its rows."""
    set_fp32_precision(use_tf32=False)
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    results = ResultRows(args)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps(machine))
    PARTS[args.part](results)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output), {"part": args.part, **machine, "rows": results.rows})


if __name__ == "__main__":
    with explained_errors(logging.getLogger("benchmark")):
        main(parse_arguments(BenchmarkArguments, None, __doc__ or ""))
