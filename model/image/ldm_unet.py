"""The UNet of latent diffusion (arXiv 2112.10752), layer for layer as diffusers' UNet2DConditionModel, whose weights
it loads.  B batch, D width of a level, Y X rows and columns, T text tokens, E width of the text.

Every level but the last halves the resolution; the way up has one block more per level than the way down. Every
output on the way down, those of stem and downsampling too, is concatenated to the input of one block on the way up.
Conditioning is by attention to the text only: the pooled text has no use here.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpointing import GradientCheckpointingLayer
from model.cpu_kernels import attention
from model.diffusion import TextCondition, TimeEmbedding
from model.image.ldm_vae import LDMUpsample
from model.layers import ZeroConv2d

NORM_EPS = 1e-5  # of residual blocks and of the last norm, as in Stable Diffusion
ATTENTION_NORM_EPS = 1e-6  # of the norm before a transformer block


class LDMTimeBlock(GradientCheckpointingLayer):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + time))); the shortcut is 1x1 where the width changes."""

    def __init__(self, width: int, out_width: int, conditioning_width: int, *, n_norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(n_norm_groups, width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.time = nn.Linear(conditioning_width, out_width)
        self.norm2 = nn.GroupNorm(n_norm_groups, out_width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out_width, 1) if width != out_width else nn.Identity()

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x (B, D, Y, X), conditioning (B, conditioning_width) -> (B, out_width, Y, X)."""
        # The time is added between the convolutions, one number per channel.
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(conditioning))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class LDMCrossAttention(nn.Module):
    """Attention of (B, L, D) to (B, T, E) without biases on the way in."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(context_width, width, bias=False)
        self.value = nn.Linear(context_width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (B, T) bool, True where attention is allowed -> (B, L, D)."""
        # (B, L or T, D) -> (B, H, L or T, K).
        q, k, v = (
            h.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for h in (self.query(x), self.key(context), self.value(context))
        )
        allowed = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
        # (B, H, L, K) -> (B, L, D).
        return self.output(attention(q, k, v, mask=allowed).transpose(1, 2).flatten(2))


class LDMTransformer(GradientCheckpointingLayer):
    """x + projection of one transformer block: attention to itself, to the text, and a gated feed-forward layer."""

    def __init__(
        self, width: int, text_width: int, head_width: int, *, n_norm_groups: int, use_linear_projection: bool
    ):
        super().__init__()

        def projection() -> nn.Module:
            return nn.Linear(width, width) if use_linear_projection else nn.Conv2d(width, width, 1)

        self.use_linear_projection = use_linear_projection
        self.norm = nn.GroupNorm(n_norm_groups, width, eps=ATTENTION_NORM_EPS)
        self.proj_in = projection()
        self.norm1 = nn.LayerNorm(width)
        self.attention = LDMCrossAttention(width, width, head_width)
        self.norm2 = nn.LayerNorm(width)
        self.text_attention = LDMCrossAttention(width, text_width, head_width)
        self.norm3 = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 8 * width)  # value and gate
        self.output = nn.Linear(4 * width, width)
        self.proj_out = projection()

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """x (B, D, Y, X), states (B, T, E), mask (B, T) -> (B, D, Y, X)."""
        h = self.norm(x)
        # Projection in: a 1x1 convolution before positions are flattened, or a linear layer after.
        h = h if self.use_linear_projection else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, Y * X, D)
        h = self.proj_in(h) if self.use_linear_projection else h
        # Self-attention.
        normed = self.norm1(h)
        h = h + self.attention(normed, normed)
        # Attention to the text.
        h = h + self.text_attention(self.norm2(h), states, mask)
        # Feed-forward layer, gated by the exact GELU of its second half.
        value, gate = self.hidden(self.norm3(h)).chunk(2, dim=-1)
        h = h + self.output(value * F.gelu(gate))
        # Projection out, likewise.
        h = self.proj_out(h) if self.use_linear_projection else h
        h = h.transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + (h if self.use_linear_projection else self.proj_out(h))


class LDMStridedConv(GradientCheckpointingLayer):
    """3x3 convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, Y, X) -> (B, D, Y/2, X/2)."""
        return self.conv(x)


class LDMStep(nn.Module):
    """A residual block and, where the level has attention, a transformer after it."""

    def __init__(self, block: LDMTimeBlock, transformer: LDMTransformer | None):
        super().__init__()
        self.block = block
        self.transformer = transformer

    def forward(self, x: Tensor, conditioning: Tensor, text: TextCondition) -> Tensor:
        x = self.block(x, conditioning)
        return x if self.transformer is None else self.transformer(x, text.states, text.mask)


class LDMUNet(nn.Module):
    """The network of `ImageDiffusionConfig` with architecture="ldm", called like `model.diffusion.UNet`."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.widths, config.n_norm_groups

        def step(in_width: int, width: int, use_attention: bool) -> LDMStep:
            head_width = config.head_width if config.n_heads is None else width // config.n_heads
            transformer = LDMTransformer(
                width,
                config.text_width,
                head_width,
                n_norm_groups=groups,
                use_linear_projection=config.use_linear_projection,
            )
            block = LDMTimeBlock(in_width, width, config.time_width, n_norm_groups=groups)
            return LDMStep(block, transformer if use_attention else None)

        # Down: every output is a skip, and so its width is noted for the way up.
        self.time = TimeEmbedding(widths[0], config.time_width)
        self.stem = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        skip_widths, x_width = [widths[0]], widths[0]
        self.down, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for i, (width, n_blocks, use_attention) in enumerate(zip(widths, config.n_blocks, config.use_attention)):
            ins = [x_width] + [width] * (n_blocks - 1)
            self.down.append(nn.ModuleList(step(in_width, width, use_attention) for in_width in ins))
            skip_widths += [width] * n_blocks
            if i + 1 < len(widths):
                self.downsamples.append(LDMStridedConv(width))
                skip_widths.append(width)
            x_width = width
        # The coarsest level: residual block, transformer, residual block.
        self.middle = nn.ModuleList([step(x_width, x_width, True), step(x_width, x_width, False)])
        # Up: one block more per level, each of which takes a skip beside its input.
        self.up, self.upsamples = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            level = nn.ModuleList()
            for _ in range(config.n_blocks[i] + 1):
                level.append(step(x_width + skip_widths.pop(), widths[i], config.use_attention[i]))
                x_width = widths[i]
            self.up.append(level)
            if i > 0:
                self.upsamples.append(LDMUpsample(x_width))
        self.norm = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.head = ZeroConv2d(widths[0], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: TextCondition) -> Tensor:
        """Args:
            x: noisy sample as the process scales it, (B, Z, y, x), sides divisible by 2^(levels - 1).
            time: the network's time, about [0, 1000], (B,).
        Returns:
            (B, Z, y, x) fp32."""
        conditioning = self.time(time)
        # Down.
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for i, level in enumerate(self.down):
            for step in level:
                h = step(h, conditioning, text)
                skips.append(h)
            if i < len(self.downsamples):
                h = self.downsamples[i](h)
                skips.append(h)
        # The coarsest level.
        for step in self.middle:
            h = step(h, conditioning, text)
        # Up.
        for i, level in enumerate(self.up):
            for step in level:
                h = step(torch.cat([h, skips.pop()], dim=1), conditioning, text)
            if i < len(self.upsamples):
                h = self.upsamples[i](h)
        # The output, in fp32.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.norm(h.float())))


# diffusers' names -> ours, applied in this order.
DIFFUSERS_NAMES = [
    (r"^time_embedding\.linear_1\.", "time.hidden."),
    (r"^time_embedding\.linear_2\.", "time.output."),
    (r"^conv_in\.", "stem."),
    (r"^conv_norm_out\.", "norm."),
    (r"^conv_out\.", "head."),
    (r"^down_blocks\.(\d+)\.downsamplers\.0\.", r"downsamples.\1."),
    (r"^up_blocks\.(\d+)\.upsamplers\.0\.", r"upsamples.\1."),
    (r"^mid_block\.resnets\.(\d+)\.", r"middle.\1.block."),
    (r"^mid_block\.attentions\.(\d+)\.", r"middle.\1.transformer."),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.\3.block."),
    (r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"\1.\2.\3.transformer."),
    (r"\.time_emb_proj\.", ".time."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.transformer_blocks\.0\.", "."),
    (r"\.attn1\.", ".attention."),
    (r"\.attn2\.", ".text_attention."),
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".output."),
    (r"\.ff\.net\.0\.proj\.", ".hidden."),
    (r"\.ff\.net\.2\.", ".output."),
]


def rename_diffusers_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of this file."""
    weights = {}
    for name, value in state_dict.items():
        for pattern, replacement in DIFFUSERS_NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    return weights


# Options of diffusers' model that the architecture has one value of.
FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}


def config_from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ImageDiffusionConfig` from the config.json of diffusers' UNet2DConditionModel.

    Raises:
        ValueError: the file is of another model, or of a variant that architecture "ldm" does not have.
    """
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ValueError(f"_class_name={config['_class_name']!r}: only diffusers' UNet2DConditionModel can be read")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"in_channels={config['in_channels']} and out_channels={config['out_channels']} differ; "
            "architecture 'ldm' predicts as many channels as it is given"
        )
    for name, expected in FIXED.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}={config[name]!r}: architecture 'ldm' has {expected!r}")
    # Kinds of blocks: with attention or without, at the same levels down and up.
    kinds = {"DownBlock2D": False, "CrossAttnDownBlock2D": True, "UpBlock2D": False, "CrossAttnUpBlock2D": True}
    down, up = config["down_block_types"], config["up_block_types"]
    unknown = sorted({*down, *up} - set(kinds))
    if unknown or [kinds[kind] for kind in down] != [kinds[kind] for kind in up][::-1]:
        raise ValueError(
            f"down_block_types={down}, up_block_types={up}: architecture 'ldm' has {sorted(kinds)}, with attention at "
            "the same levels down and up"
        )
    text_width, n_blocks = config["cross_attention_dim"], config["layers_per_block"]
    if not isinstance(text_width, int):  # A list has one for every level.
        raise ValueError(f"cross_attention_dim={text_width!r}: architecture 'ldm' has the same for all levels")
    widths, n_heads = list(config["block_out_channels"]), config["attention_head_dim"]  # heads, despite the name
    # Stable Diffusion 2: heads of one width; 1: the same number of heads at all levels.
    if isinstance(n_heads, list):
        if len({width // n for width, n in zip(widths, n_heads)}) > 1:
            raise ValueError(f"attention_head_dim={n_heads}: architecture 'ldm' has heads of one width, or one number")
        heads = {"n_heads": None, "head_width": widths[0] // n_heads[0]}
    else:
        heads = {"n_heads": n_heads}
    return {
        "architecture": "ldm",
        # The process of Stable Diffusion 1; the file does not say it.
        "schedule": "scaled_linear",
        "prediction": "epsilon",
        "latent_channels": config["in_channels"],
        "latent_size": config.get("sample_size") or 64,
        "widths": widths,
        "conditioning_width": 4 * widths[0],
        "n_blocks": [n_blocks] * len(widths) if isinstance(n_blocks, int) else list(n_blocks),
        "use_attention": [kinds[kind] for kind in down],
        **heads,
        "n_norm_groups": config["norm_num_groups"],
        "use_linear_projection": config.get("use_linear_projection", False),
        "text_encoder": "frozen",
        "text_width": text_width,
        "text_embedding_width": text_width,
    }
