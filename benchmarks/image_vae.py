"""Image VAE compared with diffusers' AutoencoderKL: CPU seconds, interleaved in one process.

    python benchmarks/image_vae.py                                   # speed at two sizes, fp32 and bf16 autocast
    python benchmarks/image_vae.py --quality 120 --cached_dataset cached_datasets/openmoji_64
    python benchmarks/image_vae.py --gan                             # cost of the adaptive weight

Both sides have the same number of parameters within 2 %, the same f8 compression and the same latent channels.
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import cpu_seconds, interleave, report
from dataset_loading.collators import collate_stack
from dataset_loading.epoch_sampler import EpochSampler
from dataset_loading.image.pixels import ImageDataset
from model.criteria import kl_divergence
from model.image.discriminators import build_discriminator
from model.image.vae import ImageVAE
from utils.command_line import explained_errors, parse_arguments
from utils.metrics.images import psnr
from utils.options import option
from utils.training.adversary import Adversary
from utils.training.arguments.image_vae import ImageVAEGANArguments

# Channels of the blocks of diffusers' AutoencoderKL, with 2 layers each, and our preset of the same size.
PAIRS = {"5M": ((32, 64, 128, 128), "small"), "21M": ((64, 128, 256, 256), "medium")}
LATENT_CHANNELS = 16  # on both sides


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    repeats: int = option(7, "interleaved repeats of each side", gt=0)
    threads: int = option(1, "CPU threads of torch", gt=0)
    quality: float = option(0.0, "CPU seconds of training per side, then held-out PSNR; 0: speed only", ge=0)
    cached_dataset: str = option("cached_datasets/openmoji_64", "images for --quality")
    size: str = option("5M", "pair that --quality trains, 5M or 21M")
    batch_size: int = option(8, "images per step", gt=0)
    learning_rates: list[float] = option(
        [5e-4, 2e-3], "peak learning rates tried for each side; the better counts", gt=0
    )
    gan: bool = option(False, "measure a GAN step with and without the adaptive weight instead")


def build_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Both models of one size: (ours, theirs)."""
    from diffusers import AutoencoderKL

    widths, preset = PAIRS[name]
    theirs = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
    )
    return ImageVAE.from_preset(preset, image_size=64), theirs


def forward(model: nn.Module, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reconstruction, mean, logvar) of either side."""
    if isinstance(model, ImageVAE):
        output = model(image=image, noise=noise)
        return output.reconstruction, output.mean, output.logvar
    # diffusers has no argument for the noise, so the sample is computed here.
    posterior = model.encode(image).latent_dist
    reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
    return reconstruction.float(), posterior.mean.float(), posterior.logvar.float()


def loss_of(model: nn.Module, image: Tensor, noise: Tensor, *, bf16: bool = False) -> Tensor:
    """L1 + 1e-3 KL in nats per input value."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
        reconstruction, mean, logvar = forward(model, image, noise)
    kl = kl_divergence(mean, logvar).mean() / image[0].numel()  # per input value, as the L1
    return (reconstruction - image).abs().mean() + 1e-3 * kl


def speed(args: BenchmarkArguments) -> None:
    """Compare forward and backward passes at 64 x 64, batch 8."""
    for name in PAIRS:
        ours, theirs = build_pair(name)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
        print(f"{name}: parameters ours {sizes[0]:,}, diffusers {sizes[1]:,} ({sizes[0] / sizes[1]:.3f})")
        image, noise = torch.randn(8, 3, 64, 64).clamp(-1, 1), torch.randn(8, LATENT_CHANNELS, 8, 8)
        for bf16 in (False, True):

            def step(model: nn.Module, *, bf16: bool = bf16, image: Tensor = image, noise: Tensor = noise) -> None:
                model.zero_grad()
                loss_of(model, image, noise, bf16=bf16).backward()

            sides = {"ours": lambda m=ours: step(m), "diffusers": lambda m=theirs: step(m)}
            report(f"{name} {'bf16' if bf16 else 'fp32'} forward+backward", interleave(sides, args.repeats))


def train(
    model: nn.Module, args: BenchmarkArguments, learning_rate: float, *, train_set: ImageDataset, held_out: Tensor
) -> tuple[float, int]:
    """Held-out PSNR after `quality` CPU seconds of training, and the number of steps. Data loading does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    sampler, epoch, used, step = EpochSampler(len(train_set), args.batch_size, seed=0), 0, 0.0, 0
    while used < args.quality:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), args.batch_size):
            image = collate_stack([train_set[i] for i in order[start : start + args.batch_size]])["image"]
            noise = torch.randn(len(image), LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(step))
            # Cosine decay over the CPU time, after a warm-up of 50 steps.
            progress = used / args.quality
            rate = learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate

            def update(image: Tensor = image, noise: Tensor = noise) -> None:
                optimizer.zero_grad()
                loss_of(model, image, noise).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

            used += cpu_seconds(update)  # loading and collating do not count
            step += 1
            if used >= args.quality:
                break
        epoch += 1
    # PSNR of the reconstructions of posterior means.
    with torch.inference_mode():
        values = [
            psnr(forward(model.eval(), image, torch.zeros(len(image), LATENT_CHANNELS, 8, 8))[0].clamp(-1, 1), image)
            for image in held_out.split(46)
        ]
    return torch.cat(values).mean().item(), step


def quality(args: BenchmarkArguments) -> None:
    """Print the held-out PSNR of both sides after the same CPU time, for every learning rate."""
    # Both sides start from the same seed at every learning rate.
    train_set, validation = (ImageDataset(args.cached_dataset, split) for split in ("train", "validation"))
    held_out = collate_stack([validation[i] for i in range(len(validation))])["image"]
    for rate in args.learning_rates:
        torch.manual_seed(0)
        for name, model in zip(("ours", "diffusers"), build_pair(args.size)):
            value, steps = train(model, args, rate, train_set=train_set, held_out=held_out)
            print(
                f"{args.size} {name:10} lr {rate:g}: {value:.2f} dB after {args.quality:g} CPU s, {steps} steps",
                flush=True,
            )


def gan(args: BenchmarkArguments) -> None:
    """Compare an adversarial step of VAE and discriminator with and without the adaptive weight."""
    model = ImageVAE.from_preset("small", image_size=64)
    image, noise = torch.randn(8, 3, 64, 64).clamp(-1, 1), torch.randn(8, LATENT_CHANNELS, 8, 8)

    def side(adaptive: bool) -> Callable[[], None]:
        values = {"gan_start_step": 0, "gan_warmup_steps": 0, "gan_ramp_steps": 1, "use_adaptive_gan_weight": adaptive}
        adversary = Adversary(build_discriminator("patch", 32, 3), ImageVAEGANArguments(**values))
        # No warm-up: the adversary plays from the first step on.
        adversary.prepare(torch.device("cpu"), "constant", 100)

        # The gradient of the loss at the output, then one backward pass through the VAE, as in `GANTrainer`.
        def run() -> None:
            model.zero_grad()
            output = model(image=image, noise=noise)
            leaf = output.reconstruction.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((leaf - image).abs().mean(), leaf)
            played = adversary.play(leaf, image, gradient, weight=0.1)
            (output.reconstruction * (gradient + adversary.adaptive_factor() * 0.1 * played.gradient)).sum().backward()
            adversary.update()

        return run

    report("GAN step", interleave({"adaptive": side(True), "constant": side(False)}, args.repeats))


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    with explained_errors(logging.getLogger("benchmark")):
        gan(arguments) if arguments.gan else quality(arguments) if arguments.quality else speed(arguments)
