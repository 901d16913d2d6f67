"""Our vocoder compared with Vocos and HiFi-GAN: CPU seconds, interleaved in one process.

    python benchmarks/vocoder.py                       # inference, then the adversarial training step
    python benchmarks/vocoder.py --only inference --repeats 9
    python benchmarks/vocoder.py --quality 2 10 30 60 --cached_dataset cached_datasets/audio_vocoder --side ours
    python benchmarks/vocoder.py --run_dirs runs/vocoder/base runs/benchmark/vocoder/*     # measures existing runs

Speed is measured with random weights. All sides have the same inputs and outputs. Vocos has its published backbone
(512 x 8) and head, HiFi-GAN the sizes of V1, in our implementation and in that of transformers. The training step of a
peer is as published: its discriminators, losses and optimizer, and a forward pass of the generator for the
discriminator.

--quality trains our vocoder with pretrain_vocoder.py and Vocos with its published recipe on the same clips for the
same CPU time, one run each, and measures both on held-out clips at every number of minutes; it also needs the
packages in requirements-eval.txt. --run_dirs measures the runs of both sides in these folders.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.vocoder import HifiGANRecipe, TransposedInput, Vocos, VocosRecipe
from benchmarks.timing import interleave, report
from benchmarks.vocoder_quality import MEASURING_FLAGS, QualityArguments, quality
from model.audio.spectral import LogMel, mel_preset
from model.audio.vocoders import Vocoder
from pretrain_vocoder import VocoderStage
from utils.command_line import explained_errors, parse_arguments
from utils.options import option
from utils.training.arguments.vocoder import VocoderArguments

OURS = ("medium", "small", "tiny")


@dataclasses.dataclass
class BenchmarkArguments(QualityArguments):
    """Flags of the comparison."""

    only: Literal["", "inference", "training"] = option("", "one part of the speed comparison instead of both")
    mel: str = option("16k", "log-mel preset of the speed comparison; peers need a hop of 256")
    repeats: int = option(5, "interleaved repeats of each side", gt=0)
    seconds: float = option(5.0, "seconds of sound in the inference comparison", gt=0)
    batch_size: int = option(4, "crops per training step in the speed comparison", gt=0)
    segment_frames: int = option(32, "frames of a crop in the speed comparison", gt=1)
    threads: int = option(1, "CPU threads of torch", gt=0)
    bf16: bool = option(False, "bfloat16 autocast on all sides in the inference comparison")

    def validate_bf16(self):
        if self.bf16 and (self.only == "training" or self.quality or self.run_dirs):
            raise ValueError("--bf16 has no effect without the inference comparison")

    def validate_measuring(self):
        unused = [name for name in MEASURING_FLAGS if name in self.given and not (self.quality or self.run_dirs)]
        if unused:
            raise ValueError(f"--{unused[0]} has no effect without --quality or --run_dirs")


def build(preset: str, mel: str) -> Vocoder:
    """Our vocoder with random weights, also those that are initialised to zero."""
    torch.manual_seed(0)
    model = Vocoder.from_preset(preset, **mel_preset(mel).as_dict())
    # Zeros would make some operations faster than they are after training.
    for parameter in model.parameters():
        parameter.data.add_(1e-3 * torch.randn_like(parameter))
    return model


def count(module: nn.Module) -> str:
    """Number of parameters in millions, as text."""
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


def inference(args: BenchmarkArguments) -> None:
    """Compare real-time factors: CPU seconds per second of audio, batch 1."""
    # A log-mel (1, M, F) with the mean of speech, and all models that read it.
    settings = mel_preset(args.mel)
    n_frames = round(args.seconds * settings.sample_rate / settings.hop_length)
    mel = torch.randn(1, settings.n_mels, n_frames) - 4
    models: dict[str, nn.Module] = {f"ours {name}": build(name, args.mel) for name in OURS}
    models["vocos"] = Vocos(settings)
    models["hifigan ours"] = build("hifigan-v1", args.mel)
    models["hifigan hf"] = TransposedInput(settings)
    for name, model in models.items():
        model.eval().requires_grad_(False)
        print(f"{name:14} {count(model)}")
    sides = {name: lambda model=model: model(mel) for name, model in models.items()}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        times = interleave(sides, args.repeats)
    seconds = n_frames * settings.hop_length / settings.sample_rate
    report("inference, per second", times, unit=seconds, n_ours=len(OURS))


class OurStep:
    """One optimizer step as in the training stage: losses and adversary on a detached waveform, averaged weights.

    Args:
        model: the vocoder.
        flags: flags of pretrain_vocoder.py; the others have their defaults.
    """

    def __init__(self, model: Vocoder, **flags):
        self.model, self.step_number = model, 0
        self.arguments = VocoderArguments(gan_start_step=0, gan_warmup_steps=0, **flags)
        parts = VocoderStage(self.arguments).build_trainer_parts(model)
        device = next(model.parameters()).device
        self.criterion, self.adversary = parts["criterion"].to(device), parts["adversary"]
        self.log_mel = LogMel(model.config.mel).to(device)
        # The adversary plays from the first step on.
        self.adversary.prepare(device, "constant", 1000)
        # Optimizer and average of the weights, as in training.
        betas = (self.arguments.adam_beta1, self.arguments.adam_beta2)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.arguments.learning_rate, betas=betas)
        self.average = [parameter.detach().clone() for parameter in model.parameters()]

    def step(self, waveform: Tensor) -> None:
        """One step on waveforms (B, S). Training reads log-mels from the cache; computing them here costs little."""
        # Gradients of all losses with respect to the generated waveform, (B, S).
        mel = self.log_mel(waveform)
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=self.arguments.bf16):
            fake = self.model(mel)
        leaf = fake.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sum(self.criterion(leaf, waveform).values()), leaf)
        trains, weight = self.adversary.updates_at(self.step_number), self.arguments.gan_weight
        played = self.adversary.play(leaf, waveform, gradient, weight=weight, trains=trains)
        # One backward pass through the generator, updates of both sides, and the average of the weights.
        self.optimizer.zero_grad()
        (fake * (gradient + weight * played.gradient)).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.adversary.update()
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.model.parameters()], 1e-3)
        self.step_number += 1


def training(args: BenchmarkArguments) -> None:
    """Compare the seconds of an adversarial step, mean of two.

    Suffixes: "/2" updates the discriminator in every second step, "full" has discriminators of published size.
    """
    settings = mel_preset(args.mel)
    n_samples = args.segment_frames * settings.hop_length
    waveform = 0.1 * torch.randn(args.batch_size, n_samples, generator=torch.Generator().manual_seed(0))
    # Our recipes, then those of the peers.
    recipes = {
        f"ours {preset} /{every}": OurStep(build(preset, args.mel), discriminator_every=every)
        for preset in ("medium", "small")
        for every in (1, 2)
    }
    recipes["ours medium full"] = OurStep(build("medium", args.mel), discriminator="full")
    # The size of the discriminators decides what a step costs.
    for name in ("ours medium /1", "ours medium full"):
        print(f"discriminators: {name} {count(recipes[name].adversary.discriminator)}", end=", ")
    peers = {
        "vocos": VocosRecipe(settings),
        "hifigan": HifiGANRecipe(build("hifigan-v1", args.mel), settings),
    }
    print(", ".join(f"{name} {count(recipe.discriminators)}" for name, recipe in peers.items()))

    # Two steps per repeat, so that "/2" updates its discriminator once.
    def two_steps(recipe: OurStep | VocosRecipe | HifiGANRecipe) -> Callable[[], None]:
        def run() -> None:
            recipe.step(waveform)
            recipe.step(waveform)

        return run

    times = interleave({name: two_steps(recipe) for name, recipe in {**recipes, **peers}.items()}, args.repeats)
    report("training step", times, unit=2, n_ours=len(recipes))


if __name__ == "__main__":
    arguments = parse_arguments(BenchmarkArguments, None, __doc__ or "")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    with explained_errors(logging.getLogger("benchmark")):
        if arguments.quality or arguments.run_dirs:
            quality(arguments)
        else:
            if arguments.only != "training":
                inference(arguments)
            if arguments.only != "inference":
                training(arguments)
