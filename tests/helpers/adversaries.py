"""A small adversary and what it plays with."""

import torch

from model.image.discriminators import build_discriminator
from utils.training.adversary import Adversary
from utils.training.arguments.image_vae import ImageVAEGANArguments


def make(**changes):
    values = {"gan_start_step": 0, "gan_warmup_steps": 0, "gan_ramp_steps": 0, "max_grad_norm": 0.0, **changes}
    torch.manual_seed(0)
    discriminator = build_discriminator("patch", 8, 2, use_spectral_norm=changes.get("use_spectral_norm", False))
    adversary = Adversary(discriminator, ImageVAEGANArguments(**values))
    adversary.prepare(torch.device("cpu"), "constant", 100)
    return adversary


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    real, fake, gradient = (torch.randn(n, 3, 16, 16, generator=generator) for _ in range(3))
    return fake.requires_grad_(), real, gradient / fake.numel()


def flat_gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])
