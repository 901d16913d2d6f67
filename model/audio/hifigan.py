"""The generator of HiFi-GAN (arXiv 2010.05646), second choice of the vocoder: transposed convolutions from frame rate
to sample rate, each followed by the mean of several residual stacks with different fields of view (multi-receptive
field fusion). B batch, M mel bins, F frames, C channels, S samples.

Kept for comparison and for weights trained elsewhere; on a CPU it runs some twenty times slower than "istft".
"""

import math

import torch
from torch import Tensor, nn

from model.checkpointing import GradientCheckpointingLayer

SLOPE = 0.1  # Of the leaky rectifier.


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a learned frequency a per channel, a periodic activation (arXiv 2006.08195).

    Args:
        width: channels C.
    """

    def __init__(self, width: int):
        super().__init__()
        self.log_frequency = nn.Parameter(torch.zeros(width, 1))  # a = exp(this) > 0, 1 at the start

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S) -> (B, C, S)."""
        frequency = self.log_frequency.exp()
        return x + torch.sin(frequency * x).square() / frequency


def activation(kind: str, width: int) -> nn.Module:
    """The activation that `hifigan_activation` names."""
    return Snake(width) if kind == "snake" else nn.LeakyReLU(SLOPE)


class ResidualStack(GradientCheckpointingLayer):
    """Three residual pairs of convolutions, the first of each dilated by 1, 3, 5 (the paper's ResBlock1).

    Args:
        width: channels C.
        kernel_size: samples that a convolution sees, odd.
        kind: activation.
    """

    dilations = (1, 3, 5)

    def __init__(self, width: int, kernel_size: int, kind: str):
        super().__init__()
        side = kernel_size // 2  # padding that keeps the length
        self.dilated = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size, padding=side * dilation, dilation=dilation)
            for dilation in self.dilations
        )
        self.plain = nn.ModuleList(nn.Conv1d(width, width, kernel_size, padding=side) for _ in self.dilations)
        # Two per pair: before the dilated convolution and before the plain one.
        self.activations = nn.ModuleList(activation(kind, width) for _ in range(2 * len(self.dilations)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S) -> (B, C, S)."""
        # x + plain(activation(dilated(activation(x)))), once per dilation.
        for i, (dilated, plain) in enumerate(zip(self.dilated, self.plain, strict=True)):
            y = dilated(self.activations[2 * i](x))
            x = x + plain(self.activations[2 * i + 1](y))
        return x


class HiFiGANGenerator(nn.Module):
    """Architecture "hifigan".

    Args:
        config: see `VocoderConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, kind = config.hifigan_width, config.hifigan_activation
        # Width after each upsampling: half of that before.
        widths = [C // 2 ** (i + 1) for i in range(len(config.hifigan_factors))]
        self.stem = nn.Conv1d(config.n_mels, C, 7, padding=3)
        self.ups, self.stacks, self.activations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        # Per upsampling: activation, transposed convolution, one residual stack per kernel size.
        for factor, before, after in zip(config.hifigan_factors, [C, *widths], widths, strict=False):
            self.activations.append(activation(kind, before))
            # A kernel of twice the factor, or one more where the factor is odd: the length is exactly multiplied.
            kernel = 2 * factor + factor % 2
            self.ups.append(nn.ConvTranspose1d(before, after, kernel, factor, padding=(kernel - factor) // 2))
            self.stacks.append(
                nn.ModuleList(ResidualStack(after, kernel, kind) for kernel in config.hifigan_kernel_sizes)
            )
        # One channel, the waveform.
        self.activations.append(activation(kind, widths[-1]))
        self.out = nn.Conv1d(widths[-1], 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, M, F) -> (B, F * hop_length) in [-1, 1]."""
        x = self.stem(mel)  # (B, C, F)
        for before, up, stacks in zip(self.activations, self.ups, self.stacks, strict=False):
            x = up(before(x))  # half the channels, more samples
            # Multi-receptive field fusion: the mean over kernel sizes.
            x = torch.stack([stack(x) for stack in stacks]).mean(0)
        # (B, 1, S) -> (B, S), fp32.
        return torch.tanh(self.out(self.activations[-1](x))[:, 0].float())

    def chunk_arguments(self, mel: Tensor, chunk_frames: int) -> dict[str, Tensor]:
        """What the pieces of a long mel take from the whole: nothing."""
        return {}

    @property
    def context_frames(self) -> int:
        """Frames on either side that a frame's samples depend on."""
        largest = max(self.config.hifigan_kernel_sizes)
        samples, rate = 3.0, 1.0  # In frames: the stem.
        for factor in self.config.hifigan_factors:
            rate *= factor  # samples per frame after this upsampling
            # Reach of the widest stack in samples: its dilated convolutions and as many plain ones.
            steps = largest // 2 * (sum(ResidualStack.dilations) + len(ResidualStack.dilations))
            samples += 1 + steps / rate  # 1: bounds the reach of the transposed convolution
        return math.ceil(samples + 3 / rate)  # 3: the last convolution
