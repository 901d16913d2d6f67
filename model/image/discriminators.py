"""Discriminators for images.  B batch, Y X rows and columns.

A discriminator returns (list of logit maps, one per sub-discriminator; list of feature maps) and knows nothing of the
generator. There is no batch norm: samples stay independent, R1 and accumulation stay exact. Spectral norm is frozen in
every forward; `update_spectral_norms` advances the power iteration once per update, so that it does not depend on the
number of forwards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from utils.flags.choices import DiscriminatorKind
from utils.options import suggest

LEAKY_SLOPE = 0.2  # of the leaky ReLU, as in DCGAN and pix2pix


class Discriminator(nn.Module):
    """Abstract discriminator: `forward(image)` returns (list of logits, list of feature maps)."""

    def train(self, mode: bool = True) -> "Discriminator":
        """As `nn.Module.train`, but the power iterations of the spectral norms stay off."""
        super().train(mode)
        # In evaluation mode a spectral norm keeps its singular vectors and does not iterate.
        for module in self.modules():
            if is_parametrized(module):
                module.parametrizations.eval()
        return self

    @torch.no_grad()
    def update_spectral_norms(self) -> None:
        """One power iteration of every spectral norm; call it once per discriminator update."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                module.parametrizations.train()
                _ = module.weight  # computing the weight in training mode advances the iteration
                module.parametrizations.eval()


def convolution(
    in_channels: int,
    channels: int,
    kernel_size: int,
    *,
    stride: int,
    use_spectral_norm: bool,
    kind: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d,
) -> nn.Module:
    """A padded convolution with He initialisation for leaky ReLU, under spectral norm where asked."""
    # Kernel 4 with stride 2 halves a side, rounded down; kernel 3 with stride 1 keeps it.
    conv = kind(in_channels, channels, kernel_size, stride=stride, padding=(kernel_size - 1) // 2)
    nn.init.kaiming_normal_(conv.weight, a=LEAKY_SLOPE)
    nn.init.zeros_(conv.bias)
    return parametrizations.spectral_norm(conv) if use_spectral_norm else conv


class PatchDiscriminator(Discriminator):
    """Logits per patch (arXiv 1611.07004): 4x4 convolutions of stride 2 with leaky ReLU, then a 3x3 to one channel.

    Args:
        channels: width of the first layer; doubles per layer up to 8 times.
        n_layers: layers of stride 2; a logit sees 2**n_layers * 5 - 2 pixels.
        use_spectral_norm: bound the spectral norm of every kernel by 1 (arXiv 1802.05957).
    """

    def __init__(self, channels: int = 32, n_layers: int = 3, use_spectral_norm: bool = False):
        super().__init__()
        widths = [3] + [channels * min(2**i, 8) for i in range(n_layers)]  # RGB in
        self.layers = nn.ModuleList(
            convolution(width, out_width, 4, stride=2, use_spectral_norm=use_spectral_norm)
            for width, out_width in zip(widths, widths[1:])
        )
        self.head = convolution(widths[-1], 1, 3, stride=1, use_spectral_norm=use_spectral_norm)
        # New spectral norms are in training mode; this freezes them.
        self.eval()

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Args: image: (B, 3, Y, X) in [-1, 1], sides at least 2**n_layers.
        Returns: [logits (B, 1, y, x)], one feature map per layer."""
        if min(image.shape[-2:]) < 2 ** len(self.layers):
            raise ValueError(
                f"an image of {image.shape[-2]}x{image.shape[-1]} pixels is too small for a discriminator of "
                f"{len(self.layers)} layers: each side needs {2 ** len(self.layers)} pixels"
            )
        # Layers of stride 2, whose outputs are the features; then one logit per patch.
        x = image.contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE)
            features.append(x)  # (B, C, y, x), half the side of the layer before
        return [self.head(x)], features


class MultiScaleDiscriminator(Discriminator):
    """Patch discriminators on the image and on its halves (arXiv 1711.11585).

    Args:
        channels, n_layers, use_spectral_norm: of each `PatchDiscriminator`.
        n_scales: number of sub-discriminators; the last one sees the image 2**(n_scales - 1) times smaller.
    """

    def __init__(self, channels: int = 32, n_layers: int = 3, use_spectral_norm: bool = False, *, n_scales: int = 2):
        super().__init__()
        # Equal sub-discriminators that share no weights.
        self.scales = nn.ModuleList(PatchDiscriminator(channels, n_layers, use_spectral_norm) for _ in range(n_scales))
        self.eval()

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Args: image: (B, 3, Y, X) in [-1, 1], sides at least 2**(n_layers + n_scales - 1).
        Returns: logits (B, 1, y, x) per scale, feature maps of all scales."""
        logits: list[Tensor] = []
        features: list[Tensor] = []
        for i, scale in enumerate(self.scales):
            if i > 0:
                image = F.avg_pool2d(image, 2)  # half the side of the scale before
            scale_logits, scale_features = scale(image)
            logits += scale_logits
            features += scale_features
        return logits, features


# By name; all take (channels, n_layers, use_spectral_norm).
DISCRIMINATORS: dict[DiscriminatorKind, type] = {"patch": PatchDiscriminator, "multi_scale": MultiScaleDiscriminator}


def build_discriminator(
    kind: DiscriminatorKind, channels: int = 32, n_layers: int = 3, *, use_spectral_norm: bool = False
) -> Discriminator:
    """A discriminator by name; ValueError with a suggestion for an unknown one."""
    if kind not in DISCRIMINATORS:
        raise ValueError(f"discriminator {kind!r} is not known{suggest(kind, DISCRIMINATORS)}")
    return DISCRIMINATORS[kind](channels, n_layers, use_spectral_norm)
