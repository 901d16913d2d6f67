"""The VAE of latent diffusion (arXiv 2112.10752), layer for layer as diffusers' AutoencoderKL, whose weights it loads.
B batch, D width of a stage, Y X rows and columns, Z latent channels.

Every stage but the last halves the resolution; the decoder has one residual block more per stage than the encoder in
diffusers' layout, which `n_decoder_blocks` states explicitly. The middle has one attention layer with a single head.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpointing import GradientCheckpointingLayer
from model.cpu_kernels import attention

NORM_EPS = 1e-6  # as in diffusers' AutoencoderKL


class LDMResidualBlock(GradientCheckpointingLayer):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))); the shortcut is 1x1 where the width changes."""

    def __init__(self, width: int, out_width: int, n_norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(n_norm_groups, width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2 = nn.GroupNorm(n_norm_groups, out_width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out_width, 1) if width != out_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> (B, out_width, Y, X)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class LDMAttention(GradientCheckpointingLayer):
    """x + attention over all positions with one head as wide as the stage."""

    def __init__(self, width: int, n_norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(n_norm_groups, width, eps=NORM_EPS)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> the same shape."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, Y * X, D)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.query, self.key, self.value))  # (B, 1, Y * X, D)
        h = self.output(attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, Y * X, D) -> (B, D, Y, X)


class LDMDownsample(GradientCheckpointingLayer):
    """3x3 convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> (B, D, Y/2, X/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (left, right, top, bottom)


class LDMUpsample(GradientCheckpointingLayer):
    """Nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> (B, D, 2Y, 2X)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(width: int, n_norm_groups: int) -> list[nn.Module]:
    """The coarsest part of both halves: residual block, attention, residual block."""
    return [
        LDMResidualBlock(width, width, n_norm_groups),
        LDMAttention(width, n_norm_groups),
        LDMResidualBlock(width, width, n_norm_groups),
    ]


class LDMEncoder(nn.Module):
    """(B, 3, Y, X) -> posterior parameters (B, 2Z, y, x)."""

    def __init__(self, config):
        super().__init__()
        widths, groups, Z = config.encoder_widths, config.n_norm_groups, config.latent_channels
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        # Fine to coarse: a stage's first block changes the width, all stages but the last end in downsampling.
        for i, (width, n_blocks) in enumerate(zip(widths, config.n_encoder_blocks)):
            ins = [widths[max(i - 1, 0)]] + [width] * (n_blocks - 1)
            stage = nn.ModuleList(LDMResidualBlock(in_width, width, groups) for in_width in ins)
            if i + 1 < len(widths):
                stage.append(LDMDownsample(width))
            self.stages.append(stage)
        self.middle = nn.ModuleList(middle(widths[-1], groups))
        self.norm = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.head = nn.Conv2d(widths[-1], 2 * Z, 3, padding=1)  # mean and logvar
        # diffusers' `quant_conv`, which Stable Diffusion 3 and FLUX lack.
        self.posterior = nn.Conv2d(2 * Z, 2 * Z, 1) if config.use_quant_conv else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        # Stem and stages, then the coarsest part.
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        for block in self.middle:
            x = block(x)
        # The posterior is computed in fp32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return self.posterior(self.head(F.silu(self.norm(x.float()))))


class LDMDecoder(nn.Module):
    """(B, Z, y, x) -> (B, 3, Y, X)."""

    def __init__(self, config):
        super().__init__()
        # Lists run from fine to coarse, the decoder from coarse to fine.
        widths, groups, Z = config.decoder_widths[::-1], config.n_norm_groups, config.latent_channels
        self.prior = nn.Conv2d(Z, Z, 1) if config.use_quant_conv else nn.Identity()
        self.stem = nn.Conv2d(Z, widths[0], 3, padding=1)
        self.middle = nn.ModuleList(middle(widths[0], groups))
        self.stages = nn.ModuleList()
        for i, (width, n_blocks) in enumerate(zip(widths, config.n_decoder_blocks[::-1])):
            ins = [widths[max(i - 1, 0)]] + [width] * (n_blocks - 1)
            stage = nn.ModuleList(LDMResidualBlock(in_width, width, groups) for in_width in ins)
            if i + 1 < len(widths):
                stage.append(LDMUpsample(width))
            self.stages.append(stage)
        self.norm = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.head = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        # Stem and the coarsest part, then the stages.
        x = self.stem(self.prior(latents.contiguous(memory_format=torch.channels_last)))
        for block in self.middle:
            x = block(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(F.silu(self.norm(x)))


# diffusers' names -> ours, applied in this order; the attention's layers have two generations of names.
DIFFUSERS_NAMES = [
    (r"^quant_conv\.", "encoder.posterior."),
    (r"^post_quant_conv\.", "decoder.prior."),
    (r"\.conv_in\.", ".stem."),
    (r"\.conv_norm_out\.", ".norm."),
    (r"\.conv_out\.", ".head."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".stages.\1.\2."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".output."),
]


def rename_diffusers_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of this file; attention weights stored as 1x1 convolutions become matrices."""
    n_blocks: dict[str, int] = {}  # residual blocks per stage; the resampling layer comes after them
    for name in state_dict:
        if match := re.match(r"(\w+\.(?:down|up)_blocks\.\d+)\.resnets\.(\d+)\.", name):
            n_blocks[match[1]] = max(n_blocks.get(match[1], 0), int(match[2]) + 1)
    weights = {}
    for name, value in state_dict.items():
        # Ours counts a resampling layer as the last one of its stage.
        if match := re.match(r"((\w+)\.(?:down|up)_blocks\.(\d+))\.(?:down|up)samplers\.0\.(.*)", name):
            name = f"{match[2]}.stages.{match[3]}.{n_blocks[match[1]]}.{match[4]}"
        for pattern, replacement in DIFFUSERS_NAMES:
            name = re.sub(pattern, replacement, name)
        # Older files hold the attention's layers as 1x1 convolutions, (D, D, 1, 1).
        is_matrix = re.search(r"\.middle\.1\.(query|key|value|output)\.weight$", name)
        weights[name] = value.flatten(1) if is_matrix else value
    return weights


def config_from_diffusers(config: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Fields of `ImageVAEConfig`, and mean and std of the latents, from diffusers' config.json.

    diffusers standardises by (z - shift_factor) * scaling_factor, or per channel by latents_mean and latents_std.
    Raises:
        ValueError: the file is of another model, or of a variant that architecture "ldm" does not have.
    """
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"_class_name={config['_class_name']!r}: only diffusers' AutoencoderKL can be read")
    # Options that the architecture has one value of.
    for name, expected in (
        ("act_fn", "silu"),
        ("mid_block_add_attention", True),
        ("in_channels", 3),
        ("out_channels", 3),
    ):
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}={config[name]!r}: architecture 'ldm' has {expected!r}")
    use_quant_conv = config.get("use_quant_conv", True)
    if config.get("use_post_quant_conv", True) != use_quant_conv:
        raise ValueError("use_quant_conv and use_post_quant_conv differ; architecture 'ldm' has both or neither")
    # Fields; the decoder has one residual block more per stage.
    widths = list(config["block_out_channels"])
    fields = {
        "architecture": "ldm",
        "patch_size": 1,
        "image_size": config.get("sample_size", 256),
        "latent_channels": config["latent_channels"],
        "encoder_widths": widths,
        "decoder_widths": widths,
        "n_encoder_blocks": [config["layers_per_block"]] * len(widths),
        "n_decoder_blocks": [config["layers_per_block"] + 1] * len(widths),
        "n_norm_groups": config.get("norm_num_groups", 32),
        "use_quant_conv": use_quant_conv,
    }
    # Statistics: per channel, or shift and 1 / factor for all channels (0.18215: diffusers' default).
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = config.get("shift_factor") or 0.0, 1 / config.get("scaling_factor", 0.18215)
    return fields, mean, std
