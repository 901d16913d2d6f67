"""Every model compared with its peer on an NVIDIA GPU: rates, peak memory, share of the GPU's peak.

    python benchmarks/cuda.py --part image_vae --output runs/benchmark/image_vae.json
    python benchmarks/cuda.py --part image_diffusion | vocoder | audio_vae | transformer | generation | multimodal
    python benchmarks/cuda.py --part fits
    python benchmarks/cuda.py --part train --stage image_vae --cached_dataset cached_datasets/scenes_64 --minutes 6

Each part ends after --limit_minutes, eight by default, at the latest, and writes its rows as JSON; so does a part that
SIGTERM or an error cuts off (`is_complete` is false). A peer whose package is missing is left out. `fits` finds the
largest batch of every preset in 24, 40 and 80 GiB; `train` trains a stage for some minutes and evaluates it.
`--device cpu` runs the same code at tiny sizes, to see that it runs; its figures mean nothing.

Steps are forward and backward under bf16 autocast unless a row says otherwise; those of the vocoder are whole
adversarial steps of generator and discriminator. Rows `compiled` use torch.compile on both sides, `deterministic` ones
deterministic kernels. Times are medians of synchronised repeats.
"""

import contextlib
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import audio_vae, diffusion, image_vae, vocoder
from benchmarks.cuda_capacity import SMALL_SHAPE, compare_generation, measure_batches, measure_multimodal
from benchmarks.cuda_training import TrainedStage, train_stage
from benchmarks.peers.transformer import SIDES
from benchmarks.peers.vocoder import Vocos, VocosRecipe
from benchmarks.timing import ResultRows, free_memory
from benchmarks.transformer import LARGE, compile_blocks, training_operations, training_step
from model.audio.spectral import mel_preset
from model.audio.vae import AudioVAE
from model.image.vae import ImageVAE
from utils.checkpoints import write_json
from utils.command_line import explained_errors, parse_arguments
from utils.devices import set_fp32_precision
from utils.options import option

Part = Literal[
    "image_vae", "image_diffusion", "vocoder", "audio_vae", "transformer", "generation", "multimodal", "fits", "train"
]


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    part: Part = option("image_vae", "part that is measured")
    device: Literal["cuda", "cpu"] = option("cuda", "cpu: the same code at tiny sizes, to see that it runs")
    repeats: int = option(10, "timed repeats of each side", gt=0)
    compile: bool = option(False, "also measure with torch.compile")
    peak_tflops: float = option(989.0, "dense bf16 peak of the GPU, for the transformer's share of it", gt=0)
    stage: TrainedStage = option("image_vae", "stage that is trained", only_with=("part", "train"))
    cached_dataset: str = option("", "cache that it is trained on", only_with=("part", "train"))
    flags: str = option("", "further flags of its training script, in one string", only_with=("part", "train"))
    minutes: float = option(6.0, "minutes of its training", gt=0, only_with=("part", "train"))
    limit_minutes: float = option(8.0, "minutes after which the part ends with the rows that it has", gt=0)
    output: str = option("", "JSON file for the rows")

    def validate_gpu(self):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device=cuda: this machine has no NVIDIA GPU; --device cpu tries the code at tiny sizes"
            )


def compare_image_vae(results: ResultRows) -> None:
    """Training steps on images of 256 px, and diffusers' AutoencoderKL with the size of Stable Diffusion's (84 M)."""
    from diffusers import AutoencoderKL

    def theirs() -> nn.Module:
        # Four levels, compression 8 in both axes.
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = results.size((128, 256, 512, 512), (32, 32, 32, 32))
        return AutoencoderKL(3, 3, **blocks, block_out_channels=widths, layers_per_block=2, latent_channels=4)

    def step(model: nn.Module) -> Callable[[], None]:
        noise = torch.randn(B, model.config.latent_channels, side // 8, side // 8, device=results.device)

        def run() -> None:
            model.zero_grad()
            image_vae.loss_of(model, image, noise, bf16=True).backward()

        return run

    # Random images (B, 3, side, side); latents are (B, Z, side / 8, side / 8).
    B, side = results.size((16, 256), (1, 32))
    image = torch.randn(B, 3, side, side, device=results.device).clamp(-1, 1)
    names = results.size(("large", "ldm", "small"), ("tiny",))
    models = {f"ours {name}": ImageVAE.from_preset(name, image_size=side) for name in names}
    sides = {**models, "diffusers": theirs()} if results.has_package("diffusers") else models
    results.add_step(f"image VAE step, {B} x {side} px", sides, step, unit="images", n_units=B)
    # The cost of deterministic kernels.
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = dict(list(models.items())[:1])
    results.add_step("the same, deterministic", first, step, unit="images", n_units=B)
    torch.use_deterministic_algorithms(False)


def compare_image_diffusion(results: ResultRows) -> None:
    """Training steps on latents of 4x16x16, and diffusers' UNet2DConditionModel of the same size."""
    B = results.size(128, 1)

    def step(model: nn.Module) -> Callable[[], None]:
        return diffusion.training_step(model, B, bf16=True, device=results.device)

    names = (diffusion.OURS, diffusion.THEIRS) if results.has_package("diffusers") else (diffusion.OURS,)
    sides = {name: diffusion.build(name) for name in names}
    results.add_step(f"UNet step, {B} x 4x16x16", sides, step, unit="latents", n_units=B)


def compare_vocoder(results: ResultRows) -> None:
    """Synthesis of 10 s with batches of 16 and 1, and adversarial steps of 16 x 16,384 samples, in fp32; Vocos."""
    # Synthesis: log-mels (16, M, 625) are 10 s.
    settings = mel_preset("16k")
    B, n_frames = results.size((16, 625), (1, 40))
    mel = torch.randn(B, settings.n_mels, n_frames, device=results.device) - 4
    has_vocos, preset = results.has_package("vocos"), results.size("medium", "tiny")
    models = {f"ours {name}": vocoder.build(name, "16k") for name in results.size(("medium", "small"), ("tiny",))}
    models |= {"vocos": Vocos(settings)} if has_vocos else {}
    seconds = n_frames * settings.hop_length / settings.sample_rate
    with torch.inference_mode():
        for name, model in models.items():
            model.to(results.device).eval()
            for x in (mel, mel[:1]):
                what = f"synthesis of {len(x)} x {seconds:g} s, fp32"
                results.add(what, name, lambda m=model, x=x: m(x), unit="seconds", n_units=len(x) * seconds)
    # Adversarial steps; the sides are built one after another, since each has discriminators and optimizers.
    waveform = 0.1 * torch.randn(B, 16384, generator=torch.Generator().manual_seed(0)).to(results.device)

    def ours(**flags: Any) -> vocoder.OurStep:
        return vocoder.OurStep(vocoder.build(preset, "16k").to(results.device), **flags)

    sides: dict[str, Callable[[], Any]] = {
        f"ours {preset}": ours,
        f"ours {preset} /2": lambda: ours(discriminator_every=2),
        f"ours {preset} full": lambda: ours(discriminator="full"),
    }
    sides = results.size(sides, {f"ours {preset} /2": sides[f"ours {preset} /2"]})
    sides |= {"vocos": lambda: VocosRecipe(settings).to(results.device)} if has_vocos else {}
    for name, build in sides.items():
        recipe = build()

        # Two steps, since "/2" updates its discriminator in every second one.
        def two_steps(recipe=recipe) -> None:
            recipe.step(waveform)
            recipe.step(waveform)

        results.add(f"2 adversarial steps, {B} crops, fp32", name, two_steps, unit="steps", n_units=2)
        del recipe
        free_memory()


def compare_audio_vae(results: ResultRows) -> None:
    """Training steps on log-mels of 80 x 512 frames, and diffusers' AutoencoderKL in AudioLDM's layout."""
    preset, (B, n_frames) = results.size("medium", "tiny"), results.size((16, 512), (1, 32))
    model = AudioVAE.from_preset(preset)
    settings = model.config.mel
    # Log-mels (B, M, F) with the mean and std of speech.
    mel = 2 * torch.randn(B, settings.n_mels, n_frames, device=results.device) - 5

    def step(model: nn.Module) -> Callable[[], None]:
        return audio_vae.training_step(model, mel, bf16=True)

    # AutoencoderKL reads the log-mel as an image with one channel, see `audio_vae.forward`.
    sides: dict[str, nn.Module] = {f"ours {preset}": model}
    if not results.is_small and results.has_package("diffusers"):
        sides["diffusers"] = audio_vae.build_theirs()
    seconds = B * n_frames * settings.hop_length / settings.sample_rate
    results.add_step(f"audio VAE step, {B} x {n_frames} frames", sides, step, unit="seconds", n_units=seconds)


def compare_transformer(results: ResultRows) -> None:
    """Training steps of 300 M parameters on 16 x 1,024 tokens with compiled layers; share of the GPU's peak."""
    (B, L), shape = results.size((16, 1024), (1, 32)), results.size(LARGE, SMALL_SHAPE)
    tokens = torch.randint(shape.vocab_size, (B, L), device=results.device)

    # Our loss in chunks of different sizes (0: all logits at once), and Llama.
    for name, chunk in (("ours", 512), ("ours", 4096), ("ours", 0), ("llama", None)):
        side = SIDES[name](shape) if chunk is None else SIDES[name](shape, loss_chunk_size=chunk)
        side.model.to(results.device)
        if not results.is_small:
            compile_blocks(side)
        operations = training_operations(side.model, B, L)
        label = name if chunk is None else f"{name}, chunk {chunk}"
        step = training_step(side, tokens, bf16=True)
        results.add(f"LM step, {B} x {L}, layers compiled", label, step, unit="tokens", n_units=B * L)
        share = operations / results.rows[-1]["median_s"] / results.args.peak_tflops / 1e12
        results.rows[-1]["share_of_peak"] = share
        print(f"{'':34} {label:16} {share:.1%} of {results.args.peak_tflops:g} TFLOPS", flush=True)
        del side
        free_memory()


PARTS: dict[Part, Callable[[ResultRows], None]] = {
    "image_vae": compare_image_vae,
    "image_diffusion": compare_image_diffusion,
    "vocoder": compare_vocoder,
    "audio_vae": compare_audio_vae,
    "transformer": compare_transformer,
    "generation": compare_generation,
    "multimodal": measure_multimodal,
    "fits": measure_batches,
    "train": train_stage,
}


@contextlib.contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Raises: SystemExit: the time is over, or SIGTERM came, with the status of a process that the signal ends."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, handler)


def main(args: BenchmarkArguments) -> None:
    """Measure one part, and write its rows; those of a part that was cut off too."""
    set_fp32_precision(use_tf32=False)
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    results = ResultRows(args)
    name = "none" if results.is_small else torch.cuda.get_device_name()
    machine = {"gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps(machine))
    end: BaseException | None = None
    try:
        with time_limit(args.limit_minutes):
            PARTS[args.part](results)
    except BaseException as error:
        end = error
        raise
    finally:
        # An error before the first row, such as a wrong flag, leaves an earlier file as it is.
        if args.output and (results.rows or end is None or isinstance(end, SystemExit)):
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            content = {"part": args.part, **machine, "is_complete": end is None, "rows": results.rows}
            write_json(Path(args.output), content)


if __name__ == "__main__":
    with explained_errors(logging.getLogger("benchmark")):
        main(parse_arguments(BenchmarkArguments, None, __doc__ or ""))
