"""Discriminators for log-mels.  B batch, M mel bins, F mel frames, C channels.

They see mels normalised per mel bin, so that values are about unit; the statistics are buffers. As those for images
they return (list of logit maps, list of feature maps), have no batch norm, and advance spectral norms once per update.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.image.discriminators import LEAKY_SLOPE, Discriminator, convolution
from utils.flags.choices import MelDiscriminatorKind
from utils.options import suggest


class MelDiscriminator(Discriminator):
    """Abstract patch discriminator (arXiv 1611.07004): strided convolutions with leaky ReLU, then one to one channel.

    Subclasses state the convolution, the channels of a normalised mel, and bring it into the shape they take.

    Args:
        band_mean, band_std: statistics of the mel bins, (M,) each.
        channels: width of the first layer; doubles per layer up to 8 times.
        n_layers: layers of stride 2.
        use_spectral_norm: bound the spectral norm of every kernel by 1 (arXiv 1802.05957).
    """

    convolution: type[nn.Conv1d] | type[nn.Conv2d]
    band_mean: Tensor
    band_std: Tensor

    def __init__(
        self,
        band_mean: Tensor,
        band_std: Tensor,
        *,
        channels: int = 32,
        n_layers: int = 3,
        use_spectral_norm: bool = False,
    ):
        super().__init__()
        # (M, 1), for every frame of a mel.
        self.register_buffer("band_mean", band_mean.detach().clone()[:, None])
        self.register_buffer("band_std", band_std.detach().clone()[:, None])
        widths = [self.in_channels(len(band_mean))] + [channels * min(2**i, 8) for i in range(n_layers)]
        # Layers of stride 2, then one convolution to the logits.
        layer = partial(convolution, kind=self.convolution, use_spectral_norm=use_spectral_norm)
        self.layers = nn.ModuleList(
            layer(width, out_width, 4, stride=2) for width, out_width in zip(widths, widths[1:])
        )
        self.head = layer(widths[-1], 1, 3, stride=1)
        self.eval()  # freezes new spectral norms

    def in_channels(self, n_mels: int) -> int:
        """Channels that the first layer takes."""
        raise NotImplementedError

    def arrange(self, mel: Tensor) -> Tensor:
        """A normalised mel (B, M, F) in the shape that the first layer takes."""
        raise NotImplementedError

    def forward(self, mel: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Args: mel: log-mel (B, M, F), F (and M for `patch_2d`) at least 2**n_layers.
        Returns: [logits (B, 1, ...)], one feature map per layer."""
        x = self.arrange((mel - self.band_mean) / self.band_std)  # (B, M, F) or (B, 1, M, F)
        if min(x.shape[2:]) < 2 ** len(self.layers):
            raise ValueError(
                f"a mel of {mel.shape[1]} bins and {mel.shape[2]} frames is too small for a discriminator of "
                f"{len(self.layers)} layers: it needs {2 ** len(self.layers)} frames"
                + (", and as many bins" if x.ndim == 4 else "")
            )
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE)
            features.append(x)  # half the frames (and bins) of the layer before
        return [self.head(x)], features


class MelPatchDiscriminator1d(MelDiscriminator):
    """Mel bins as channels: a logit sees all bins of 2**n_layers * 5 - 2 frames; logits are (B, 1, f)."""

    convolution = nn.Conv1d

    def in_channels(self, n_mels):
        return n_mels

    def arrange(self, mel):
        return mel


class MelPatchDiscriminator2d(MelDiscriminator):
    """The mel as an image: a logit sees 2**n_layers * 5 - 2 bins and frames; logits are (B, 1, m, f)."""

    convolution = nn.Conv2d

    def in_channels(self, n_mels):
        return 1

    def arrange(self, mel):
        return mel[:, None].contiguous(memory_format=torch.channels_last)  # (B, 1, M, F)


MEL_DISCRIMINATORS: dict[MelDiscriminatorKind, type] = {
    "patch_1d": MelPatchDiscriminator1d,
    "patch_2d": MelPatchDiscriminator2d,
}


def build_mel_discriminator(
    kind: MelDiscriminatorKind,
    band_mean: Tensor,
    band_std: Tensor,
    *,
    channels: int,
    n_layers: int,
    use_spectral_norm: bool = False,
) -> MelDiscriminator:
    """A discriminator by name; ValueError with a suggestion for an unknown one."""
    if kind not in MEL_DISCRIMINATORS:
        raise ValueError(f"discriminator {kind!r} is not known{suggest(kind, MEL_DISCRIMINATORS)}")
    return MEL_DISCRIMINATORS[kind](
        band_mean, band_std, channels=channels, n_layers=n_layers, use_spectral_norm=use_spectral_norm
    )
