"""Image VAE.  B batch, Y X rows and columns, D width of a stage, P patch side, Z latent channels.

Architecture "residual", built for few operations at full resolution:
- a linear path beside the network: every f x f patch of the image (f the compression) is projected on its Z lowest
  cosine patterns, the best fixed code of smooth patches, and back. It starts there and is trained. The network's own
  output starts at zero, so that training starts from a working codec and learns what the linear code misses;
- the stem is a pixel-unshuffle: the first convolution runs on (Y/P, X/P), the last image is a pixel-shuffle;
- stages change resolution by space-to-channel with a shortcut that has no parameters (DC-AE, arXiv 2410.10733,
  section 3): averaged groups of channels on the way down, repeated channels on the way up;
- residual blocks have one 3x3 and one 1x1 convolution and start as the identity.
Architecture "ldm" (`ldm_vae.py`) is the one of latent diffusion and loads diffusers' AutoencoderKL weights.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import initialization

from model.checkpointing import GradientCheckpointingLayer
from model.image.ldm_vae import LDMDecoder, LDMEncoder, config_from_diffusers, rename_diffusers_weights
from model.layers import ChannelNorm, Downsample, Upsample, ZeroConv2d
from model.presets import IMAGE_VAE
from model.vae import VAE
from utils.options import from_preset, option
from utils.strict_config import StrictConfig


class ImageVAEConfig(StrictConfig):
    """Configuration of `ImageVAE`. Lists run from the finest stage to the coarsest, for encoder and decoder alike."""

    model_type = "image_vae"

    architecture: Literal["residual", "ldm"] = option(
        "residual", "network; ldm loads diffusers' AutoencoderKL weights"
    )
    # Images and latents.
    image_size: int = option(256, "side of the training images in pixels; any multiple of the compression works", gt=0)
    latent_channels: int = option(16, "latent channels Z", gt=0)
    patch_size: int = option(4, "side P of the stem's pixel-unshuffle in pixels; 1 for ldm", gt=0)

    # Network.
    encoder_widths: list[int] = option([64, 128], "channels of the encoder's stages", gt=0)
    decoder_widths: list[int] = option([64, 128], "channels of the decoder's stages", gt=0)
    n_encoder_blocks: list[int] = option([1, 1], "residual blocks of the encoder's stages", ge=0)
    n_decoder_blocks: list[int] = option([1, 2], "residual blocks of the decoder's stages", ge=0)
    n_norm_groups: int = option(32, "groups of each GroupNorm", gt=0, only_with=("architecture", "ldm"))
    use_quant_conv: bool = option(
        False, "1x1 convolutions on both sides of the latents", only_with=("architecture", "ldm")
    )

    @property
    def compression(self) -> int:
        """Image side over latent side: the stem's patch and a factor 2 between stages."""
        return self.patch_size * 2 ** (len(self.encoder_widths) - 1)

    def validate_stages(self):
        for name in ("decoder_widths", "n_encoder_blocks", "n_decoder_blocks"):
            if len(getattr(self, name)) != len(self.encoder_widths):
                raise ValueError(
                    f"{name}={getattr(self, name)} must have as many entries as encoder_widths={self.encoder_widths}"
                )

    def validate_architecture(self):
        if self.architecture == "ldm":
            if self.patch_size != 1:
                raise ValueError(f"patch_size={self.patch_size} must be 1 for architecture='ldm'")
            for width in {*self.encoder_widths, *self.decoder_widths}:
                if width % self.n_norm_groups:
                    raise ValueError(
                        f"n_norm_groups={self.n_norm_groups} must divide every width in encoder_widths and "
                        f"decoder_widths, but {width} is not divisible"
                    )
            return
        if self.latent_channels > 3 * self.compression**2:
            raise ValueError(
                f"latent_channels={self.latent_channels} exceed the {3 * self.compression**2} values of a patch of "
                f"{self.compression}x{self.compression} pixels"
            )
        for name in ("encoder_widths", "decoder_widths"):
            widths = getattr(self, name)
            for fine, coarse in zip(widths, widths[1:]):
                if 4 * fine % coarse:
                    raise ValueError(
                        f"{name}={widths}: {coarse} must divide 4 * {fine}, so that the shortcut between the stages "
                        "averages or repeats whole channels"
                    )

    def validate_image_size(self):
        if self.image_size % self.compression:
            raise ValueError(f"image_size={self.image_size} must be divisible by the compression {self.compression}")


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv1x1(silu(conv3x3(norm(x)))), the last convolution starting at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = ZeroConv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> the same shape."""
        return x + self.out(F.silu(self.conv(self.norm(x))))


class PatchCode(nn.Conv2d):
    """The linear path of one direction: f x f patches -> Z latents, or back. Starts as a truncated cosine transform.

    Args:
        patch_size: f, in pixels.
        latent_channels: Z.
        inverse: latents to pixels.
    """

    SCALE = 4.0  # Pixels per latent unit: brings latents of natural patches near unit size.

    def __init__(self, patch_size: int, latent_channels: int, inverse: bool):
        n_values = 3 * patch_size**2
        in_channels, out_channels = (latent_channels, n_values) if inverse else (n_values, latent_channels)
        super().__init__(in_channels, out_channels, 1)
        self.patch_size, self.latent_channels, self.inverse = patch_size, latent_channels, inverse

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, Y, X) -> (B, Z, y, x), or back."""
        # In fp32 also under autocast: bf16 would round whole steps of brightness away.
        with torch.autocast(x.device.type, enabled=False):
            if self.inverse:
                return F.pixel_shuffle(super().forward(x.float()), self.patch_size)
            return super().forward(F.pixel_unshuffle(x.float(), self.patch_size))

    def initial_weight(self) -> Tensor:
        """The weight it starts with: orthonormal patterns over SCALE, or their transpose times SCALE."""
        patterns = cosine_patterns(self.patch_size, self.latent_channels)
        weight = patterns.T * self.SCALE if self.inverse else patterns / self.SCALE
        return weight[:, :, None, None]


def cosine_patterns(patch_size: int, n_patterns: int) -> Tensor:
    """The lowest of the orthonormal two-dimensional cosine patterns (DCT-II) of brightness and two colour differences.

    Patterns are ordered by frequency, where colour counts 2.2 and 2.8 times as high as brightness.
    Returns: (n_patterns, 3 * patch_size**2), in the channel order of `pixel_unshuffle`.
    """
    # Orthonormal cosines along one axis, (f, f), and directions in RGB: brightness and two colour differences.
    position = torch.arange(patch_size, dtype=torch.float64) + 0.5
    waves = torch.stack([torch.cos(math.pi * k * position / patch_size) for k in range(patch_size)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]], dtype=torch.float64)
    colors = colors / colors.norm(dim=1, keepdim=True)
    # All patterns by frequency; frequencies of colour are weighted up, since natural images have less of them.
    order = sorted(
        ((math.hypot(u, v) + 0.5) * (1.0, 2.2, 2.8)[color], color, u, v)
        for color in range(3)
        for u in range(patch_size)
        for v in range(patch_size)
    )
    # Products of one colour direction and two waves, (3, f, f), flattened in the order of `pixel_unshuffle`.
    patterns = [
        torch.einsum("c,y,x->cyx", colors[c], waves[u], waves[v]).flatten() for _, c, u, v in order[:n_patterns]
    ]
    return torch.stack(patterns).float()


class PosteriorHead(ZeroConv2d):
    """1x1 convolution to mean and logvar of the posterior; starts at mean 0 and logvar -5."""

    LOGVAR = -5.0  # a std of 0.08


class ResidualEncoder(nn.Module):
    """(B, 3, Y, X) -> posterior parameters (B, 2Z, y, x)."""

    def __init__(self, config: ImageVAEConfig):
        super().__init__()
        widths = config.encoder_widths
        self.patch_size = config.patch_size
        self.code = PatchCode(config.compression, config.latent_channels, inverse=False)
        self.stem = nn.Conv2d(3 * config.patch_size**2, widths[0], 1)
        blocks: list[nn.Module] = []
        # Fine to coarse, with a downsampling before every stage but the first.
        for i, (width, n_blocks) in enumerate(zip(widths, config.n_encoder_blocks)):
            if i > 0:
                blocks.append(Downsample(widths[i - 1], width))
            blocks += [ResidualBlock(width) for _ in range(n_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = ChannelNorm(widths[-1])
        self.head = PosteriorHead(widths[-1], 2 * config.latent_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        # Network: (B, 3, Y, X) -> (B, 3 P^2, Y/P, X/P) -> (B, D, y, x).
        x = self.stem(F.pixel_unshuffle(image, self.patch_size))
        for block in self.blocks:
            x = block(x)
        # The posterior is computed in fp32: under bf16 autocast its rounding would exceed a small std.
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = self.head(F.silu(self.norm(x.float()))).chunk(2, dim=1)
        # The network corrects the mean of the linear path.
        return torch.cat([mean + self.code(image), logvar], dim=1)


class ResidualDecoder(nn.Module):
    """(B, Z, y, x) -> (B, 3, Y, X)."""

    def __init__(self, config: ImageVAEConfig):
        super().__init__()
        widths = config.decoder_widths
        self.patch_size = config.patch_size
        self.code = PatchCode(config.compression, config.latent_channels, inverse=True)
        self.stem = nn.Conv2d(config.latent_channels, widths[-1], 1)
        blocks: list[nn.Module] = []
        # Coarse to fine, with an upsampling after every stage but the finest.
        for i in reversed(range(len(widths))):
            blocks += [ResidualBlock(widths[i]) for _ in range(config.n_decoder_blocks[i])]
            if i > 0:
                blocks.append(Upsample(widths[i], widths[i - 1]))
        self.blocks = nn.ModuleList(blocks)
        self.norm = ChannelNorm(widths[0])
        self.head = ZeroConv2d(widths[0], 3 * config.patch_size**2, 1)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = self.stem(latents)
        for block in self.blocks:
            x = block(x)
        # The network's image, 0 at the start, plus that of the linear path.
        return F.pixel_shuffle(self.head(F.silu(self.norm(x))), self.patch_size) + self.code(latents)


ARCHITECTURES: dict[str, tuple[Callable[[ImageVAEConfig], nn.Module], Callable[[ImageVAEConfig], nn.Module]]] = {
    "residual": (ResidualEncoder, ResidualDecoder),
    "ldm": (LDMEncoder, LDMDecoder),
}


class ImageVAE(VAE):
    """Image VAE of either architecture; images are (B, 3, Y, X) fp32 in [-1, 1]."""

    config_class = ImageVAEConfig
    config: ImageVAEConfig

    def __init__(self, config: ImageVAEConfig):
        super().__init__(config)
        build_encoder, build_decoder = ARCHITECTURES[config.architecture]
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As `VAE._init_weights`, and:

        PatchCode                 truncated cosine transform, bias 0
        PosteriorHead             weight 0, bias 0 for the mean, -5 for logvar
        ChannelNorm               weight 1, bias 0
        """
        super()._init_weights(module)
        if isinstance(module, PatchCode):
            initialization.copy_(module.weight, module.initial_weight())
        elif isinstance(module, PosteriorHead):
            bias = torch.zeros(module.out_channels)
            bias[module.out_channels // 2 :] = module.LOGVAR
            initialization.copy_(module.bias, bias)
        elif isinstance(module, ChannelNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ImageVAE":
        """A model with fresh weights of a size in `presets.IMAGE_VAE`; ValueError for an unknown name or field."""
        return cls(from_preset(ImageVAEConfig, IMAGE_VAE, name, **overrides))

    @classmethod
    def from_diffusers(cls, folder: str | Path) -> "ImageVAE":
        """Read a folder written by diffusers' `AutoencoderKL.save_pretrained` as architecture "ldm".

        The scaling and shift factor of diffusers become the latent statistics.
        Raises:
            FileNotFoundError: config.json or diffusion_pytorch_model.safetensors is missing.
            ValueError: the configuration asks for something the architecture does not have.
        """
        folder = Path(folder)
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; expected a folder saved by diffusers' AutoencoderKL"
                )
        fields, mean, std = config_from_diffusers(json.loads((folder / "config.json").read_text()))
        # Weights and statistics; a single number stands for all channels.
        model = cls(ImageVAEConfig(**fields))
        model.load_diffusers_weights(load_file(folder / "diffusion_pytorch_model.safetensors"))
        Z = model.config.latent_channels
        model.set_latent_statistics(torch.as_tensor(mean).expand(Z), torch.as_tensor(std).expand(Z))
        return model

    def load_diffusers_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Copy the weights of diffusers' AutoencoderKL into this model of architecture "ldm".

        Args:
            state_dict: as `AutoencoderKL.state_dict()`; older names of the attention's layers are understood.
        Raises:
            ValueError: other architecture, or weights whose names or shapes differ from this model's.
        """
        if self.config.architecture != "ldm":
            raise ValueError(f"architecture={self.config.architecture!r} cannot take diffusers' weights; use 'ldm'")
        weights = rename_diffusers_weights(state_dict)
        # diffusers' file lacks only the latent statistics.
        expected = {name: value for name, value in self.state_dict().items() if not name.startswith("latent_")}
        if set(weights) != set(expected):
            missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
            raise ValueError(f"weights do not fit this model: missing {missing[:5]}, not known {extra[:5]}")
        for name, value in weights.items():
            if value.shape != expected[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, this model needs {tuple(expected[name].shape)}"
                )
        self.load_state_dict(weights, strict=False)
