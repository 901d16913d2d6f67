"""The peers of our vocoder with random weights, and their published training steps.

Vocos (arXiv 2306.00814): the modules of its package, its losses, AdamW(0.8, 0.9) at 5e-4, mel weight 45, weight
0.1 of the multi-resolution discriminator. HiFi-GAN V1 (arXiv 2010.05646): our `hifigan-v1`, the multi-period
discriminator of Vocos' package (the same layers), a multi-scale discriminator written here, squared losses, AdamW(0.8,
0.99) at 2e-4, mel weight 45, feature matching 2. In both, the step of the discriminator has its own forward pass
of the generator.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from model.audio.spectral import LogMel, MelSettings

MEL_WEIGHT = 45.0  # of the mel loss, in both recipes
# Logits of real and of generated waveforms, then the feature maps of both.
Scores = tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[list[Tensor]]]


class Vocos(nn.Module):
    """Vocos' backbone and head on our log-mel.

    Args:
        mel: definition of the log-mel.
        dim, intermediate_dim, n_layers: as published for the mel vocoder.
    """

    def __init__(self, mel: MelSettings, *, dim: int = 512, intermediate_dim: int = 1536, n_layers: int = 8):
        super().__init__()
        from vocos.heads import ISTFTHead
        from vocos.models import VocosBackbone

        self.backbone = VocosBackbone(mel.n_mels, dim, intermediate_dim, n_layers)
        self.head = ISTFTHead(dim, mel.n_fft, mel.hop_length, padding="same")

    def forward(self, mel: Tensor) -> Tensor:
        """(B, M, F) -> (B, F * hop_length)."""
        return self.head(self.backbone(mel))


class TransposedInput(nn.Module):
    """transformers' SpeechT5HifiGan with the sizes of HiFi-GAN V1, whose input is (B, F, M)."""

    def __init__(self, mel: MelSettings):
        super().__init__()
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

        sizes = {"upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4]}
        config = SpeechT5HifiGanConfig(model_in_dim=mel.n_mels, sampling_rate=mel.sample_rate, **sizes)
        config.normalize_before = False  # No statistics of a data set are needed.
        self.network = SpeechT5HifiGan(config)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, M, F) -> (B, F * 256)."""
        return self.network(mel.transpose(1, 2))


class ScaleDiscriminator(nn.Module):
    """One scale of MelGAN's discriminator with the sizes of HiFi-GAN: grouped strided convolutions of the waveform."""

    #         in, out, kernel, stride, groups
    LAYERS = (
        (1, 128, 15, 1, 1),
        (128, 128, 41, 2, 4),
        (128, 256, 41, 2, 16),
        (256, 512, 41, 4, 16),
        (512, 1024, 41, 4, 16),
        (1024, 1024, 41, 1, 16),
        (1024, 1024, 5, 1, 1),
        (1024, 1, 3, 1, 1),
    )

    def __init__(self, norm: Callable):
        super().__init__()
        rows = self.LAYERS
        self.layers = nn.ModuleList([norm(nn.Conv1d(i, o, k, s, k // 2, groups=g)) for i, o, k, s, g in rows])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 1, S) -> logits (B, S'), feature maps."""
        maps = []  # also the input of feature matching
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.1)
            maps.append(x)
        maps.append(self.layers[-1](x))
        return maps[-1].flatten(1), maps


class MultiScaleDiscriminator(nn.Module):
    """Three scales, each at half the rate of the previous one, with the interface of Vocos' discriminators."""

    def __init__(self):
        super().__init__()
        self.discriminators = nn.ModuleList(map(ScaleDiscriminator, (spectral_norm, weight_norm, weight_norm)))

    def forward(self, y: Tensor, y_hat: Tensor) -> Scores:
        """Real and generated (B, S) -> logits of both, feature maps of both."""
        outputs = []  # logits and feature maps of the real, then of the generated waveform
        for waveform in (y, y_hat):
            x, scales = waveform[:, None], []
            for discriminator in self.discriminators:
                scales.append(discriminator(x))
                x = F.avg_pool1d(x, 4, 2, padding=2)
            outputs += list(zip(*scales))
        return list(outputs[0]), list(outputs[2]), list(outputs[1]), list(outputs[3])


class PeerRecipe:
    """A generator and its discriminators with their optimizers; `step` is one training step.

    Args:
        generator: mel -> waveform.
        mel: the log-mel that the generator reads.
        discriminators: pairs (module, weight); a module takes real and generated waveforms.
        learning_rate, betas: of AdamW, for generator and discriminators.
    """

    feature_matching_weight = 1.0

    def __init__(self, generator: nn.Module, mel: MelSettings, *, discriminators, learning_rate: float, betas):
        self.generator, self.log_mel = generator, LogMel(mel)
        self.weights = [weight for _, weight in discriminators]
        self.discriminators = nn.ModuleList(module for module, _ in discriminators)
        self.mel_loss = self.build_mel_loss(mel)
        modules = (generator, self.discriminators)
        self.optimizers = [torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=betas) for module in modules]
        self.peak = learning_rate

    def build_mel_loss(self, mel: MelSettings) -> Callable[[Tensor, Tensor], Tensor]:
        """L1 between log-mels of two waveforms."""
        return lambda fake, real: (self.log_mel(fake) - self.log_mel(real)).abs().mean()

    def discriminator_loss(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def generator_loss(self, fake: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def feature_matching(self, real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
        """Sum over all feature maps of their mean absolute difference."""
        pairs = [pair for maps in zip(real, fake) for pair in zip(*maps)]
        return sum((first.detach() - second).abs().mean() for first, second in pairs)

    def to(self, device: torch.device) -> "PeerRecipe":
        """Move all modules to a device; to be called before the first step."""
        for module in (self.generator, self.discriminators, self.log_mel, self.mel_loss):
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    def set_rate(self, factor: float) -> None:
        """Set both learning rates to `factor` times their peak."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak * factor

    def step(self, waveform: Tensor) -> dict[str, float]:
        """One step of discriminators and generator on waveforms (B, S); returns the losses."""
        mel = self.log_mel(waveform)
        for_generator, for_discriminators = self.optimizers
        # Discriminators, on a waveform without gradient.
        with torch.no_grad():
            fake = self.generator(mel)
        loss = waveform.new_zeros(())
        for module, weight in zip(self.discriminators, self.weights):
            real_logits, fake_logits, _, _ = module(waveform, fake)
            loss = loss + weight * self.discriminator_loss(real_logits, fake_logits)
        for_discriminators.zero_grad()
        loss.backward()
        for_discriminators.step()

        # Generator: mel loss, adversarial loss and feature matching.
        fake = self.generator(mel)
        mel_loss = self.mel_loss(fake, waveform)
        total = MEL_WEIGHT * mel_loss
        for module, weight in zip(self.discriminators, self.weights):
            _, fake_logits, real_maps, fake_maps = module(waveform, fake)
            matching = self.feature_matching_weight * self.feature_matching(real_maps, fake_maps)
            total = total + weight * (self.generator_loss(fake_logits) + matching)
        for_generator.zero_grad()
        # Gradients for the generator alone: those of the discriminators would not be used.
        total.backward(inputs=list(self.generator.parameters()))
        for_generator.step()
        return {"mel": mel_loss.item(), "discriminator": loss.item(), "generator": total.item()}


class VocosRecipe(PeerRecipe):
    """Hinge losses, means over sub-discriminators, and the mel loss of Vocos' package."""

    def __init__(self, mel: MelSettings, learning_rate: float = 5e-4):
        from vocos.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator

        discriminators = [(MultiPeriodDiscriminator(), 1.0), (MultiResolutionDiscriminator(), 0.1)]
        super().__init__(Vocos(mel), mel, discriminators=discriminators, learning_rate=learning_rate, betas=(0.8, 0.9))

    def build_mel_loss(self, mel):
        from vocos.loss import MelSpecReconstructionLoss

        with warnings.catch_warnings():  # Some of its 100 filters are empty at 16 kHz.
            warnings.simplefilter("ignore", UserWarning)
            return MelSpecReconstructionLoss(mel.sample_rate)

    def discriminator_loss(self, real, fake):
        return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / len(real)

    def generator_loss(self, fake):
        return sum(F.relu(1 - logits).mean() for logits in fake) / len(fake)

    def feature_matching(self, real, fake):
        return super().feature_matching(real, fake) / len(real)


class HifiGANRecipe(PeerRecipe):
    """Squared losses, summed over sub-discriminators.

    Args: generator: HiFi-GAN V1.
    """

    feature_matching_weight = 2.0

    def __init__(self, generator: nn.Module, mel: MelSettings, learning_rate: float = 2e-4):
        from vocos.discriminators import MultiPeriodDiscriminator

        discriminators = [(MultiPeriodDiscriminator(), 1.0), (MultiScaleDiscriminator(), 1.0)]
        super().__init__(generator, mel, discriminators=discriminators, learning_rate=learning_rate, betas=(0.8, 0.99))

    def discriminator_loss(self, real, fake):
        return sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake))

    def generator_loss(self, fake):
        return sum((1 - logits).square().mean() for logits in fake)
