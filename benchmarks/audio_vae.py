"""Audio VAE compared with diffusers' AutoencoderKL in AudioLDM's layout: CPU seconds, interleaved in one process.

    python benchmarks/audio_vae.py                      # training step, then encoding and decoding of 5 s

Both sides get the same log-mels, 80 bins x frames. AutoencoderKL gets them as images with one channel, and has the
blocks of AudioLDM's VAE (128, 256, 512 channels, 2 layers each, 8 latent channels, compression 4 in both axes). Ours
is `medium`, whose channels are mel bins. The step is forward and backward of L1 + KL, without discriminator.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import interleave, report
from model.audio.vae import AudioVAE
from model.criteria import kl_divergence
from utils.command_line import explained_errors, parse_arguments
from utils.options import option

KL_WEIGHT = 1e-6  # as usual for VAEs of latent diffusion
FRAMES_MULTIPLE = 4  # the compression of AutoencoderKL along time


@dataclasses.dataclass
class BenchmarkArguments:
    """Flags of the comparison."""

    repeats: int = option(5, "interleaved repeats of each side", gt=0)
    config: str = option("medium", "our preset")
    batch_size: int = option(4, "log-mels per training step", gt=0)
    segment_frames: int = option(128, "mel frames per log-mel", gt=0)
    seconds: float = option(5.0, "seconds of audio that are encoded and decoded", gt=0)
    threads: int = option(1, "CPU threads of torch", gt=0)

    def validate_frames(self):
        if self.segment_frames % FRAMES_MULTIPLE:
            raise ValueError(f"--segment_frames={self.segment_frames} must be a multiple of {FRAMES_MULTIPLE}")


def build_theirs() -> nn.Module:
    """AutoencoderKL with the layout of AudioLDM (arXiv 2301.12503)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=8,
    )


def forward(model: nn.Module, mel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reconstruction, mean, logvar) of either side, with sampled latents."""
    if isinstance(model, AudioVAE):
        # (B, Z, L) for the noise of the posterior.
        noise = torch.randn(len(mel), *model.latent_shape(mel.shape[-1]), device=mel.device)
        output = model(mel, noise=noise)
        return output.reconstruction, output.mean, output.logvar
    posterior = model.encode(mel[:, None]).latent_dist  # (B, M, F) as (B, 1, M, F)
    return model.decode(posterior.sample()).sample[:, 0], posterior.mean, posterior.logvar


def training_step(model: nn.Module, mel: Tensor, bf16: bool) -> Callable[[], None]:
    """Forward and backward of L1 + KL."""

    def run() -> None:
        model.zero_grad()
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=bf16):
            reconstruction, mean, logvar = forward(model, mel)
        # Both terms per value of the log-mel.
        kl = kl_divergence(mean.float(), logvar.float()).mean() / mel[0].numel()
        ((reconstruction.float() - mel).abs().mean() + KL_WEIGHT * kl).backward()

    return run


def round_trip(model: nn.Module, mel: Tensor) -> Callable[[], None]:
    """Encoding, and decoding of the posterior mean."""

    def run() -> None:
        if isinstance(model, AudioVAE):
            model.decode(model.encode(mel)[0])
        else:
            model.decode(model.encode(mel[:, None]).latent_dist.mean)

    return run


def main(args: BenchmarkArguments) -> None:
    """Compare training steps, then inference."""
    torch.manual_seed(0)
    models = {f"ours {args.config}": AudioVAE.from_preset(args.config), "diffusers": build_theirs()}
    for name, model in models.items():
        print(f"{name:12} {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    settings = next(iter(models.values())).config.mel
    # Training steps on random log-mels with the mean and std of speech, (B, M, F).
    mel = 2 * torch.randn(args.batch_size, settings.n_mels, args.segment_frames) - 5
    for bf16 in (False, True):
        sides = {name: training_step(model, mel, bf16) for name, model in models.items()}
        report(f"{'bf16' if bf16 else 'fp32'} forward+backward", interleave(sides, args.repeats))
    # Inference on one longer log-mel.
    n_frames = round(args.seconds * settings.sample_rate / settings.hop_length / FRAMES_MULTIPLE) * FRAMES_MULTIPLE
    long = 2 * torch.randn(1, settings.n_mels, n_frames) - 5
    with torch.inference_mode():
        times = interleave({name: round_trip(model.eval(), long) for name, model in models.items()}, args.repeats)
    report(f"encode+decode {args.seconds:g} s", times)


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    with explained_errors(logging.getLogger("benchmark")):
        main(arguments)
