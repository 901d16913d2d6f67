"""Training steps as a share of this machine's own rate of matrix products, in fp32 and under bf16 autocast.

    python benchmarks/roofline.py                                        # every stage
    python benchmarks/roofline.py --stages vocoder causal --precisions bf16 --repeats 9 --json roofline.json

    share = operations of a step / its CPU seconds / rate of a product of two 2048 x 2048 matrices of the same type

A step is forward and backward on random data, without an optimizer; rows with `GAN` are whole adversarial steps with
both optimizers. Operations are those of matrix products, convolutions and attention, as torch's `FlopCounterMode`
counts them; norms, activations, Fourier transforms and optimizers count as nothing, so that 100 % is out of reach
unless convolutions are faster than the product. The product is timed before each step, so that both see the machine in
the same state.
"""

import contextlib
import dataclasses
import json
import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import audio_vae, diffusion, image_vae, multimodal, speech, transformer, vocoder
from benchmarks.peers.transformer import Ours, Shape
from benchmarks.timing import cpu_seconds
from dataset_loading.files import replace_file
from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.causal import MegaTransformerForCausalLM
from model.cpu_kernels import BLOCK
from model.image.vae import ImageVAE
from utils.command_line import explained_errors, parse_arguments
from utils.options import option

Family = Literal["image_vae", "image_diffusion", "vocoder", "audio_vae", "audio_diffusion", "causal", "multimodal"]
Precision = Literal["fp32", "bf16"]
Step = Callable[[], object]
SIZE = 2048  # Rows and columns of the matrices whose product is the measure.


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the measurement."""

    stages: list[Family] = option([*Family.__args__], "stages that are measured, in this order")
    precisions: list[Precision] = option(["fp32", "bf16"], "bf16: autocast over fp32 weights")
    repeats: int = option(5, "steps of each row, of which the median counts", gt=0)
    threads: int = option(1, "CPU threads", gt=0)
    json: str = option("", "file of the results; empty: none")


# ---- Steps.


def image_vae_step(preset: str, batch_size: int, is_bf16: bool) -> Step:
    """L1 + KL at 64 x 64."""
    model = ImageVAE.from_preset(preset, image_size=64)
    image = torch.randn(batch_size, 3, 64, 64).clamp(-1, 1)
    noise = torch.randn(batch_size, *model.latent_shape(64))

    def run() -> None:
        model.zero_grad()
        image_vae.loss_of(model, image, noise, bf16=is_bf16).backward()

    return run


def image_diffusion_step(is_bf16: bool) -> Step:
    """The velocity loss of `small` on 16 latents of 4 x 16 x 16 with captions."""
    return diffusion.training_step(speech.randomised(diffusion.build(diffusion.OURS)), 16, is_bf16)


def vocoder_step(preset: str, is_bf16: bool, *, has_adversary: bool = True) -> Step:
    """The vocoder's losses on 8 crops of 8192 samples, with and without the adversary and its optimizers."""
    recipe = vocoder.OurStep(vocoder.build(preset, "16k"), bf16=is_bf16)
    waveform = 0.1 * torch.randn(8, 32 * recipe.model.config.hop_length)
    mel = recipe.log_mel(waveform)

    def generator() -> None:
        recipe.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            generated = recipe.model(mel)
        sum(recipe.criterion(generated, waveform).values()).backward()

    return (lambda: recipe.step(waveform)) if has_adversary else generator


def audio_vae_step(preset: str, is_bf16: bool) -> Step:
    """L1 + KL of 16 log-mels of 80 x 128."""
    model = speech.randomised(AudioVAE.from_preset(preset))
    return audio_vae.training_step(model, torch.randn(16, model.config.n_mels, 128), is_bf16)


def audio_diffusion_step(preset: str, is_bf16: bool) -> Step:
    """Text to speech with its encoder, durations and prior, 16 clips of 3.2 seconds."""
    model = speech.randomised(AudioDiffusion.from_preset(preset)).train()
    clips = speech.random_clips(speech.BenchmarkArguments(batch_size=16), model)
    return speech.step_of(lambda: speech.whole_loss(model, clips), model, is_bf16)


def causal_step(preset: str, is_bf16: bool) -> Step:
    """Cross-entropy of 4 x 512 tokens."""
    side = Ours(Shape())
    if preset != "llama-8m":
        side.model = MegaTransformerForCausalLM.from_preset(preset, vocab_size=Shape.vocab_size, loss_chunk_size=512)
    return transformer.training_step(side, torch.randint(Shape.vocab_size, (4, 512)), is_bf16)


def multimodal_step(is_bf16: bool) -> Step:
    """The flow's loss of `multimodal-tiny` on 32 captions with images, and its AdamW."""
    args = multimodal.BenchmarkArguments(bf16=is_bf16)
    return multimodal.stepper(multimodal.Ours(), multimodal.read_pairs(args)["train"], args)


ROWS: dict[Family, dict[str, Callable[[bool], Step]]] = {
    "image_vae": {
        "tiny, 32 x 64 px": lambda is_bf16: image_vae_step("tiny", 32, is_bf16),
        "large, 4 x 64 px": lambda is_bf16: image_vae_step("large", 4, is_bf16),
        "ldm, 1 x 64 px": lambda is_bf16: image_vae_step("ldm", 1, is_bf16),
    },
    "image_diffusion": {"small, 16 x 16 x 16": image_diffusion_step},
    "vocoder": {
        "tiny": lambda is_bf16: vocoder_step("tiny", is_bf16, has_adversary=False),
        "small": lambda is_bf16: vocoder_step("small", is_bf16, has_adversary=False),
        "tiny, GAN": lambda is_bf16: vocoder_step("tiny", is_bf16),
        "small, GAN": lambda is_bf16: vocoder_step("small", is_bf16),
    },
    "audio_vae": {
        "tiny": lambda is_bf16: audio_vae_step("tiny", is_bf16),
        "medium": lambda is_bf16: audio_vae_step("medium", is_bf16),
    },
    "audio_diffusion": {"tiny": lambda is_bf16: audio_diffusion_step("tiny", is_bf16)},
    "causal": {
        "llama-8m, 4 x 512": lambda is_bf16: causal_step("llama-8m", is_bf16),
        "small, 4 x 512": lambda is_bf16: causal_step("small", is_bf16),
    },
    "multimodal": {"tiny, text and images": multimodal_step},
}


# ---- Operations.


def attention_operations(query: Sequence[int], key: Sequence[int], *_: Any, n_products: int, **__: Any) -> int:
    """Those of attention over all keys: `n_products` of queries (B, H, L, K) and keys (B, G, S, K)."""
    B, H, L, K = query
    return n_products * 2 * B * H * L * key[2] * K


def blockwise_operations(query: Sequence[int], *_: Any, n_products: int, **__: Any) -> int:
    """Those of `blockwise_attention`: a block of queries sees the keys up to its end."""
    B, H, L, K = query
    ends = [min(start + BLOCK, L) for start in range(0, L, BLOCK)]
    seen = sum((end - start) * end for start, end in zip(range(0, L, BLOCK), ends))
    return n_products * 2 * B * H * seen * K


class WholeModel(contextlib.nullcontext):
    """In the place of a `ModuleTracker`: everything belongs to the whole."""

    parents = frozenset({"Global"})


def count_operations(run: Step) -> int:
    """Multiplications and additions of the products, convolutions and attention of one call."""
    aten, ours = torch.ops.aten, torch.ops.megatransformer

    def forward(formula: Callable[..., int]) -> Callable[..., int]:
        return lambda query, key, *_, **__: formula(query, key, n_products=2)

    def backward(formula: Callable[..., int]) -> Callable[..., int]:
        return lambda _, query, key, *__, **___: formula(query, key, n_products=4)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward(attention_operations),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward(attention_operations),
        ours.blockwise_attention: forward(blockwise_operations),
        ours.blockwise_attention_backward: backward(blockwise_operations),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Its tracker of modules forbids `autograd.grad`, with which GANs compute; the total does not need it.
    counter.mod_tracker = WholeModel()  # type: ignore[assignment]
    with counter:
        run()
    return counter.get_total_flops()


# ---- Measurement.


def product(precision: Precision, size: int) -> Step:
    """The product that is the measure."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
    return lambda: a @ b


def measure(run: Step, precision: Precision, repeats: int, *, size: int = SIZE) -> dict[str, float]:
    """Operations and CPU seconds of a step, the rates of step and product in operations per second, and the median
    share."""
    run()  # The first call allocates.
    multiply = product(precision, size)
    multiply()
    n_operations = count_operations(run)
    seconds, rates = [], []
    for _ in range(repeats):
        rates.append(2 * size**3 / cpu_seconds(multiply))
        seconds.append(cpu_seconds(run))
    shares = [n_operations / spent / rate for spent, rate in zip(seconds, rates)]
    return {
        "operations": n_operations,
        "seconds": statistics.median(seconds),
        "rate": n_operations / statistics.median(seconds),
        "product_rate": statistics.median(rates),
        "share": statistics.median(shares),
    }


def roofline(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measure, and print a row of the table as soon as it is there."""
    rows = []
    print("| stage | model | precision | GFLOP | CPU s | GFLOP/s | of the product |\n|---|---|---|---|---|---|---|")
    for stage in args.stages:
        for name, build in ROWS[stage].items():
            for precision in args.precisions:
                torch.manual_seed(0)
                row = measure(build(precision == "bf16"), precision, args.repeats)
                rows.append({"stage": stage, "model": name, "precision": precision, **row})
                giga = f"{row['operations'] / 1e9:.1f} | {row['seconds']:.3f} | {row['rate'] / 1e9:.0f}"
                print(f"| {stage} | {name} | {precision} | {giga} | {row['share']:.0%} |", flush=True)
    return rows


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    machine = f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}"
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {machine}")
    with explained_errors(logging.getLogger("benchmark")):
        results = roofline(arguments)
        if arguments.json:
            content = json.dumps({"torch": torch.__version__, "machine": machine, "rows": results}, indent=1)
            replace_file(Path(arguments.json), content.encode())
