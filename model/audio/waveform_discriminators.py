"""Discriminators for waveforms.  B batch, S samples, P period, R rows of a period, C channels, K bins, F frames.

A discriminator returns (list of logit maps, one per sub-discriminator; list of feature maps) and knows nothing of the
generator. Feature maps are those of all layers but the first, the largest and least telling one, and the logits. There
is no batch norm: samples stay independent, accumulation stays exact. All convolutions are 2-D and channels last, with
the long axis last, which is the fastest layout on CPUs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from model.audio.spectral import Spectrogram, mirror_ends
from utils.flags.choices import WaveformDiscriminatorKind
from utils.options import suggest

LEAKY_SLOPE = 0.1  # as in HiFi-GAN
Maps = tuple[list[Tensor], list[Tensor]]


def convolution(
    in_channels: int, channels: int, kernel: tuple[int, int], *, stride: tuple[int, int], use_weight_norm: bool
) -> nn.Module:
    """A padded convolution with He initialisation for leaky ReLU, under weight norm (arXiv 1602.07868) where asked."""
    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding)
    nn.init.kaiming_normal_(conv.weight, a=LEAKY_SLOPE)
    nn.init.zeros_(conv.bias)
    conv = conv.to(memory_format=torch.channels_last)
    return parametrizations.weight_norm(conv) if use_weight_norm else conv


class PeriodDiscriminator(nn.Module):
    """Sees every P-th sample (arXiv 2010.05646): the waveform folded to P columns, which never mix.

    Args:
        period: P, in samples.
        widths: channels of the layers of kernel 5.
        strides: their strides along a column.
        use_weight_norm: reparametrise all kernels.
    """

    def __init__(self, period: int, widths: Sequence[int], strides: Sequence[int], *, use_weight_norm: bool = False):
        super().__init__()
        self.period = period
        # Kernels of one row: the P phases never mix.
        self.layers = nn.ModuleList(
            convolution(width, out_width, (1, 5), stride=(1, stride), use_weight_norm=use_weight_norm)
            for width, out_width, stride in zip([1, *widths], widths, strides)
        )
        self.head = convolution(widths[-1], 1, (1, 3), stride=(1, 1), use_weight_norm=use_weight_norm)

    def forward(self, waveform: Tensor) -> Maps:
        """Args: waveform: (B, S).
        Returns: [logits (B, 1, P, r)], the feature maps of all layers but the first, the logits among them."""
        B, S = waveform.shape
        # Extended to whole periods and folded: row p has the samples p, p + P, p + 2 P, ...
        x = mirror_ends(waveform, 0, -S % self.period) if S % self.period else waveform
        x = x.view(B, 1, -1, self.period).transpose(2, 3).contiguous(memory_format=torch.channels_last)  # (B, 1, P, R)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE)
            features.append(x)
        logits = self.head(x)
        return [logits], [*features[1:], logits]


class ResolutionDiscriminator(nn.Module):
    """Sees the complex spectrogram of one resolution, split into bands (arXiv 2306.06546) where asked.

    Args:
        n_fft: samples of a frame; frames are n_fft / 4 apart.
        layers: channels, kernel (frames, bins) and stride of each layer.
        bands: edges of the bands as shares of all bins; (0, 1): one band.
        compression: magnitudes are raised to this power, phases stay; 1: none. It lifts quiet harmonics beside loud
            ones (arXiv 1811.07030).
        normalize: bring waveforms to mean 0 and peak 0.8 first.
        use_weight_norm: reparametrise all kernels.
    """

    power_floor = 1e-5  # Added to squared magnitudes, in units of white noise of variance 1.

    def __init__(
        self,
        n_fft: int,
        layers: Sequence[tuple[int, tuple[int, int], tuple[int, int]]],
        *,
        bands: Sequence[float] = (0.0, 1.0),
        compression: float = 1.0,
        normalize: bool = False,
        use_weight_norm: bool = False,
    ):
        super().__init__()
        self.spectrogram = Spectrogram(n_fft, n_fft // 4)
        self.scale = (3 / 8 * n_fft) ** -0.5  # Of a periodic Hann window.
        self.compression, self.normalize = compression, normalize
        # Bands as ranges of bins, with layers of their own; the head is common.
        edges = [round(share * (n_fft // 2 + 1)) for share in bands]
        self.bands = list(zip(edges, edges[1:]))
        widths = [2, *(layer[0] for layer in layers)]
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                convolution(width, out_width, kernel, stride=stride, use_weight_norm=use_weight_norm)
                for width, (out_width, kernel, stride) in zip(widths, layers)
            )
            for _ in self.bands
        )
        self.head = convolution(widths[-1], 1, (3, 3), stride=(1, 1), use_weight_norm=use_weight_norm)

    def spectrum(self, waveform: Tensor) -> Tensor:
        """(B, S) -> (B, 2, F, K) real and imaginary parts, channels last."""
        # Mean 0, peak 0.8, whatever the loudness.
        if self.normalize:
            waveform = waveform - waveform.mean(-1, keepdim=True)
            waveform = 0.8 * waveform / (waveform.abs().amax(-1, keepdim=True) + 1e-9)
        spectrum = self.spectrogram(waveform).transpose(1, 2)  # (B, F, K)
        x = torch.view_as_real(spectrum).permute(0, 3, 1, 2)
        if self.compression == 1:
            return x
        # X |X|^(c - 1) has the phase of X and its magnitude to the power c.
        power = (x.square().sum(1, keepdim=True) * self.scale**2) + self.power_floor
        return x * (self.scale * power.pow(0.5 * (self.compression - 1)))

    def forward(self, waveform: Tensor) -> Maps:
        """Args: waveform: (B, S).
        Returns: [logits (B, 1, f, k)], per band the feature maps of all layers but the first, and the logits."""
        x = self.spectrum(waveform.float())
        ends, features = [], []
        for (low, high), stack in zip(self.bands, self.stacks):
            band = x[..., low:high]  # (B, 2, F, bins of the band)
            for i, layer in enumerate(stack):
                band = F.leaky_relu(layer(band), LEAKY_SLOPE)
                if i > 0:
                    features.append(band)
            ends.append(band)
        # The bands' last maps side by side, along frequency.
        logits = self.head(torch.cat(ends, dim=-1) if len(ends) > 1 else ends[0])
        return [logits], [*features, logits]


class WaveformDiscriminator(nn.Module):
    """Several sub-discriminators side by side.

    Args:
        parts: modules, waveform (B, S) -> (logits, feature maps).
        min_samples: the shortest waveform that all of them take.
    """

    def __init__(self, parts: Sequence[nn.Module], min_samples: int):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.min_samples = min_samples

    def forward(self, waveform: Tensor) -> Maps:
        """Args: waveform: (B, S).
        Returns: logits and feature maps of all sub-discriminators.
        Raises: ValueError: the waveform is too short."""
        if waveform.shape[-1] < self.min_samples:
            raise ValueError(
                f"a waveform of {waveform.shape[-1]} samples is too short for this discriminator: it needs "
                f"{self.min_samples}; raise --segment_frames, or take smaller --discriminator_periods and "
                "--discriminator_resolutions"
            )
        logits: list[Tensor] = []
        features: list[Tensor] = []
        for part in self.parts:
            part_logits, part_features = part(waveform)
            logits += part_logits
            features += part_features
        return logits, features


# "full" has the layers of HiFi-GAN's multi-period (arXiv 2010.05646) and of Vocos' multi-resolution discriminator
# (arXiv 2306.00814); "thin" takes about a hundredth of its operations.
DISCRIMINATORS: dict[WaveformDiscriminatorKind, dict] = {
    "thin": {
        "periods": (2, 5, 11),
        "resolutions": (512, 1024, 2048),
        "period": {"widths": (16, 32, 64, 128), "strides": (3, 3, 3, 3)},
        "resolution": {
            # Channels, kernel (frames, bins), stride.
            "layers": ((16, (3, 5), (2, 2)), (32, (3, 3), (2, 2)), (64, (3, 3), (2, 2))),
            "compression": 0.3,
        },
    },
    "full": {
        "periods": (2, 3, 5, 7, 11),
        "resolutions": (512, 1024, 2048),
        "period": {"widths": (32, 128, 512, 1024, 1024), "strides": (3, 3, 3, 3, 1), "use_weight_norm": True},
        "resolution": {
            "layers": ((32, (3, 9), (1, 1)), *((32, (3, 9), (1, 2)),) * 3, (32, (3, 3), (1, 1))),
            "bands": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
            "normalize": True,
            "use_weight_norm": True,
        },
    },
}


def build_waveform_discriminator(
    kind: WaveformDiscriminatorKind,
    periods: Sequence[int] | None = None,
    resolutions: Sequence[int] | None = None,
    *,
    widening: float = 1.0,
) -> WaveformDiscriminator:
    """A discriminator by name.

    Args:
        kind: row of `DISCRIMINATORS`.
        periods: periods in samples; None: the row's. An empty list: no period discriminators.
        resolutions: samples of a frame, multiples of 4; None: the row's. An empty list: none.
        widening: factor of all channels.
    Raises:
        ValueError: an unknown name, no part at all, or a number that cannot be.
    """
    if kind not in DISCRIMINATORS:
        raise ValueError(f"discriminator {kind!r} is not known{suggest(kind, DISCRIMINATORS)}")
    row = DISCRIMINATORS[kind]
    periods = row["periods"] if periods is None else periods
    resolutions = row["resolutions"] if resolutions is None else resolutions
    if not periods and not resolutions:
        raise ValueError("a discriminator without periods and resolutions sees nothing; give at least one of them")
    if any(period < 1 for period in periods):
        raise ValueError(f"discriminator periods {list(periods)} must be > 0")
    if any(n_fft < 16 or n_fft % 8 for n_fft in resolutions):
        raise ValueError(f"discriminator resolutions {list(resolutions)} must be multiples of 8, at least 16")
    # The row's channels, widened.
    widths = [max(1, round(width * widening)) for width in row["period"]["widths"]]
    layers = [(max(1, round(width * widening)), *layer) for width, *layer in row["resolution"]["layers"]]
    parts: list[nn.Module] = [PeriodDiscriminator(period, **{**row["period"], "widths": widths}) for period in periods]
    parts += [ResolutionDiscriminator(n_fft, **{**row["resolution"], "layers": layers}) for n_fft in resolutions]
    # The shortest waveform: one period, and more samples than reflection adds.
    return WaveformDiscriminator(parts, max([*periods, *(3 * n_fft // 8 + 1 for n_fft in resolutions)]))
